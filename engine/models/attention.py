"""Self-attention inside a frame or a window, and cross-attention to text. Plain PyTorch; the reference for faster paths.

Which implementation of attention runs is PyTorch's choice, or that of `Backends` (paths.py makes them from measurements).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import attend as attend_by
from ...kernels.caption_attention import caption_attention
from .float8 import Linear
from .geometry import WINDOW, Geometry
from .rope import apply_rope


class Backends(NamedTuple):
    """Implementations of attention by name (kernels/attention.py); None leaves the choice to PyTorch."""

    frames: str | None = None
    windows: tuple[str | None, ...] = (None,) * 4
    """Of each region of equal windows, in the order of `windowed_attention`."""
    cross: str | None = None
    """Of attention to a caption without mask."""


DEFAULT = Backends()
STRETCH = 256  # queries, at least, that one block of a backward goes through


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, statistics in float32, cast back, then times the weight (the official order of rounding)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    """Multi-head self-attention with RMS-normalised, rotated queries and keys; `windowed` chooses how tokens are grouped.

    Not windowed ("spatial"): one sequence a frame. Windowed ("temporal"): 8 x 8 tokens by all frames, not shifted; windows at
    the right and bottom edge keep their true size, which equals the official zero padding with masked keys.
    """

    def __init__(self, dim: int, heads: int, windowed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.windowed = windowed
        self.turns_back = False
        """Whether the kernels' backward may do with the rotated queries and keys (kernels/qk_norm_rope.py); `use_paths` says."""
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // heads)
        self.k_norm = RMSNorm(dim // heads)
        self.proj = Linear(dim, dim)

    def forward(self, x_BND: Tensor, geometry: Geometry, backends: Backends = DEFAULT) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, N, H, d]
        q, k = self.q_norm(q), self.k_norm(k)
        grid = (geometry.frames, geometry.rows, geometry.cols)
        if self.windowed:
            cos, sin = geometry.window_cos, geometry.window_sin
            q, k, v = (t.unflatten(1, grid) for t in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
            out = windowed_attention(q, k, v, backends.windows).flatten(1, 3)
        else:
            q, k, v = (t.unflatten(1, (geometry.frames, -1)).flatten(0, 1) for t in (q, k, v))  # [B * T, S, H, d]
            cos, sin = geometry.spatial_cos, geometry.spatial_sin
            out = attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, backend=backends.frames)
            out = out.unflatten(0, (-1, geometry.frames)).flatten(1, 2)
        return self.proj(out.flatten(2))


def attend(
    q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head, [B, N, H, d]; mask: [B, 1, 1, L] bool, True where a key may be seen.

    With a mask the choice is PyTorch's: few implementations take one.
    """
    if backend is not None and mask is None:
        return attend_by(q_BNHD, k_BLHD, v_BLHD, backend)
    q, k, v = (t.transpose(1, 2) for t in (q_BNHD, k_BLHD, v_BLHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attend_to_few(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: Tensor | None, backend: str | None) -> Tensor:
    """`attend` of many queries to a caption's few keys. The backward of flash attention runs one block a head and block of keys, 16
    on a whole card for one caption; stretches of queries as a batch give it more to do at once."""
    parts = _equal_parts(q_BNHD.shape[1])
    if backend is None or mask is not None or parts == 1 or not torch.is_grad_enabled():
        return attend(q_BNHD, k_BLHD, v_BLHD, mask, backend)
    q = q_BNHD.unflatten(1, (parts, -1)).flatten(0, 1)
    k, v = (t.unsqueeze(1).expand(-1, parts, -1, -1, -1).flatten(0, 1) for t in (k_BLHD, v_BLHD))
    return attend(q, k, v, backend=backend).unflatten(0, (-1, parts)).flatten(1, 2)


def _equal_parts(queries: int) -> int:
    """The most equal parts of at least STRETCH queries."""
    parts = max(1, queries // STRETCH)
    while queries % parts:
        parts -= 1
    return parts


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, backends: tuple[str | None, ...] = DEFAULT.windows) -> Tensor:
    """Attention inside windows of 8 x 8 tokens by all frames; q, k, v and the result are [B, T, rows, cols, H, d].

    The grid falls into at most four regions of equal windows: the whole ones, a bottom strip, a right strip and a corner.
    """
    rows, cols = q.shape[2:4]
    strips, names = [], iter(backends)
    for top, bottom in _regions(rows):
        parts = [
            _region_attention([t[:, :, top:bottom, left:right] for t in (q, k, v)], next(names))
            for left, right in _regions(cols)
        ]
        strips.append(torch.cat(parts, dim=3) if len(parts) > 1 else parts[0])
    return torch.cat(strips, dim=2) if len(strips) > 1 else strips[0]


def _regions(size: int) -> list[tuple[int, int]]:
    """Where whole windows lie along an axis, and the remainder at its end."""
    whole = size // WINDOW * WINDOW
    return [(a, b) for a, b in ((0, whole), (whole, size)) if b > a]


def _region_attention(qkv: list[Tensor], backend: str | None) -> Tensor:
    """Attention in a region that is a whole number of equal windows; q, k, v and the result are [B, T, rows, cols, H, d]."""
    B, T, rows, cols, H, d = qkv[0].shape
    window_rows, window_cols = min(rows, WINDOW), min(cols, WINDOW)
    down, across = rows // window_rows, cols // window_cols

    def to_windows(t: Tensor) -> Tensor:
        t = t.reshape(B, T, down, window_rows, across, window_cols, H, d)
        return t.permute(0, 2, 4, 1, 3, 5, 6, 7).reshape(B * down * across, T * window_rows * window_cols, H, d)

    q, k, v = (to_windows(t) for t in qkv)
    out = attend(q, k, v, backend=backend)
    out = out.reshape(B, down, across, T, window_rows, window_cols, H, d).permute(0, 3, 1, 4, 2, 5, 6, 7)
    return out.reshape(B, T, rows, cols, H, d)


@dataclass(frozen=True)
class TextStates:
    """Keys and values of a caption for every layer, [B, L, H, d] each, and which tokens count, [B, 1, 1, L] (None: all).

    They depend on the caption and the weights alone, so sampling computes them once, not once a step.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None

    def at(self, layer: int) -> "LayerText":
        """What one layer sees."""
        return LayerText(self.keys[layer], self.values[layer], self.mask)

    def mark_length(self) -> None:
        """Tell the compiler that the number of tokens varies: captions of other lengths then share one graph."""
        for tensor in (*self.keys, *self.values):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        if self.mask is not None:
            torch._dynamo.maybe_mark_dynamic(self.mask, 3)


class LayerText(NamedTuple):
    """Keys and values of a caption for one layer, [B, L, H, d], and the mask of `TextStates`."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None


def joined(texts: Sequence[TextStates]) -> list[Tensor]:
    """The tensors of two captions' states, for `apart`."""
    masks = [text.mask for text in texts if text.mask is not None]
    return [*(tensor for text in texts for tensor in (*text.keys, *text.values)), *masks]


def apart(tensors: Sequence[Tensor], layers: int) -> tuple[TextStates, TextStates]:
    """The two captions' states that `joined` was given, of a network of so many layers."""
    masks = tensors[4 * layers :] or (None, None)
    first, second = (
        TextStates(tuple(tensors[start : start + layers]), tuple(tensors[start + layers : start + 2 * layers]), mask)
        for start, mask in zip((0, 2 * layers), masks, strict=True)
    )
    return first, second


class CrossAttention(nn.Module):
    """Every token attends to its sample's caption; no norm of queries and keys, no rotary embedding."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = Linear(dim, dim)
        self.kv_linear = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def keys_values(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a projected caption, [B, L, H, d] each."""
        k, v = self.kv_linear(text_BLD).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return k, v

    def forward(
        self,
        x_BND: Tensor,
        text: LayerText,
        known_text: LayerText | None,
        geometry: Geometry,
        backends: Backends = DEFAULT,
    ) -> Tensor:
        q = self.q_linear(x_BND).unflatten(-1, (self.heads, -1))
        others = known_text if geometry.known else None
        if backends.cross == "triton" and text.mask is None and (others is None or others.mask is None):
            keys, values, split = (
                (None, None, 0) if others is None else (others.keys, others.values, geometry.known_tokens)
            )
            out = caption_attention(q, text.keys, text.values, keys, values, split)
        elif known_text is None or geometry.known == 0:
            out = attend_to_few(q, text.keys, text.values, text.mask, backends.cross)
        else:
            split = geometry.known_tokens
            k, v = (t.expand(q.shape[0], -1, -1, -1) for t in (known_text.keys, known_text.values))
            known = attend_to_few(q[:, :split], k, v, known_text.mask, backends.cross)
            rest = attend_to_few(q[:, split:], text.keys, text.values, text.mask, backends.cross)
            out = torch.cat([known, rest], dim=1)
        return self.proj(out.flatten(2))
