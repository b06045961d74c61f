"""Rotary position embedding over (time, row, column), and the absolute position embedding, as Open-Sora v1.3 computes them.

The head dimension d is split in three equal parts [time | row | column]; each part turns its interleaved pairs by
position * freqs. Row and column positions are divided by `scale`, the picture's size relative to 512 x 512 pixels.
The official model rounds on purpose: positions are made and divided in the dtype of the queries, and angles, cosines and
sines are computed in the dtype of `rope.freqs`. In bfloat16 all of it is bfloat16; the published weights were trained so.
"""

import math

import torch
from torch import Tensor, nn


class Rope(nn.Module):
    """Holds `freqs` [head_dim // 6], a frozen parameter of the checkpoint: 10000^(-2k / (head_dim // 3))."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        axis_dim = head_dim // 3
        freqs = 10000.0 ** (-torch.arange(0, axis_dim, 2, dtype=torch.float64) / axis_dim)
        self.freqs = nn.Parameter(freqs.float(), requires_grad=False)


def rope_tables(freqs: Tensor, time: Tensor, row: Tensor, col: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, each [N, 3 * len(freqs)], in the dtype of `freqs`.

    time, row, col: [N] positions in the dtype of the queries (they are divided by `scale`, except time, in that dtype).
    """
    axes = (time, row / scale, col / scale)
    angle_NP = torch.cat([axis.to(freqs.dtype)[:, None] * freqs for axis in axes], dim=-1)
    return angle_NP.cos(), angle_NP.sin()


def apply_rope(x_BNHD: Tensor, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
    """Turn channel pair p of every head by its token's angle p; P = D / 2. Source: arXiv:2104.09864, eq. 34."""
    a, b = x_BNHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_NP[:, None, :], sin_NP[:, None, :]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x_BNHD.dtype)


def absolute_position(inv_freq: Tensor, rows: int, cols: int, scale: float) -> Tensor:
    """The 2D sinusoidal embedding of a token grid, [rows * cols, 4 * len(inv_freq)] in float32.

    `inv_freq` [D / 4] comes in the model's dtype (the official buffer is cast with the model) and is widened here.
    Order of the parts: sin(column), cos(column), sin(row), cos(row).
    """
    base = round(math.sqrt(rows * cols))
    frequencies = inv_freq.float()
    col = torch.arange(cols, device=inv_freq.device, dtype=torch.float32) / scale * (base / cols)
    row = torch.arange(rows, device=inv_freq.device, dtype=torch.float32) / scale * (base / rows)
    of_col, of_row = (torch.outer(axis, frequencies) for axis in (col, row))  # [cols, D/4], [rows, D/4]
    col_part = torch.cat([of_col.sin(), of_col.cos()], dim=-1).expand(rows, cols, -1)
    row_part = torch.cat([of_row.sin(), of_row.cos()], dim=-1)[:, None].expand(rows, cols, -1)
    return torch.cat([col_part, row_part], dim=-1).flatten(0, 1)
