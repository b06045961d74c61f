"""The jump where a continuation begins, or where the VAE's chunks meet, beside the real video's own change there."""

import torch
from torch import Tensor

from .optical_flow import check_motion
from .psnr import psnr
from .temporal import Relative, relative


@torch.no_grad()
def compute_seam_jump(pred_video: Tensor, gt_video: Tensor, seam: int) -> Relative:
    """PSNR in dB between the frames on both sides of a seam; both videos [3, F, H, W] in [-1, 1], seam: the first frame after it.

    Returns {"pred", "truth", "error"}, error = |pred - truth|: 0 is a step like the real one. pred below truth is a jump,
    above it a picture that stands still. Between known and generated frames, frame seam - 1 is the real one in both videos.
    Raises ValueError for shapes that disagree, or a seam without a frame on both sides.
    """
    check_motion(pred_video, gt_video)
    if not 0 < seam < pred_video.shape[1]:
        raise ValueError(f"seam is {seam}; it must be between 1 and {pred_video.shape[1] - 1}, the frames' last index")
    step = slice(seam - 1, seam), slice(seam, seam + 1)
    return relative(*(psnr(video[:, step[1]], video[:, step[0]]) for video in (pred_video, gt_video)))
