"""Optical flow of a video, and how far a generated video's motion lies from the real one's.

A flow is [F-1, 2, H, W] float32 in pixels: frame k at (x, y) is seen again in frame k+1 at (x, y) + flow[k, :, y, x]; channel 0
points right, 1 down. Estimators differ by more than methods do, so a measure's name says which one made it.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..fetch import HUB_FILES, torch_hub_file, verify_hub_file
from ..models.checkpoint import load_strict, open_state
from ..opencv import import_cv2
from ..processors import usable_cpus
from ..torchvision_ops import declare_missing_operators
from .frames import check_pair, unit_range

FlowName = Literal["farneback", "raft"]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
RAFT_SMALLEST = 128  # pixels a side: below it the coarsest correlation has one cell
RAFT_BATCH = 4  # pairs a pass, to bound memory


def farneback(video_CFHW: Tensor) -> Tensor:
    """Polynomial expansion on 8-bit grey, through OpenCV on the CPU; [F-1, 2, H, W] on the video's device.

    Pyramid of 3 levels halved each, window 15, 3 iterations, polynomials over 5 pixels with sigma 1.1. Source: Farneback, "Two-frame
    motion estimation based on polynomial expansion", SCIA 2003. Raises UserError where cv2 is missing.
    """
    return farneback_of(grey(video_CFHW), usable_cpus()).to(video_CFHW.device)


def grey(video_CFHW: Tensor) -> Tensor:
    """Luma of a video on [-1, 1], uint8 [F, H, W] on the CPU."""
    luma = torch.tensor(LUMA, dtype=torch.float64, device=video_CFHW.device)
    return (torch.einsum("c,cfhw->fhw", luma, unit_range(video_CFHW)) * 255).round().to(torch.uint8).cpu()


def farneback_of(grey_FHW: Tensor, processors: int) -> Tensor:
    """`farneback` from grey pictures, [F-1, 2, H, W] on the CPU; pairs of frames beside each other on so many processors."""
    cv2 = import_cv2("optical flow")
    # OpenCV gives up Python's lock while it computes.
    with ThreadPoolExecutor(processors) as pool:
        flows = pool.map(
            lambda pair: cv2.calcOpticalFlowFarneback(*pair, None, 0.5, 3, 15, 3, 5, 1.1, 0),
            itertools.pairwise(grey_FHW.numpy()),
        )
    return torch.stack([torch.from_numpy(flow_HW2) for flow_HW2 in flows]).permute(0, 3, 1, 2)


@torch.no_grad()
def raft(video_CFHW: Tensor) -> Tensor:
    """The small RAFT of torchvision with its published weights, 12 updates, in float32; [F-1, 2, H, W].

    Frames whose sides are below 128 or no multiple of 8 are continued at the right and below by their edges. Source: Teed &
    Deng, "RAFT: recurrent all-pairs field transforms for optical flow", arXiv:2003.12039. Raises UserError where the
    weights are missing.
    """
    network = _raft_network().to(video_CFHW.device)
    height, width = video_CFHW.shape[2:]
    bottom, right = (max(RAFT_SMALLEST, -(-side // 8) * 8) - side for side in (height, width))
    video_FCHW = video_CFHW.transpose(0, 1).float().clamp(-1, 1)
    padded = functional.pad(video_FCHW, (0, right, 0, bottom), mode="replicate")
    with torch.autocast(video_CFHW.device.type, enabled=False):
        pairs = zip(padded[:-1].split(RAFT_BATCH), padded[1:].split(RAFT_BATCH), strict=True)
        return torch.cat([network(one, two)[-1][:, :, :height, :width] for one, two in pairs])


@cache
def _raft_network() -> nn.Module:
    declare_missing_operators()
    from torchvision.models.optical_flow import raft_small

    path = torch_hub_file(HUB_FILES["raft"])
    verify_hub_file(path)
    network = raft_small(weights=None)
    load_strict(network, open_state(path), str(path))
    return network.eval().requires_grad_(False)


FLOWS: dict[FlowName, Callable[[Tensor], Tensor]] = {"farneback": farneback, "raft": raft}


def begin_flow(name: FlowName, video_CFHW: Tensor) -> Callable[[int], Tensor]:
    """Do what a flow needs of the video's device; the rest, (processors) -> flow on the CPU, touches no device."""
    if name == "farneback":
        return partial(farneback_of, grey(video_CFHW))
    flow = FLOWS[name](video_CFHW).cpu()
    return lambda processors: flow


def require_flow(name: FlowName) -> None:
    """Raise UserError, saying what to do, where the estimator cannot run."""
    if name == "raft":
        verify_hub_file(torch_hub_file(HUB_FILES["raft"]))
    else:
        import_cv2("optical flow")


def check_motion(pred_CFHW: Tensor, truth_CFHW: Tensor) -> None:
    """Raise ValueError unless both are videos of one shape with at least two frames."""
    check_pair(pred_CFHW, truth_CFHW)
    if pred_CFHW.shape[1] < 2:
        raise ValueError("one frame does not move; give at least 2")


def end_point_error(pred_flow: Tensor, truth_flow: Tensor) -> Tensor:
    """Length of the difference between two flows [F-1, 2, H, W], mean over pixels: [F-1] float64, in pixels."""
    return (pred_flow - truth_flow).double().norm(dim=1).mean(dim=(1, 2))


def compute_optical_flow_error(pred_video: Tensor, gt_video: Tensor, estimator: FlowName = "farneback") -> float:
    """Mean end-point error between the flows of two videos [3, F, H, W] in [-1, 1], in pixels a frame; 0 is equal, less is better.

    Each video's flow is its own; the error is the mean over frame pairs and pixels of |flow_pred - flow_gt|. A frozen video
    scores the mean speed of the real one. Source: Baker et al., "A database and evaluation methodology for optical flow",
    IJCV 92, 2011, section 4.1. Raises ValueError for shapes that disagree or a single frame.
    """
    check_motion(pred_video, gt_video)
    flow = FLOWS[estimator]
    return end_point_error(flow(pred_video), flow(gt_video)).mean().item()
