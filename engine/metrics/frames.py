"""What the image measures agree on: a video is a float tensor [3, F, H, W], RGB in [-1, 1], as the VAE decodes it."""

import torch
from torch import Tensor


def check_pair(pred_CFHW: Tensor, truth_CFHW: Tensor) -> None:
    """Raise ValueError unless both are float videos [3, F, H, W] of one shape, with at least one frame."""
    shape = list(pred_CFHW.shape)
    if len(shape) != 4 or shape[0] != 3 or shape[1] == 0:
        raise ValueError(f"pred is {shape}; a video must be [3, F, H, W] with F at least 1")
    if list(truth_CFHW.shape) != shape:
        raise ValueError(f"truth is {list(truth_CFHW.shape)} but pred is {shape}; they must have one shape")
    if not (pred_CFHW.is_floating_point() and truth_CFHW.is_floating_point()):
        raise ValueError(
            f"pred is {pred_CFHW.dtype} and truth {truth_CFHW.dtype}; videos must be floating point in [-1, 1]"
        )


def unit_range(video: Tensor) -> Tensor:
    """Clamp to [-1, 1] and map to [0, 1], in float64 so that the measure adds no rounding of its own."""
    return (video.to(torch.float64).clamp(-1, 1) + 1) / 2
