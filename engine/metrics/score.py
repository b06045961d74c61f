"""All image measures of one clip, as they go into its result file."""

from typing import Any

import torch
from torch import Tensor

from .frames import check_pair
from .lpips import LPIPS
from .psnr import mse, psnr
from .ssim import ssim


@torch.no_grad()
def score_frames(
    pred_CFHW: Tensor, truth_CFHW: Tensor, *, lpips: LPIPS | None, lpips_reason: str | None = None
) -> dict[str, dict[str, Any]]:
    """Return {"psnr" | "mse" | "ssim" | "lpips": {"mean": float, "frames": [float, ...]}}, ready for JSON.

    Both videos are [3, F, H, W] in [-1, 1], on one device. "mean" is the plain mean over frames: the PSNR of a clip is
    the mean of its frames' PSNR, not the PSNR of its mean error. With `lpips` None that entry is
    {"mean": None, "frames": None, "reason": lpips_reason}.
    Raises ValueError when the shapes disagree or a value is not finite.
    """
    check_pair(pred_CFHW, truth_CFHW)
    if lpips is None and not lpips_reason:
        raise ValueError("lpips is None; lpips_reason must say why")
    measures = {"psnr": psnr, "mse": mse, "ssim": ssim} | ({"lpips": lpips} if lpips else {})
    values_MF = torch.stack([measure(pred_CFHW, truth_CFHW) for measure in measures.values()])
    finite = torch.stack((pred_CFHW.isfinite().all(), truth_CFHW.isfinite().all()))
    for name, is_finite in zip(("pred", "truth"), finite.tolist(), strict=True):
        if not is_finite:
            raise ValueError(f"{name} holds NaN or infinity; frames must be finite to be scored")
    scores: dict[str, dict[str, Any]] = {
        name: {"mean": sum(frames) / len(frames), "frames": frames}
        for name, frames in zip(measures, values_MF.tolist(), strict=True)
    }
    if lpips is None:
        scores["lpips"] = {"mean": None, "frames": None, "reason": lpips_reason}
    return scores
