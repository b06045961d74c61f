"""How a video changes from frame to frame, always beside the real one: neither flicker nor a frozen picture may win.

Each measure gives {"pred": float, "truth": float, "error": float}: the means of both videos, and the mean over frame pairs of
|pred - truth|, which is 0 for a copy of the truth; less is better. Only the error ranks videos.
"""

import torch
from torch import Tensor

from .frames import unit_range
from .optical_flow import FLOWS, FlowName, check_motion
from .psnr import PSNR_CAP, psnr
from .ssim import ssim

Relative = dict[str, float]


def compute_temporal_consistency(
    video1: Tensor, video2: Tensor, estimator: FlowName = "farneback"
) -> dict[str, Relative]:
    """Compare how a generated video (1) and the real one (2) change; both [3, F, H, W] in [-1, 1], on one device.

    Returns {"frame_psnr", "frame_ssim", "warping_psnr_<estimator>": see the top of the file}. Raises ValueError for shapes that
    disagree or a single frame.
    """
    check_motion(video1, video2)
    flow = FLOWS[estimator](video2)
    return frame_changes(video1, video2) | {f"warping_psnr_{estimator}": warping(video1, video2, flow)}


@torch.no_grad()
def frame_changes(pred_CFHW: Tensor, truth_CFHW: Tensor) -> dict[str, Relative]:
    """PSNR in dB and SSIM between each frame and the next: high where little moves, the PSNR cap and 1 where nothing does.

    A frozen video is thus 1 - truth away in SSIM, which is little where the real one moves little: PSNR tells it apart.
    """
    return {
        name: relative(*(measure(video[:, 1:], video[:, :-1]) for video in (pred_CFHW, truth_CFHW)))
        for name, measure in (("frame_psnr", psnr), ("frame_ssim", ssim))
    }


@torch.no_grad()
def warping(pred_CFHW: Tensor, truth_CFHW: Tensor, truth_flow: Tensor) -> Relative:
    """The warping error as PSNR in dB, in [0, PSNR_CAP], both videos followed along the real one's flow.

    warping_error's -10 log10. Along the truth's flow a frozen video errs, as one does that moves elsewhere; occlusions
    and the estimator's own mistakes are the same in both.
    """
    errors = (warping_error(video, truth_flow) for video in (pred_CFHW, truth_CFHW))
    return relative(*((-10 * error.log10()).clamp(max=PSNR_CAP) for error in errors))


def warping_error(video_CFHW: Tensor, flow: Tensor) -> Tensor:
    """Mean squared difference between frame k and frame k+1 fetched along the flow [F-1, 2, H, W]: [F-1] float64, in [0, 1].

    Values on [0, 1] after clamping, bilinear; pixels whose flow leaves the frame do not count, and where all leave it the
    error is 0. Source: Lai et al., "Learning blind video temporal consistency", ECCV 2018, arXiv:1808.00449, eq. 10, without its
    mask of occlusions.
    """
    frames, (height, width) = unit_range(video_CFHW).transpose(0, 1), video_CFHW.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64, device=flow.device),
        torch.arange(width, dtype=torch.float64, device=flow.device),
        indexing="ij",
    )
    errors = []
    for now, after, shift in zip(frames[:-1], frames[1:], flow.double(), strict=True):
        to_x, to_y = x + shift[0], y + shift[1]
        inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
        grid = torch.stack((2 * to_x / (width - 1) - 1, 2 * to_y / (height - 1) - 1), dim=-1)
        fetched = torch.nn.functional.grid_sample(after[None], grid[None], align_corners=True)[0]
        squared = (now - fetched).square().mean(0)
        errors.append(torch.where(inside, squared, 0).sum() / inside.sum().clamp(min=1))
    return torch.stack(errors)


def relative(pred: Tensor, truth: Tensor) -> Relative:
    """A measure's values [F-1] of both videos, as means and mean distance."""
    return {"pred": pred.mean().item(), "truth": truth.mean().item(), "error": (pred - truth).abs().mean().item()}
