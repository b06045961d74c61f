"""Gradients of a modulated layer norm, from its input and two numbers a row: for norm_modulate.py and what is built on its forward.

The gradient of x takes one pass. Where x goes on beside the norm, as a residual stream does, the gradient that comes back that way is
added in the same pass, in float32.
Axes: B samples, N tokens, D channels, R columns that a rank takes (common.padded_rank).
"""

import torch
import triton.language as tl
from torch import Tensor

from .column_sums import column_sums
from .common import SMALLEST_DOT, block_for, cdiv, head_and_rest, jit, padded_rank, splits_for

BLOCK_D = 128  # 1152 is nine of them


@jit
def _gradient_tile(
    dout_ptr, x_ptr, scale_ptr, down_ptr, sample, row, real, d, dlow, mean, rstd, rank, D: tl.constexpr, R: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Of some channels: the gradient that reaches n (its own part, and what comes back through A), the same before the modulation,
    LN(x), and which of them are real. Zero elsewhere."""
    inside = real[:, None] & (d < D)[None, :]
    dout = tl.load(dout_ptr + row[:, None] * P + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        r = tl.arange(0, R)
        a = tl.load(down_ptr + r[:, None] * D + d[None, :], mask=(r < rank)[:, None] & (d < D)[None, :], other=0.0)
        dout += tl.dot(dlow, a, input_precision="ieee")
    x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
    return dout, dout * (1.0 + scale)[None, :], tl.where(inside, (x - mean) * rstd, 0.0), inside


@jit
def _input_gradient_kernel(
    dout_ptr, dlow_ptr, beside_ptr, x_ptr, scale_ptr, down_ptr, mean_ptr, rstd_ptr, dx_ptr, dshift_ptr, dscale_ptr, N, rank,
    D: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr, R: tl.constexpr, P: tl.constexpr, LOW: tl.constexpr,
    VECTORS: tl.constexpr, BESIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of `dout` are P columns apart, those of `dlow` LOW."""
    sample = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = sample * N + n
    real = n < N
    mean = tl.load(mean_ptr + row, mask=real, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + row, mask=real, other=0.0)[:, None]
    dlow = 0.0
    if R > 0:
        dlow = tl.load(dlow_ptr + row[:, None] * LOW + tl.arange(0, R)[None, :], mask=real[:, None], other=0.0)
    # Whole rows in registers, read once.
    h, t = tl.arange(0, HEAD), HEAD + tl.arange(0, REST)
    dout_h, g_h, x_h, inside_h = _gradient_tile(
        dout_ptr, x_ptr, scale_ptr, down_ptr, sample, row, real, h, dlow, mean, rstd, rank, D, R, P
    )
    dout_t, g_t, x_t, inside_t = _gradient_tile(
        dout_ptr, x_ptr, scale_ptr, down_ptr, sample, row, real, t, dlow, mean, rstd, rank, D, R, P
    )
    mean_g = ((tl.sum(g_h, 1) + tl.sum(g_t, 1)) / D)[:, None]
    mean_gx = ((tl.sum(g_h * x_h, 1) + tl.sum(g_t * x_t, 1)) / D)[:, None]
    # The head is written before the tail is made, so that registers hold one of them at a time.
    dx, beside = dx_ptr + row[:, None] * D, beside_ptr + row[:, None] * D
    dx_h = rstd * (g_h - mean_g - x_h * mean_gx)
    if BESIDE:
        dx_h += tl.load(beside + h[None, :], mask=inside_h, other=0.0).to(tl.float32)
    tl.store(dx + h[None, :], dx_h.to(dx_ptr.dtype.element_ty), mask=inside_h)
    dx_t = rstd * (g_t - mean_g - x_t * mean_gx)
    if BESIDE:
        dx_t += tl.load(beside + t[None, :], mask=inside_t, other=0.0).to(tl.float32)
    tl.store(dx + t[None, :], dx_t.to(dx_ptr.dtype.element_ty), mask=inside_t)
    if VECTORS:
        block = (sample * tl.num_programs(0) + tl.program_id(0)) * D
        tl.store(dshift_ptr + block + h, tl.sum(dout_h, 0), mask=h < D)
        tl.store(dshift_ptr + block + t, tl.sum(dout_t, 0), mask=t < D)
        tl.store(dscale_ptr + block + h, tl.sum(dout_h * x_h, 0), mask=h < D)
        tl.store(dscale_ptr + block + t, tl.sum(dout_t * x_t, 0), mask=t < D)


@jit
def _down_gradient_kernel(
    dlow_ptr, x_ptr, shift_ptr, scale_ptr, mean_ptr, rstd_ptr, ddown_ptr, N, rows_each,
    D: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Part of dA = (d low)^T n over `rows_each` rows; n is made again from x, so that it need not be kept."""
    split = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, R)
    scale = 1.0 + tl.load(scale_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros((R, BLOCK_D), tl.float32)
    for start in range(split * rows_each, tl.minimum((split + 1) * rows_each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        real = n < N
        row = sample * N + n
        dlow = tl.load(dlow_ptr + row[:, None] * LOW + r, mask=real[:, None], other=0.0)
        x = tl.load(x_ptr + row[:, None] * D + d, mask=real[:, None] & (d < D), other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=real, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=real, other=0.0)[:, None]
        out = ((x - mean) * rstd * scale + shift).to(dlow.dtype)
        total += tl.dot(tl.trans(dlow), out, input_precision="ieee")
    part = sample * tl.num_programs(1) + split
    tl.store(ddown_ptr + (part * R + r[:, None]) * D + d, total, mask=d < D)


def _input_gradient(
    dout: Tensor, dlow: Tensor, beside: Tensor | None, x: Tensor, scale: Tensor, down: Tensor | None, mean: Tensor,
    rstd: Tensor, vectors: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dout: [B, N, at least D], dlow: [B, N, R], either with columns of the other beside it."""
    B, N, D = x.shape
    R = 0 if down is None else padded_rank(down.shape[0])
    head, rest = (max(SMALLEST_DOT, size) for size in head_and_rest(D))
    rows, warps = (16, 8) if R else (8, 8) if vectors else (4, 4)
    programs = cdiv(N, rows)
    dx = torch.empty_like(x)
    # Every program writes sums of its own, and they are added in one fixed order: same inputs, same bits.
    dshift, dscale = (x.new_empty(B, programs if vectors else 1, D, dtype=torch.float32) for _ in range(2))
    _input_gradient_kernel[(programs, B)](
        dout, dlow, x if beside is None else beside, x, scale, x if down is None else down, mean, rstd, dx, dshift, dscale,
        N, 0 if down is None else down.shape[0],
        D=D, HEAD=head, REST=rest, R=R, P=dout.stride(1), LOW=dlow.stride(1), VECTORS=vectors, BESIDE=beside is not None,
        BLOCK_N=rows, num_warps=warps,
    )  # fmt: skip
    if not vectors:
        return dx, None, None
    return dx, column_sums(dshift, x.dtype).unsqueeze(1), column_sums(dscale, x.dtype).unsqueeze(1)


def _down_gradient(
    dlow: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, rank: int
) -> Tensor:
    """[r, D] in float32."""
    B, N, D = x.shape
    R = padded_rank(rank)
    blocks = {"BLOCK_N": 64, "BLOCK_D": block_for(D, BLOCK_D), "num_warps": 4}
    across = cdiv(D, blocks["BLOCK_D"])
    splits = splits_for(N, across * B, blocks["BLOCK_N"])
    rows_each = cdiv(cdiv(N, splits), blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    parts = x.new_empty(B * splits, R, D, dtype=torch.float32)
    _down_gradient_kernel[(across, splits, B)](
        dlow, x, shift, scale, mean, rstd, parts, N, rows_each, D=D, R=R, LOW=dlow.stride(1), **blocks
    )
    return column_sums(parts.flatten(1)).view(R, D)[:rank]


def norm_gradients(
    dout: Tensor, dlow: Tensor, beside: Tensor | None, x: Tensor, shift: Tensor, scale: Tensor, down: Tensor | None,
    mean: Tensor, rstd: Tensor, vectors: bool, downs: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x; of shift and scale with `vectors`; of down with `downs`, in float32.

    dout: of n, [B, N, at least D], and dlow: of its projection, [B, N, R]; channels contiguous in both, rows as far apart in each
    sample as at its end. beside: the gradient of x from elsewhere, which x's then includes, contiguous; or None. The rest: as the
    forward took and made it.
    """
    dx, dshift, dscale = _input_gradient(dout, dlow, beside, x, scale, down, mean, rstd, vectors)
    ddown = None
    if downs:
        assert down is not None
        ddown = _down_gradient(dlow, x, shift, scale, mean, rstd, down.shape[0])
    return dx, dshift, dscale, ddown
