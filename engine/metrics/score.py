"""All measures of one clip, as they go into its result file."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..processors import usable_cpus
from .frames import check_pair
from .lpips import LPIPS
from .optical_flow import FlowName, begin_flow, end_point_error
from .psnr import mse, psnr
from .seam import compute_seam_jump
from .ssim import ssim
from .temporal import Relative, frame_changes, warping


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


def score_motion(
    pred_CFHW: Tensor, truth_CFHW: Tensor, *, chunk_seams: list[int], flow: FlowName | Literal["none"]
) -> dict[str, dict[str, float]]:
    """Return how a clip moves beside the truth, {name: {"mean": error, "pred": float, "truth": float}}, ready for JSON; less is better.

    Both videos are [3, F, H, W] in [-1, 1]: the last known frame, the same in both, then the generated ones. chunk_seams:
    first frames after a seam of the VAE's chunks, counted from the last known one, which is 0. Names: frame_psnr_error, frame_ssim_error,
    seam_error (known to generated), chunk_seam_error (mean over the seams, left out where there is none), and with a
    flow warping_error_<flow> and flow_error_<flow> (whose pred and truth are mean speeds in pixels a frame).
    """
    truth_flow = None if flow == "none" else begin_flow(flow, truth_CFHW)(usable_cpus())
    return begin_motion(pred_CFHW, truth_CFHW, truth_flow, chunk_seams=chunk_seams, flow=flow)(usable_cpus())


@torch.no_grad()
def begin_motion(
    pred_CFHW: Tensor,
    truth_CFHW: Tensor,
    truth_flow: Tensor | None,
    *,
    chunk_seams: list[int],
    flow: FlowName | Literal["none"],
) -> Callable[[int], dict[str, dict[str, float]]]:
    """Do what `score_motion` needs of the videos' device; the rest, (processors) -> its scores, touches no device and holds none of
    its memory. truth_flow: of `begin_flow`, where a flow is asked for."""
    found = {f"{name}_error": change for name, change in frame_changes(pred_CFHW, truth_CFHW).items()}
    found["seam_error"] = compute_seam_jump(pred_CFHW, truth_CFHW, 1)
    if chunk_seams:
        jumps = [compute_seam_jump(pred_CFHW, truth_CFHW, seam) for seam in chunk_seams]
        found["chunk_seam_error"] = {key: sum(jump[key] for jump in jumps) / len(jumps) for key in jumps[0]}
    if flow == "none" or truth_flow is None:
        return lambda processors: _as_scores(found)
    found[f"warping_error_{flow}"] = warping(pred_CFHW, truth_CFHW, truth_flow.to(pred_CFHW.device))
    pred_flow = begin_flow(flow, pred_CFHW)
    if flow == "farneback":
        return lambda processors: _as_scores(
            found | {"flow_error_farneback": _flow_error(pred_flow(processors), truth_flow)}
        )
    found[f"flow_error_{flow}"] = _flow_error(*(one.to(pred_CFHW.device) for one in (pred_flow(1), truth_flow)))
    return lambda processors: _as_scores(found)


def _flow_error(pred_flow: Tensor, truth_flow: Tensor) -> Relative:
    return {
        "pred": pred_flow.norm(dim=1).mean().item(),
        "truth": truth_flow.norm(dim=1).mean().item(),
        "error": end_point_error(pred_flow, truth_flow).mean().item(),
    }


def _as_scores(found: dict[str, Relative]) -> dict[str, dict[str, float]]:
    return {name: {"mean": f["error"], "pred": f["pred"], "truth": f["truth"]} for name, f in found.items()}
