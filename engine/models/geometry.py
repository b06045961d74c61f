"""What the network needs to know of a latent's shape: token grid, position tables, windows, and which frames are known.

Built once for a shape and passed to every forward, so that the forward itself holds no index lists and never asks the device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .rope import absolute_position, rope_tables

WINDOW = 8  # rows and columns of a window of the "temporal" blocks; in time a window spans every latent frame


@dataclass(frozen=True)
class Geometry:
    """Tables for one latent shape. Token order is (frame, row, column), frames re-ordered so that the known ones come first.

    Attention does not care in which order frames are listed (their time positions travel with them), so any set of known
    frames becomes a prefix of length `known`, and everything after can slice.
    """

    frames: int
    rows: int
    cols: int
    known: int
    latent_size: tuple[int, int]
    """Height and width of the latent before padding to whole patches."""
    order: Tensor | None
    """[frames] original index of each listed frame; None where that is the identity."""
    inverse: Tensor | None
    position_SD: Tensor
    spatial_cos: Tensor
    spatial_sin: Tensor
    window_cos: Tensor
    window_sin: Tensor

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.cols

    @property
    def known_tokens(self) -> int:
        return self.known * self.tokens_per_frame


def build_geometry(
    *,
    frames: int,
    latent_size: tuple[int, int],
    pixel_size: tuple[int, int],
    known_frames: tuple[int, ...],
    freqs: Tensor,
    inv_freq: Tensor,
    dtype: torch.dtype,
    input_sq_size: int = 512,
) -> Geometry:
    """Tables for a latent of `frames` x `latent_size` decoded at `pixel_size` (height, width).

    known_frames: indices of the conditioning latent frames. freqs: `rope.freqs`. inv_freq: of the absolute embedding, [D / 4].
    dtype: the model's; pixel sizes are rounded to it, as in the official scripts. Raises ValueError if no frame is left to predict.
    """
    if sorted(set(known_frames)) != sorted(known_frames) or not all(0 <= k < frames for k in known_frames):
        raise ValueError(f"known_frames must be distinct indices below {frames}, was {list(known_frames)}")
    if len(known_frames) >= frames:
        raise ValueError(f"known_frames names all {frames} latent frames; at least one must be left to predict")
    device = freqs.device
    rows, cols = (-(-side // 2) for side in latent_size)
    height, width = (float(torch.tensor(float(side)).to(dtype)) for side in pixel_size)
    scale = math.sqrt(height * width) / input_sq_size

    listed = [*known_frames, *(t for t in range(frames) if t not in known_frames)]
    order = None if listed == list(range(frames)) else torch.tensor(listed, device=device)
    time, row, col = torch.meshgrid(
        torch.tensor(listed, device=device),
        torch.arange(rows, device=device),
        torch.arange(cols, device=device),
        indexing="ij",
    )
    time, row, col = (axis.reshape(-1).to(dtype) for axis in (time, row, col))
    one_frame = rows * cols
    spatial_cos, spatial_sin = rope_tables(
        freqs, torch.zeros_like(time[:one_frame]), row[:one_frame], col[:one_frame], scale
    )
    window_cos, window_sin = rope_tables(freqs, time, row % WINDOW, col % WINDOW, scale)
    return Geometry(
        frames=frames,
        rows=rows,
        cols=cols,
        known=len(known_frames),
        latent_size=latent_size,
        order=order,
        inverse=None if order is None else order.argsort(),
        position_SD=absolute_position(inv_freq, rows, cols, scale).to(dtype),
        spatial_cos=spatial_cos,
        spatial_sin=spatial_sin,
        window_cos=window_cos,
        window_sin=window_sin,
    )
