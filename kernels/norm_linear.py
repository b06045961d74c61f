"""The trained linear layer of a modulated layer norm, y = n W^T + b with n = LN(x) * (1 + scale) + shift, which does not keep n.

With h = (x - mean) / std and P = dy^T h, one product, all gradients but x's are sums over weights and not over tokens:
    dW = P * (1 + scale) + (sum of dy) shift^T,    dscale = column sums of W * P,    dshift = (sum of dy) W.
So the backward makes h again in one pass over x, and needs no column sums over the tokens (norm_modulate.py writes and adds parts
of them for each block of rows). Operators of their own: a compiler would find h among what it may keep.
Axes: B samples, N tokens, D inputs, E outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .column_sums import column_sums
from .common import block_for, cdiv, check, check_runs, jit
from .norm_modulate import _forward, norm_gradients, norm_modulate_reference

BLOCK_E = 32
BLOCK_D = 64
ROWS = 64  # of the weight, that a program sums over


def norm_linear_reference(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6):
    """The mathematics, in whatever dtype the inputs have."""
    return F.linear(norm_modulate_reference(x, shift, scale, eps=eps), weight, bias)


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
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and of each row of x the mean and 1 / std."""
    n, mean, rstd = _forward(x, shift, scale, None, eps)
    return F.linear(n, weight, bias), mean, rstd


@_apply.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float):
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(*x.shape[:2], weight.shape[0]), mean, rstd


@torch.library.custom_op("vidtta::norm_linear_gradients", mutates_args=())
def _gradients(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, shift, scale, weight and bias."""
    zero = torch.zeros_like(shift)
    h = _forward(x, zero, zero, None, eps)[0]
    # A batch of one is an ordinary product, for which the library has more ways.
    product = (dy[0].t() @ h[0]).unsqueeze(0) if len(x) == 1 else dy.mT @ h
    del h
    dn = (dy.flatten(0, 1) @ weight).view(x.shape)
    sums = column_sums(dy, torch.float32)
    dweight, dshift, dscale = _weight_gradients(product, weight, sums, shift, scale)
    dx = norm_gradients(dn, dn[..., :0], x, shift, scale, None, mean, rstd, False, False)[0]
    return dx, dshift, dscale, dweight, sums.sum(0).to(weight.dtype)


@_gradients.register_fake
def _(dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float):
    return (*(torch.empty_like(t) for t in (x, shift, scale, weight)), weight.new_empty(weight.shape[0]))


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, shift, scale, weight = (t.contiguous() for t in (x, shift, scale, weight))
        out, mean, rstd = _apply(x, shift, scale, weight, bias, eps)
        ctx.save_for_backward(x, shift, scale, weight, mean, rstd)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(dy.contiguous(), *ctx.saved_tensors, ctx.eps), None)


def norm_linear(
    x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, weight_ED: Tensor, bias_E: Tensor, eps: float = 1e-6
) -> Tensor:
    """(LN(x) * (1 + scale) + shift) W^T + b, [B, N, E]; differentiable in all, and makes all gradients.

    One dtype for all. Kept for the backward: x, two numbers a row, the vectors and the weight. Raises ValueError when shapes,
    dtypes or devices disagree.
    """
    (B, _, D), E = x_BND.shape, weight_ED.shape[0]
    check_runs("norm_linear", x_BND, shift_B1D, scale_B1D, weight_ED, bias_E)
    for name, tensor, wanted in (
        ("shift", shift_B1D, (B, 1, D)), ("scale", scale_B1D, (B, 1, D)), ("weight", weight_ED, (E, D)), ("bias", bias_E, (E,)),
    ):  # fmt: skip
        check(tensor.shape == wanted, f"norm_linear: {name} is {list(tensor.shape)}, x and weight need {list(wanted)}")
    return _NormLinear.apply(x_BND, shift_B1D, scale_B1D, weight_ED, bias_E, eps)  # type: ignore[return-value]
