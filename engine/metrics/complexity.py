"""How rich and how lively a real clip is: spatial and temporal information, by which clips are told apart in a report.

Source: ITU-T Recommendation P.910, "Subjective video quality assessment methods for multimedia applications", annex on spatial
and temporal perceptual information. Two departures: the mean over frames in place of the maximum, which one cut or one noisy
frame decides; and luma on [0, 1] in place of 8-bit codes (multiply by 255 to compare).
"""

import torch
from torch import Tensor

from .frames import unit_range

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as P.910's standard definition video


@torch.no_grad()
def compute_complexity(video: Tensor) -> dict[str, float]:
    """Spatial and temporal information of a video [3, F, H, W] in [-1, 1], at least 3 x 3 pixels and two frames.

    Returns {"spatial_information": mean over frames of the standard deviation over pixels of the Sobel gradient's length,
    "temporal_information": mean over frame pairs of the standard deviation over pixels of their difference}, both of luma
    on [0, 1]; 0 is a flat picture, or one that stands still. Raises ValueError for a video that is smaller.
    """
    if video.dim() != 4 or video.shape[0] != 3 or video.shape[1] < 2 or min(video.shape[2:]) < 3:
        raise ValueError(f"video is {list(video.shape)}; complexity needs [3, F, H, W] with 2 frames of 3 x 3 at least")
    spatial, temporal, before = [], [], None
    for frame_3HW in video.unbind(1):
        red, green, blue = unit_range(frame_3HW)
        luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        spatial.append(_gradient(luma).std(correction=0))
        if before is not None:
            temporal.append((luma - before).std(correction=0))
        before = luma
    return {
        "spatial_information": torch.stack(spatial).mean().item(),
        "temporal_information": torch.stack(temporal).mean().item(),
    }


def _gradient(luma_HW: Tensor) -> Tensor:
    """Length of the Sobel gradient at pixels whose neighbours all exist, [H - 2, W - 2]."""
    rows = luma_HW[:-2] + 2 * luma_HW[1:-1] + luma_HW[2:]
    columns = luma_HW[:, :-2] + 2 * luma_HW[:, 1:-1] + luma_HW[:, 2:]
    return torch.hypot(rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2])
