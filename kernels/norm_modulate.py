"""A residual sum, its layer norm, modulation and, if wanted, a low-rank down projection of the result, in one read of the stream.

s = x + h, rounded as a sum of its own would be, or x itself; its modulated norm is
n = LN(x) * (1 + scale) + shift, without affine parameters (STDiT3's `layer_norm`). With a down projection A the output is
[n, n A^T, 0]: n and its rank-r projection side by side, ready for one matrix product with [W, s B] (lora_linear.py), which
so gets its low-rank part for 1 + r / D of the plain product. Saved for the backward: s, two numbers a row, the vectors; not n.
The stream goes on as s, so the backward adds the gradient that comes back along it to the norm's own, in the same pass
(norm_gradients.py): the gradient of x, and of h.
For a product in float8 n is written as e4m3 values with a scale a row (quantize_rows.py), rounded once, and never in 16 bits; its
projection is still of n in x's dtype, not of these values.
Axes: B samples, N tokens, D channels, R columns that a rank takes (common.padded_rank), P columns of a row in float8.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .common import block_for, cdiv, check, check_runs, jit, padded_rank
from .norm_gradients import norm_gradients
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


def add_norm_modulate_reference(
    x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, down: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As `add_norm_modulate`, in whatever dtype the inputs have."""
    s = x if h is None else x + h
    return s, norm_modulate_reference(s, shift, scale, down, eps)


def norm_quantize_reference(
    x: Tensor, shift: Tensor, scale: Tensor, down: Tensor | None = None, multiple: int = 1, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """As `add_norm_quantize` has it of s, from n in its dtype."""
    n = norm_modulate_reference(x, shift, scale, down, eps)
    D = x.shape[-1]
    return *quantize_rows_reference(n[..., :D], multiple=multiple), n[..., D:]


@jit
def _stream(x_ptr, h_ptr, at, inside, ADD: tl.constexpr):
    """s in its own dtype, zero outside. Added anew wherever it is needed: what this program stored need not be seen by all its threads."""
    s = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ADD:
        h = tl.load(h_ptr + at, mask=inside, other=0.0)
        s = (s.to(tl.float32) + h.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return s


@jit
def _modulated(s, shift_ptr, scale_ptr, inside, sample, d, mean, rstd, D: tl.constexpr):
    """n in one block of channels, in float32, zero outside."""
    scale = tl.load(scale_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
    return tl.where(inside, (s.to(tl.float32) - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift, 0.0)


@jit
def _forward_kernel(
    x_ptr, h_ptr, sum_ptr, shift_ptr, scale_ptr, down_ptr, out_ptr, low_ptr, scales_ptr, mean_ptr, rstd_ptr, N, rank,
    D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, ADD: tl.constexpr, FLOAT8: tl.constexpr, LOW: tl.constexpr,
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
        inside = real[:, None] & (d < D)
        s = _stream(x_ptr, h_ptr, row[:, None] * D + d, inside, ADD).to(tl.float32)
        total += tl.sum(s, 1)
    mean = total / D
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = real[:, None] & (d < D)
        s = _stream(x_ptr, h_ptr, row[:, None] * D + d, inside, ADD).to(tl.float32)
        centred = tl.where(inside, s - mean[:, None], 0.0)
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
        inside = real[:, None] & (d < D)
        s = _stream(x_ptr, h_ptr, row[:, None] * D + d, inside, ADD)
        if ADD:
            # Not earlier: before the first store the compiler has rows that are read again stay in registers.
            tl.store(sum_ptr + row[:, None] * D + d, s, mask=inside)
        wide = _modulated(s, shift_ptr, scale_ptr, inside, sample, d, mean, rstd, D)
        out = wide.to(x_ptr.dtype.element_ty)
        if FLOAT8:
            largest = tl.maximum(largest, tl.max(tl.abs(wide), 1))
        else:
            tl.store(out_ptr + row[:, None] * P + d, out, mask=inside)
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
            inside = real[:, None] & (d < D)
            s = _stream(x_ptr, h_ptr, row[:, None] * D + d, inside, ADD)
            wide = _modulated(s, shift_ptr, scale_ptr, inside, sample, d, mean, rstd, D)
            values = (wide * inverse[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * P + d, values, mask=real[:, None] & (d < P))


def _blocks(D: int, down: bool) -> dict[str, int]:
    return {"BLOCK_N": BLOCK_N if down else BLOCK_N // 2, "BLOCK_D": block_for(D, BLOCK_D), "num_warps": WARPS}


def _launch(
    x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, down: Tensor | None, out: Tensor, low: Tensor,
    scales: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Write n to out [B, N, at least D] and its projection to low [B, N, R]; with scales [B, N, 1] n in float8. s, which is x itself
    without h, and the mean and 1 / std of each of its rows."""
    B, N, D = x.shape
    s = x if h is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(B, N, dtype=torch.float32) for _ in range(2))
    blocks = _blocks(D, down is not None)
    if scales is not None and down is not None:
        blocks["num_warps"] *= 2  # or a thread takes all registers that there are
    _forward_kernel[(cdiv(N, blocks["BLOCK_N"]), B)](
        x, x if h is None else h, s, shift, scale, x if down is None else down, out, low, mean if scales is None else scales,
        mean, rstd, N, 0 if down is None else down.shape[0],
        D=D, R=0 if down is None else padded_rank(down.shape[0]), P=out.shape[2], ADD=h is not None,
        FLOAT8=scales is not None, LOW=low.stride(1), MOST=LARGEST, LEAST=SMALLEST, EPS=eps, **blocks,
    )  # fmt: skip
    return s, mean, rstd


def _forward(
    x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, down: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n with its projection, s, mean and 1 / std; of contiguous tensors."""
    B, N, D = x.shape
    out = x.new_empty(B, N, D + (0 if down is None else padded_rank(down.shape[0])))
    return out, *_launch(x, h, shift, scale, down, out, out[..., D:], None, eps)


def unused_is_none(ctx: Any) -> None:
    """Have the backward see None for a result that was not used, rather than zeros to read. A compiler traces what it has anyway."""
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


class _AddNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, down: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        unused_is_none(ctx)
        x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
        cast = None if down is None else down.to(x.dtype).contiguous()
        out, s, mean, rstd = _forward(x, None if h is None else h.contiguous(), shift, scale, cast, eps)
        ctx.save_for_backward(s, shift, scale, cast, mean, rstd)
        ctx.down_dtype = None if down is None else down.dtype
        return x.view_as(x) if h is None else s, out

    @staticmethod
    def backward(ctx: Any, ds: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        s, shift, scale, down, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if dout is None:
            return ds, ds if needs[1] else None, None, None, None, None
        dout, ds = dout.contiguous(), None if ds is None else ds.contiguous()
        dx, dshift, dscale, ddown = norm_gradients(
            dout, dout[..., s.shape[2] :], ds, s, shift, scale, down, mean, rstd, needs[2] or needs[3], needs[4]
        )
        return dx, dx if needs[1] else None, dshift, dscale, None if ddown is None else ddown.to(ctx.down_dtype), None


def norm_modulate(
    x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, down_rD: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """LN(x) * (1 + scale) + shift, and beside it its projection by `down`; differentiable in all four.

    x: [B, N, D]; shift, scale: [B, 1, D], x's dtype. down: [r, D], any float dtype (it computes in x's), r from 1 to 64.
    Returns [B, N, D], or with `down` [B, N, D + R]: columns D to D + r - 1 hold the projection, the rest are zero.
    Raises ValueError when shapes, dtypes or devices disagree.
    """
    _check("norm_modulate", x_BND, None, shift_B1D, scale_B1D, down_rD)
    return _AddNormModulate.apply(x_BND, None, shift_B1D, scale_B1D, down_rD, eps)[1]  # type: ignore[index]


def add_norm_modulate(
    x_BND: Tensor,
    h_BND: Tensor | None,
    shift_B1D: Tensor,
    scale_B1D: Tensor,
    down_rD: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """s = x + h, and norm_modulate(s, shift, scale, down, eps): the bits of both, in one pass; differentiable in all five.

    h: as x, or None: then s is a view of x, and what is gained is in the backward, where the gradient of s and the norm's are added in
    one pass. Go on with s, not with x. x and h get one gradient, in the same tensor. The rest as in `norm_modulate`.
    """
    _check("add_norm_modulate", x_BND, h_BND, shift_B1D, scale_B1D, down_rD)
    return _AddNormModulate.apply(x_BND, h_BND, shift_B1D, scale_B1D, down_rD, eps)  # type: ignore[return-value]


def add_norm_quantize(
    x_BND: Tensor,
    h_BND: Tensor | None,
    shift_B1D: Tensor,
    scale_B1D: Tensor,
    down_rD: Tensor | None = None,
    multiple: int = 1,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """s = x + h, and n = LN(s) * (1 + scale) + shift as `quantize_rows` writes it, of n before it is rounded to x's dtype; without
    gradients.

    Inputs as in `add_norm_modulate`, and without h s is x. Returns s, values [B, N, P] float8_e4m3fn, scales [B, N, 1] float32, the
    projection of n by `down` [B, N, R] in x's dtype (R = 0 without it), mean and 1 / std of each row of s, [B, N] float32. P: the next
    multiple of `multiple` from D on. Raises ValueError when shapes, dtypes or devices disagree.
    """
    _check("add_norm_quantize", x_BND, h_BND, shift_B1D, scale_B1D, down_rD)
    x, shift, scale = (t.contiguous() for t in (x_BND, shift_B1D, scale_B1D))
    h = None if h_BND is None else h_BND.contiguous()
    down = None if down_rD is None else down_rD.to(x.dtype).contiguous()
    B, N, D = x.shape
    values = x.new_empty(B, N, padded(D, multiple), dtype=torch.float8_e4m3fn)
    scales = x.new_empty(B, N, 1, dtype=torch.float32)
    low = x.new_empty(B, N, 0 if down is None else padded_rank(down.shape[0]))
    s, mean, rstd = _launch(x, h, shift, scale, down, values, low, scales, eps)
    return s, values, scales, low, mean, rstd


def _check(name: str, x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, down: Tensor | None) -> None:
    B, _, D = x.shape
    check_runs(name, x, shift, scale, *([] if h is None else [h]))
    check(h is None or h.shape == x.shape, f"{name}: h is {h is not None and list(h.shape)}, x {list(x.shape)}")
    for what, vector in (("shift", shift), ("scale", scale)):
        check(vector.shape == (B, 1, D), f"{name}: {what} is {list(vector.shape)}, x needs {[B, 1, D]}")
    if down is not None:
        check(
            down.ndim == 2 and down.shape[1] == D and down.device == x.device,
            f"{name}: down is {list(down.shape)} on {down.device}, x needs [r, {D}] on {x.device}",
        )
        padded_rank(down.shape[0])
