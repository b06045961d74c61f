"""The trained linear layer of a modulated layer norm, y = n W^T + b with n = LN(x) * (1 + scale) + shift, which does not keep n.
The residual sum before the norm and the gradient of the stream beside it join as in norm_modulate.py.

With z = (x - mean) / std and P = dy^T z, one product, all gradients but x's are sums over weights and not over tokens:
    dW = P * (1 + scale) + (sum of dy) shift^T,    dscale = column sums of W * P,    dshift = (sum of dy) W.
So the backward makes z again in one pass over x, and needs no column sums over the tokens (norm_modulate.py writes and adds parts
of them for each block of rows). Operators of their own: a compiler would find z among what it may keep.
Axes: B samples, N tokens, D inputs, E outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .column_sums import column_sums
from .common import block_for, cdiv, check, check_runs, jit
from .norm_gradients import norm_gradients
from .norm_modulate import _forward, add_norm_modulate_reference, unused_is_none

BLOCK_E = 32
BLOCK_D = 64
ROWS = 64  # of the weight, that a program sums over


def norm_linear_reference(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6):
    """The mathematics, in whatever dtype the inputs have."""
    return add_norm_linear_reference(x, None, shift, scale, weight, bias, eps)[1]


def add_norm_linear_reference(
    x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As `add_norm_linear`, in whatever dtype the inputs have."""
    s, n = add_norm_modulate_reference(x, h, shift, scale, eps=eps)
    return s, F.linear(n, weight, bias)


@jit
def _weight_kernel(
    product_ptr, weight_ptr, sums_ptr, shift_ptr, scale_ptr, dweight_ptr, parts_ptr, samples, E,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dW, and parts of dshift and dscale over ROWS rows of the weight: parts [splits, samples, 2, D]."""
    split = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    for start in range(split * ROWS, tl.minimum((split + 1) * ROWS, E), BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        inside = (e < E)[:, None] & (d < D)
        at = e[:, None] * D + d  # a weight has fewer than 2**31 numbers
        total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        of_sample = product_ptr
        for sample in range(samples):
            product = tl.load(of_sample + at, mask=inside, other=0.0).to(tl.float32)
            sums = tl.load(sums_ptr + sample * E + e, mask=e < E, other=0.0)[:, None]
            shift = tl.load(shift_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
            total += product * (1.0 + scale) + sums * shift
            of_sample += E * D
        tl.store(dweight_ptr + at, total.to(dweight_ptr.dtype.element_ty), mask=inside)
    of_sample = product_ptr
    part = parts_ptr + split * samples * 2 * D
    for sample in range(samples):
        dshift = tl.zeros((BLOCK_D,), tl.float32)
        dscale = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(split * ROWS, tl.minimum((split + 1) * ROWS, E), BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            inside = (e < E)[:, None] & (d < D)
            at = e[:, None] * D + d
            product = tl.load(of_sample + at, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sums = tl.load(sums_ptr + sample * E + e, mask=e < E, other=0.0)[:, None]
            dshift += tl.sum(sums * weight, 0)
            dscale += tl.sum(product * weight, 0)
        tl.store(part + d, dshift, mask=d < D)
        tl.store(part + D + d, dscale, mask=d < D)
        of_sample += E * D
        part += 2 * D


def _weight_gradients(
    product: Tensor, weight: Tensor, sums: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dW, dshift and dscale from P [B, E, D] and the sums of dy [B, E]."""
    B, E, D = product.shape
    splits = cdiv(E, ROWS)
    dweight = torch.empty_like(weight)
    parts = product.new_empty(splits, B, 2, D, dtype=torch.float32)
    block = block_for(D, BLOCK_D)
    _weight_kernel[(cdiv(D, block), splits)](
        product, weight, sums, shift, scale, dweight, parts, B, E,
        D=D, ROWS=ROWS, BLOCK_E=BLOCK_E, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    total = column_sums(parts.flatten(1), shift.dtype).view(B, 2, D)
    dshift, dscale = (total[:, i : i + 1].clone(memory_format=torch.contiguous_format) for i in range(2))
    return dweight, dshift, dscale


@torch.library.custom_op("vidtta::norm_linear", mutates_args=())
def _apply(
    x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> list[Tensor]:
    """y, of each row of s the mean and 1 / std, and with h also s = x + h."""
    n, s, mean, rstd = _forward(x, h, shift, scale, None, eps)
    return [F.linear(n, weight, bias), mean, rstd] + [s] * (h is not None)


@_apply.register_fake
def _(x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float):
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    sums = [] if h is None else [torch.empty_like(x)]
    return [x.new_empty(*x.shape[:2], weight.shape[0]), mean, rstd, *sums]


@torch.library.custom_op("vidtta::norm_linear_gradients", mutates_args=())
def _gradients(
    dy: Tensor, ds: Tensor | None, s: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of x (and of h), shift, scale, weight and bias. ds: the gradient of s from elsewhere, or None."""
    zero = torch.zeros_like(shift)
    z = _forward(s, None, zero, zero, None, eps)[0]
    # A batch of one is an ordinary product, for which the library has more ways.
    product = (dy[0].t() @ z[0]).unsqueeze(0) if len(s) == 1 else dy.mT @ z
    del z
    dn = (dy.flatten(0, 1) @ weight).view(s.shape)
    sums = column_sums(dy, torch.float32)
    dweight, dshift, dscale = _weight_gradients(product, weight, sums, shift, scale)
    dx = norm_gradients(dn, dn[..., :0], ds, s, shift, scale, None, mean, rstd, False, False)[0]
    return dx, dshift, dscale, dweight, sums.sum(0).to(weight.dtype)


@_gradients.register_fake
def _(dy: Tensor, ds: Any, s: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, *_: Any):
    return (*(torch.empty_like(t) for t in (s, shift, scale, weight)), weight.new_empty(weight.shape[0]))


class _AddNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        unused_is_none(ctx)
        x, shift, scale, weight = (t.contiguous() for t in (x, shift, scale, weight))
        y, mean, rstd, *sums = _apply(x, None if h is None else h.contiguous(), shift, scale, weight, bias, eps)
        ctx.save_for_backward(sums[0] if sums else x, shift, scale, weight, mean, rstd)
        ctx.eps = eps
        return sums[0] if sums else x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, ds: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        of_h = ctx.needs_input_grad[1]
        if dy is None:
            return ds, ds if of_h else None, None, None, None, None, None
        dx, *rest = _gradients(dy.contiguous(), None if ds is None else ds.contiguous(), *ctx.saved_tensors, ctx.eps)
        return dx, dx if of_h else None, *rest, None


def add_norm_linear(
    x_BND: Tensor,
    h_BND: Tensor | None,
    shift_B1D: Tensor,
    scale_B1D: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """s = x + h, and (LN(s) * (1 + scale) + shift) W^T + b, [B, N, E]; differentiable in all, and makes all gradients.

    One dtype for all. h: as x, or None: then s is a view of x. Go on with s, as after `add_norm_modulate`. Kept for the backward: s, two
    numbers a row, the vectors and the weight, and neither x nor h. Raises ValueError when shapes, dtypes or devices disagree.
    """
    (B, _, D), E = x_BND.shape, weight_ED.shape[0]
    others = [] if h_BND is None else [h_BND]
    check_runs("add_norm_linear", x_BND, *others, shift_B1D, scale_B1D, weight_ED, bias_E)
    for name, tensor, wanted in (
        *(("h", h, x_BND.shape) for h in others), ("shift", shift_B1D, (B, 1, D)), ("scale", scale_B1D, (B, 1, D)),
        ("weight", weight_ED, (E, D)), ("bias", bias_E, (E,)),
    ):  # fmt: skip
        check(
            tensor.shape == wanted, f"add_norm_linear: {name} is {list(tensor.shape)}, x and weight need {list(wanted)}"
        )
    return _AddNormLinear.apply(x_BND, h_BND, shift_B1D, scale_B1D, weight_ED, bias_E, eps)  # type: ignore[return-value]
