"""A linear layer in float8: e4m3 rows times e4m3 output channels, summed in float32, scaled and rounded once to x's dtype.

On a GPU the library's product with a scale a row (torch._scaled_mm) after one pass that quantises x (kernels/quantize_rows.py);
elsewhere a reference that quantises, dequantises and multiplies in float32. The weight is frozen; the gradient of x is that of the
unrounded layer, dy W with W in 16 bits: rounding has no useful derivative, and a float8 product would need scales along its sum and
a transposed copy of every weight. An operator of its own, so that a compiler need not know the library's call.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports the scaled product under a private name alone)

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.common import check
from ...kernels.quantize_rows import dequantized, quantize_rows, quantize_rows_reference

MULTIPLE = 16  # of both widths, as the library's product needs
FAST_ACCUMULATION = False
"""Whether sums stay in the tensor cores' shorter accumulators; off, they are carried to float32 every 128 terms."""


def float8_linear_reference(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """The mathematics in float32, or in float64 for a float64 x; in x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = dequantized(*quantize_rows_reference(x.to(wide), gelu))
    return F.linear(rows, dequantized(values, scales.to(wide)), bias.to(wide)).to(x.dtype)


def scaled_product(
    rows: Tensor, row_scales: Tensor, values: Tensor, scales: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """The library's product of float8 rows [M, K] and output channels [N, K] with their scales [M, 1] and [N, 1], plus bias."""
    return torch._scaled_mm(
        rows,
        values.t(),
        scale_a=row_scales,
        scale_b=scales.view(1, -1),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=FAST_ACCUMULATION,
    )


@torch.library.custom_op("vidtta::float8_linear", mutates_args=())
def _float8_linear(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    if not x.is_cuda:
        return float8_linear_reference(x, values, scales, bias, gelu)
    rows, row_scales = quantize_rows(x.flatten(0, -2), gelu)
    return scaled_product(rows, row_scales, values, scales, bias, x.dtype).view(*x.shape[:-1], -1)


@_float8_linear.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[4])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return dy @ weight, None, None, None, None, None


_float8_linear.register_autograd(_backward, setup_context=_setup)


def float8_linear(
    x: Tensor, values: Tensor, scales: Tensor, bias: Tensor, weight: Tensor, gelu: bool = False
) -> Tensor:
    """x W^T + b, or gelu(x) W^T + b, in float8, [..., N] of x's dtype; differentiable in x without `gelu`: W and b are frozen.

    x: [..., K], bfloat16 on a GPU, of any number of rows. values, scales: of W by `quantize_rows`, [N, K] and [N, 1]. bias: [N] and
    weight: W [N, K], both of x's dtype; the weight is read by the backward alone. K and N: multiples of 16.
    Raises ValueError where shapes disagree, or where a gradient is asked for that there is not.
    """
    N, K = weight.shape
    check(
        x.ndim >= 2 and x.shape[-1] == K and values.shape == (N, K) and scales.shape == (N, 1) and bias.shape == (N,),
        f"float8_linear: x, values, scales and bias are {list(x.shape)}, {list(values.shape)}, {list(scales.shape)} and "
        f"{list(bias.shape)}; weight {[N, K]} needs [..., {K}], {[N, K]}, {[N, 1]} and {[N]}",
    )
    check(
        K % MULTIPLE == 0 and N % MULTIPLE == 0,
        f"float8_linear: both sides of weight {[N, K]} must be multiples of {MULTIPLE}; take F.linear",
    )
    asked = torch.is_grad_enabled()
    check(
        not (asked and (weight.requires_grad or bias.requires_grad or (gelu and x.requires_grad))),
        "float8_linear: weight and bias must be frozen, and gelu has no gradient; to train them use F.linear",
    )
    return _float8_linear(x, values, scales, bias, weight, gelu)
