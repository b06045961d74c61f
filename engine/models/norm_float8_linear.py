"""The float8 linear layer of a modulated layer norm: the norm writes its rows in float8, in one pass over x (kernels/norm_modulate.py), and
the library multiplies them. What was quantised is n = LN(x) * (1 + scale) + shift in float32, rounded once. The residual sum before
the norm and the gradient of the stream beside it join as there.

The gradient of n is that of the unrounded layer, dy W with W in 16 bits (float8_linear.py), and n is not kept: its own backward reads x
again. Beside the layer, if wanted, the low-rank projection n A^T, of n in x's dtype. Operators of their own, so that a compiler need
not look in.
Axes: B samples, N tokens, D inputs, E outputs, R columns that a rank takes.
"""

from typing import Any

import torch
from torch import Tensor

from ...kernels.common import check, padded_rank
from ...kernels.norm_gradients import norm_gradients
from ...kernels.norm_modulate import add_norm_quantize, norm_quantize_reference
from ...kernels.quantize_rows import padded
from .float8_linear import MULTIPLE, product, product_reference


def norm_float8_linear_reference(
    x: Tensor, shift: Tensor, scale: Tensor, values: Tensor, scales: Tensor, bias: Tensor, down: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mathematics, in x's dtype: float32 or float64."""
    rows, row_scales, low = norm_quantize_reference(x, shift, scale, down, MULTIPLE)
    return product_reference(rows, row_scales, values, scales, bias), low


@torch.library.custom_op("vidtta::norm_float8_linear", mutates_args=())
def _apply(
    x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, values: Tensor, scales: Tensor, bias: Tensor,
    down: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """y, n A^T, of each row of s the mean and 1 / std, and with h also s = x + h."""
    s, rows, row_scales, low, mean, rstd = add_norm_quantize(x, h, shift, scale, down, MULTIPLE)
    return [product(rows, row_scales, values, scales, bias, x.dtype), low, mean, rstd] + [s] * (h is not None)


@_apply.register_fake
def _(x: Tensor, h: Any, shift: Any, scale: Any, values: Any, scales: Any, bias: Tensor, down: Tensor | None):
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    low = x.new_empty(*x.shape[:2], 0 if down is None else padded_rank(down.shape[0]))
    sums = [] if h is None else [torch.empty_like(x)]
    return [x.new_empty(*x.shape[:2], bias.shape[0]), low, mean, rstd, *sums]


@torch.library.custom_op("vidtta::norm_float8_linear_gradients", mutates_args=())
def _gradients(
    dy: Tensor, dlow: Tensor, ds: Tensor, s: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, down: Tensor | None,
    mean: Tensor, rstd: Tensor, vectors: bool, downs: bool,
) -> list[Tensor]:  # fmt: skip
    """Of x (and of h), then of shift and scale with `vectors`, then of down with `downs`. ds: the gradient of s from elsewhere."""
    dn = (dy.flatten(0, 1) @ weight).view(s.shape)
    found = norm_gradients(dn, dlow, ds, s, shift, scale, down, mean, rstd, vectors, downs)
    return [gradient for gradient in found if gradient is not None]


@_gradients.register_fake
def _(
    dy: Tensor, dlow: Tensor, ds: Tensor, s: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, down: Tensor | None,
    mean: Tensor, rstd: Tensor, vectors: bool, downs: bool,
):  # fmt: skip
    found = [torch.empty_like(s)] + [torch.empty_like(t) for t in (shift, scale) if vectors]
    return found + [torch.empty_like(t, dtype=torch.float32) for t in (down,) if downs and t is not None]


class _AddNormFloat8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, values: Tensor, scales: Tensor, bias: Tensor,
        weight: Tensor, down: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x, shift, scale = (t.contiguous() for t in (x, shift, scale))
        cast = None if down is None else down.to(x.dtype).contiguous()
        added = None if h is None else h.contiguous()
        y, low, mean, rstd, *sums = _apply(x, added, shift, scale, values, scales, bias, cast)
        ctx.save_for_backward(sums[0] if sums else x, shift, scale, weight, cast, mean, rstd)
        ctx.down_dtype = None if down is None else down.dtype
        return sums[0] if sums else x.view_as(x), y, low

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dy: Tensor, dlow: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        vectors = needs[2] or needs[3]
        douts = (t.contiguous() for t in (dy, dlow, ds))
        found = _gradients(*douts, *ctx.saved_tensors, vectors, needs[8])
        dshift, dscale = found[1:3] if vectors else (None, None)
        ddown = found[-1].to(ctx.down_dtype) if needs[8] else None
        return found[0], found[0] if needs[1] else None, dshift, dscale, None, None, None, None, ddown


def add_norm_float8_linear(
    x_BND: Tensor,
    h_BND: Tensor | None,
    shift_B1D: Tensor,
    scale_B1D: Tensor,
    values: Tensor,
    scales: Tensor,
    bias_E: Tensor,
    weight_ED: Tensor,
    down_rD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """s = x + h, of its modulated norm n the layer n W^T + b in float8, [B, N, E], and n A^T, [B, N, R] (R = 0 without `down`);
    differentiable in x, h, shift, scale and down.

    x, h, shift, scale, down: as in `add_norm_modulate`, after which one also goes on with s; values, scales, bias, weight: as in
    `float8_linear`. Columns of n A^T beyond the rank are zero. Raises ValueError when shapes, dtypes or devices disagree, or when weight
    or bias want a gradient.
    """
    E, D = weight_ED.shape
    shape = padded(E, MULTIPLE), padded(D, MULTIPLE)
    check(
        x_BND.shape[2] == D and values.shape == shape and scales.shape == (shape[0], 1) and bias_E.shape == (E,),
        f"add_norm_float8_linear: x, values, scales and bias are {list(x_BND.shape)}, {list(values.shape)}, {list(scales.shape)} and "
        f"{list(bias_E.shape)}; weight {[E, D]} needs [B, N, {D}], {list(shape)}, {[shape[0], 1]} and {[E]}",
    )
    check(
        not (torch.is_grad_enabled() and (weight_ED.requires_grad or bias_E.requires_grad)),
        "add_norm_float8_linear: weight and bias must be frozen; to train them use add_norm_linear",
    )
    return _AddNormFloat8Linear.apply(x_BND, h_BND, shift_B1D, scale_B1D, values, scales, bias_E, weight_ED, down_rD)  # type: ignore[return-value]
