"""Layer norm, modulation and, if wanted, a low-rank down projection of the result, in one read of the residual stream.

n = LN(x) * (1 + scale) + shift, without affine parameters (STDiT3's `layer_norm`). With a down projection A the output is
[n, n A^T, 0]: n and its rank-r projection side by side, ready for one matrix product with [W, s B] (lora_linear.py), which
so gets its low-rank part for 1 + r / D of the plain product. Saved for the backward: x, two numbers a row, the vectors; not n.
For a product in float8 n is written as e4m3 values with a scale a row (quantize_rows.py), rounded once, and never in 16 bits; its
projection is still of n in x's dtype, not of these values.
Axes: B samples, N tokens, D channels, R columns that a rank takes (common.padded_rank), P columns of a row in float8.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .column_sums import column_sums
from .common import SMALLEST_DOT, block_for, cdiv, check, check_runs, head_and_rest, jit, padded_rank, splits_for
from .quantize_rows import LARGEST, SMALLEST, padded, quantize_rows_reference, row_scale

BLOCK_N = 16  # rows of a program, with a down projection; half of them without
BLOCK_D = 128  # 1152 is nine of them
WARPS = 4


def norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, down: Tensor | None = None, eps: float = 1e-6):
    """The mathematics, in whatever dtype the inputs have. down: [r, D] in the dtype it computes in."""
    n = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
    if down is None:
        return n
    down = down.to(n.dtype)
    return torch.cat([n, F.pad(F.linear(n, down), (0, padded_rank(down.shape[0]) - down.shape[0]))], dim=-1)


def norm_quantize_reference(
    x: Tensor, shift: Tensor, scale: Tensor, down: Tensor | None = None, multiple: int = 1, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norm_quantize`, from n in x's dtype."""
    n = norm_modulate_reference(x, shift, scale, down, eps)
    D = x.shape[-1]
    return *quantize_rows_reference(n[..., :D], multiple=multiple), n[..., D:]


@jit
def _modulated(
    x_ptr, shift_ptr, scale_ptr, row, real, sample, d, mean, rstd, D: tl.constexpr,
):  # fmt: skip
    """n in one block of channels, in float32, zero outside. The rows come from the cache, where the mean was made of them."""
    inside = real[:, None] & (d < D)
    x = tl.load(x_ptr + row[:, None] * D + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
    return tl.where(inside, (x - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift, 0.0)


@jit
def _forward_kernel(
    x_ptr, shift_ptr, scale_ptr, down_ptr, out_ptr, low_ptr, scales_ptr, mean_ptr, rstd_ptr, N, rank,
    D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, FLOAT8: tl.constexpr, LOW: tl.constexpr,
    MOST: tl.constexpr, LEAST: tl.constexpr, EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of `out` are P columns apart, those of `low` LOW."""
    sample = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = sample * N + n
    real = n < N
    # The rows are read from memory once; later they come from the cache.
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row[:, None] * D + d, mask=real[:, None] & (d < D), other=0.0).to(tl.float32)
        total += tl.sum(x, 1)
    mean = total / D
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = real[:, None] & (d < D)
        x = tl.load(x_ptr + row[:, None] * D + d, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - mean[:, None], 0.0)
        total += tl.sum(centred * centred, 1)
    rstd = tl.rsqrt(total / D + EPS)
    tl.store(mean_ptr + row, mean, mask=real)
    tl.store(rstd_ptr + row, rstd, mask=real)
    if R > 0:
        r = tl.arange(0, R)
        low = tl.zeros((BLOCK_N, R), tl.float32)
    if FLOAT8:
        largest = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        wide = _modulated(x_ptr, shift_ptr, scale_ptr, row, real, sample, d, mean, rstd, D)
        out = wide.to(x_ptr.dtype.element_ty)
        if FLOAT8:
            largest = tl.maximum(largest, tl.max(tl.abs(wide), 1))
        else:
            tl.store(out_ptr + row[:, None] * P + d, out, mask=real[:, None] & (d < D))
        if R > 0:
            a = tl.load(down_ptr + r[None, :] * D + d[:, None], mask=(d[:, None] < D) & (r < rank), other=0.0)
            low += tl.dot(out, a, input_precision="ieee")
    if R > 0:
        tl.store(low_ptr + row[:, None] * LOW + r, low.to(low_ptr.dtype.element_ty), mask=real[:, None])
    if FLOAT8:
        inverse, of_row = row_scale(largest, MOST, LEAST)
        tl.store(scales_ptr + row, of_row, mask=real)
        for start in tl.static_range(0, P, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            wide = _modulated(x_ptr, shift_ptr, scale_ptr, row, real, sample, d, mean, rstd, D)
            values = (wide * inverse[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * P + d, values, mask=real[:, None] & (d < P))


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
    dout_ptr, dlow_ptr, x_ptr, scale_ptr, down_ptr, mean_ptr, rstd_ptr, dx_ptr, dshift_ptr, dscale_ptr, N, rank,
    D: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr, R: tl.constexpr, P: tl.constexpr, LOW: tl.constexpr,
    VECTORS: tl.constexpr, BLOCK_N: tl.constexpr,
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
    dx = dx_ptr + row[:, None] * D
    tl.store(dx + h[None, :], (rstd * (g_h - mean_g - x_h * mean_gx)).to(dx_ptr.dtype.element_ty), mask=inside_h)
    tl.store(dx + t[None, :], (rstd * (g_t - mean_g - x_t * mean_gx)).to(dx_ptr.dtype.element_ty), mask=inside_t)
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


def _blocks(D: int, down: bool) -> dict[str, int]:
    return {"BLOCK_N": BLOCK_N if down else BLOCK_N // 2, "BLOCK_D": block_for(D, BLOCK_D), "num_warps": WARPS}


def _launch(
    x: Tensor, shift: Tensor, scale: Tensor, down: Tensor | None, out: Tensor, low: Tensor, scales: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write n to out [B, N, at least D] and its projection to low [B, N, R]; with scales [B, N, 1] n in float8. The mean and 1 / std
    of each row."""
    B, N, D = x.shape
    mean, rstd = (x.new_empty(B, N, dtype=torch.float32) for _ in range(2))
    blocks = _blocks(D, down is not None)
    if scales is not None and down is not None:
        blocks["num_warps"] *= 2  # or a thread takes all registers that there are
    _forward_kernel[(cdiv(N, blocks["BLOCK_N"]), B)](
        x, shift, scale, x if down is None else down, out, low, mean if scales is None else scales, mean, rstd, N,
        0 if down is None else down.shape[0], D=D, R=0 if down is None else padded_rank(down.shape[0]), P=out.shape[2],
        FLOAT8=scales is not None, LOW=low.stride(1), MOST=LARGEST, LEAST=SMALLEST, EPS=eps, **blocks,
    )  # fmt: skip
    return mean, rstd


def _forward(x: Tensor, shift: Tensor, scale: Tensor, down: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    B, N, D = x.shape
    out = x.new_empty(B, N, D + (0 if down is None else padded_rank(down.shape[0])))
    return out, *_launch(x, shift, scale, down, out, out[..., D:], None, eps)


def _input_gradient(
    dout: Tensor, dlow: Tensor, x: Tensor, scale: Tensor, down: Tensor | None, mean: Tensor, rstd: Tensor, vectors: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
        dout, dlow, x, scale, x if down is None else down, mean, rstd, dx, dshift, dscale,
        N, 0 if down is None else down.shape[0],
        D=D, HEAD=head, REST=rest, R=R, P=dout.stride(1), LOW=dlow.stride(1), VECTORS=vectors, BLOCK_N=rows, num_warps=warps,
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
    dout: Tensor, dlow: Tensor, x: Tensor, shift: Tensor, scale: Tensor, down: Tensor | None, mean: Tensor, rstd: Tensor,
    vectors: bool, downs: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x; of shift and scale with `vectors`; of down with `downs`, in float32.

    dout: of n, [B, N, at least D], and dlow: of its projection, [B, N, R]; channels contiguous in both, rows as far apart in each
    sample as at its end. The rest: as the forward took and made it.
    """
    dx, dshift, dscale = _input_gradient(dout, dlow, x, scale, down, mean, rstd, vectors)
    ddown = None
    if downs:
        assert down is not None
        ddown = _down_gradient(dlow, x, shift, scale, mean, rstd, down.shape[0])
    return dx, dshift, dscale, ddown


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, down: Tensor | None, eps: float) -> Tensor:
        x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
        cast = None if down is None else down.to(x.dtype).contiguous()
        out, mean, rstd = _forward(x, shift, scale, cast, eps)
        ctx.save_for_backward(x, shift, scale, cast, mean, rstd)
        ctx.down_dtype = None if down is None else down.dtype
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, down, mean, rstd = ctx.saved_tensors
        dout = dout.contiguous()
        needs = ctx.needs_input_grad
        dx, dshift, dscale, ddown = norm_gradients(
            dout, dout[..., x.shape[2] :], x, shift, scale, down, mean, rstd, needs[1] or needs[2], needs[3]
        )
        return dx, dshift, dscale, None if ddown is None else ddown.to(ctx.down_dtype), None


def norm_modulate(
    x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, down_rD: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """LN(x) * (1 + scale) + shift, and beside it its projection by `down`; differentiable in all four.

    x: [B, N, D]; shift, scale: [B, 1, D], x's dtype. down: [r, D], any float dtype (it computes in x's), r from 1 to 64.
    Returns [B, N, D], or with `down` [B, N, D + R]: columns D to D + r - 1 hold the projection, the rest are zero.
    Raises ValueError when shapes, dtypes or devices disagree.
    """
    _check("norm_modulate", x_BND, shift_B1D, scale_B1D, down_rD)
    return _NormModulate.apply(x_BND, shift_B1D, scale_B1D, down_rD, eps)  # type: ignore[return-value]


def norm_quantize(
    x_BND: Tensor,
    shift_B1D: Tensor,
    scale_B1D: Tensor,
    down_rD: Tensor | None = None,
    multiple: int = 1,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """n = LN(x) * (1 + scale) + shift as `quantize_rows` writes it, of n before it is rounded to x's dtype; without gradients.

    Inputs as in `norm_modulate`. Returns values [B, N, P] float8_e4m3fn, scales [B, N, 1] float32, the projection of n by `down`
    [B, N, R] in x's dtype (R = 0 without it), mean and 1 / std of each row of x, [B, N] float32. P: the next multiple of `multiple`
    from D on. Raises ValueError when shapes, dtypes or devices disagree.
    """
    _check("norm_quantize", x_BND, shift_B1D, scale_B1D, down_rD)
    x, shift, scale = (t.contiguous() for t in (x_BND, shift_B1D, scale_B1D))
    down = None if down_rD is None else down_rD.to(x.dtype).contiguous()
    B, N, D = x.shape
    values = x.new_empty(B, N, padded(D, multiple), dtype=torch.float8_e4m3fn)
    scales = x.new_empty(B, N, 1, dtype=torch.float32)
    low = x.new_empty(B, N, 0 if down is None else padded_rank(down.shape[0]))
    return values, scales, low, *_launch(x, shift, scale, down, values, low, scales, eps)


def _check(name: str, x: Tensor, shift: Tensor, scale: Tensor, down: Tensor | None) -> None:
    B, _, D = x.shape
    check_runs(name, x, shift, scale)
    for what, vector in (("shift", shift), ("scale", scale)):
        check(vector.shape == (B, 1, D), f"{name}: {what} is {list(vector.shape)}, x needs {[B, 1, D]}")
    if down is not None:
        check(
            down.ndim == 2 and down.shape[1] == D and down.device == x.device,
            f"{name}: down is {list(down.shape)} on {down.device}, x needs [r, {D}] on {x.device}",
        )
        padded_rank(down.shape[0])
