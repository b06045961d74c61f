"""Where a token goes when tokens are regrouped by window, so that no kernel needs an index list.

Tokens are ordered (sample, frame, row, column). A window is 8 x 8 tokens by all frames; at the right and bottom edge windows
keep their true size. The grid so falls into at most four regions of equal windows: whole windows, a right strip, a bottom
strip, a corner. Grouped, the regions follow one another; inside a region the order is (sample, window row, window column,
frame, row, column), so that each region is one view [samples * windows, tokens of a window, ...].
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .common import jit

WINDOW = 8


class Grid(NamedTuple):
    """Latent frames, and rows and columns of tokens in a frame."""

    frames: int
    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.cols


class Region(NamedTuple):
    """Windows of one size: `down` x `across` of them, each `height` x `width` tokens, the first token at (row, col)."""

    row: int
    col: int
    down: int
    across: int
    height: int
    width: int


def regions(grid: Grid) -> list[Region]:
    """The regions in the order in which they are stored."""

    def along(size: int) -> list[tuple[int, int, int]]:
        whole = size // WINDOW
        parts = [(0, whole, WINDOW), (whole * WINDOW, 1, size - whole * WINDOW)]
        return [(start, count, length) for start, count, length in parts if count and length]

    return [
        Region(row, col, down, across, height, width)
        for row, down, height in along(grid.rows)
        for col, across, width in along(grid.cols)
    ]


def split_windows(grouped: Tensor, samples: int, grid: Grid) -> list[Tensor]:
    """Views [samples * windows, tokens of a window, ...] of grouped rows [samples * tokens, ...], one for each region."""
    found = regions(grid)
    windows = [samples * r.down * r.across for r in found]
    lengths = [grid.frames * r.height * r.width for r in found]
    # One split and not a slice each: its gradient is one concatenation, theirs a sum of padded ones.
    parts = grouped.split([count * length for count, length in zip(windows, lengths, strict=True)])
    return [part.unflatten(0, size) for part, size in zip(parts, zip(windows, lengths, strict=True), strict=True)]


def group_windows(x: Tensor, grid: Grid) -> Tensor:
    """[B, N, ...] in token order to grouped rows [B * N, ...]; the plain version of what kernels do on the way."""
    x, rest = x.unflatten(1, grid), x.shape[2:]
    parts = []
    for r in regions(grid):
        part = x[:, :, r.row : r.row + r.down * r.height, r.col : r.col + r.across * r.width]
        part = part.unflatten(3, (r.across, r.width)).unflatten(
            2, (r.down, r.height)
        )  # [B, T, down, height, across, width]
        parts.append(part.movedim((2, 4), (1, 2)).reshape(-1, *rest))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def ungroup_windows(grouped: Tensor, samples: int, grid: Grid) -> Tensor:
    """The inverse: [B * N, ...] grouped to [B, N, ...] in token order."""
    strips: dict[int, list[Tensor]] = {}
    for r, view in zip(regions(grid), split_windows(grouped, samples, grid), strict=True):
        part = view.unflatten(0, (samples, r.down, r.across)).unflatten(3, (grid.frames, r.height, r.width))
        part = part.movedim((1, 2), (2, 4)).flatten(4, 5).flatten(2, 3)  # [B, T, rows, cols, ...]
        strips.setdefault(r.row, []).append(part)
    whole = [torch.cat(parts, dim=3) if len(parts) > 1 else parts[0] for parts in strips.values()]
    return (torch.cat(whole, dim=2) if len(whole) > 1 else whole[0]).flatten(1, 3)


@jit
def window_row(token, samples, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WINDOW: tl.constexpr):
    """The grouped row of each token, int32 (rows are counted, not bytes: 2**31 of them do not fit a card)."""
    WHOLE_ROWS: tl.constexpr = ROWS // WINDOW * WINDOW
    WHOLE_COLS: tl.constexpr = COLS // WINDOW * WINDOW
    col = token % COLS
    row = token // COLS % ROWS
    frame = token // (COLS * ROWS) % FRAMES
    sample = token // (COLS * ROWS * FRAMES)
    bottom = row >= WHOLE_ROWS
    right = col >= WHOLE_COLS
    height = tl.where(bottom, ROWS - WHOLE_ROWS, WINDOW)
    width = tl.where(right, COLS - WHOLE_COLS, WINDOW)
    down = tl.where(bottom, 1, WHOLE_ROWS // WINDOW)
    across = tl.where(right, 1, WHOLE_COLS // WINDOW)
    strip = tl.where(bottom, ROWS - WHOLE_ROWS, WHOLE_ROWS)
    before = tl.where(bottom, WHOLE_ROWS * COLS, 0) + tl.where(right, strip * WHOLE_COLS, 0)
    i = tl.where(bottom, row - WHOLE_ROWS, row)
    j = tl.where(right, col - WHOLE_COLS, col)
    window = (sample * down + i // height) * across + j // width
    return samples * FRAMES * before + (window * FRAMES + frame) * height * width + i % height * width + j % width
