"""A linear layer in float8: e4m3 rows times e4m3 output channels, summed, scaled and rounded once to x's dtype.

On a GPU one pass quantises x, or its GELU (kernels/quantize_rows.py), and the library multiplies with a scale a row (torch._scaled_mm);
elsewhere a reference quantises, dequantises and multiplies in float32. The weight is frozen; the gradient of x is that of the unrounded
layer, dy W with W in 16 bits: rounding has no useful derivative, and a float8 product would need scales along its sum and a transposed
copy of every weight. Widths that are no multiples of 16 are padded with zeros, in x and W alike. An operator of its own, so that a
compiler need not know the library's call.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports the scaled product under a private name alone)

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.common import check
from ...kernels.quantize_rows import dequantized, padded, quantize_rows, quantize_rows_reference

MULTIPLE = 16  # of both widths, as the library's product needs
FAST_ACCUMULATION = True
"""Whether sums stay in the tensor cores' accumulators, which are shorter than float32; off, they are carried to float32 every 128
terms. What that loses is far below what rounding to e4m3 does: no distance of the bench changes by it in the fourth digit."""


def product_reference(rows: Tensor, row_scales: Tensor, values: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """Of rows [..., P] and output channels [Q, P] in float8, plus bias [N]; [..., N] in the row scales' dtype, float32 or float64."""
    weight = dequantized(values, scales.to(row_scales.dtype))[: bias.shape[0]]
    return F.linear(dequantized(rows, row_scales), weight, bias.to(row_scales.dtype))


def float8_linear_reference(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """The mathematics in float32, or in float64 for a float64 x; in x's dtype."""
    rows = quantize_rows_reference(x if x.dtype == torch.float64 else x.float(), gelu)
    return product_reference(*rows, values[:, : x.shape[-1]], scales, bias).to(x.dtype)


@torch.no_grad()
def quantize_weight(weight: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """values [Q, P] float8_e4m3fn and scales [Q, 1] float32 of a weight [N, K], both sides padded to multiples of 16 with zeros. out:
    what this gave earlier, to write into."""
    N, K = weight.shape
    if out is None:
        shape = padded(N, MULTIPLE), padded(K, MULTIPLE)
        values = torch.zeros(shape, device=weight.device).to(torch.float8_e4m3fn)
        out = values, torch.ones(shape[0], 1, device=weight.device)
    kept = out[0][:N], out[1][:N]
    if weight.is_cuda:
        quantize_rows(weight.detach(), multiple=MULTIPLE, out=kept)
    else:
        for mine, found in zip(kept, quantize_rows_reference(weight.detach(), multiple=MULTIPLE), strict=True):
            mine.copy_(found)
    return out


def scaled_product(
    rows: Tensor, row_scales: Tensor, values: Tensor, scales: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """The library's product of float8 rows [M, P] and output channels [Q, P] with their scales [M, 1] and [Q, 1], plus bias [N]; its
    first N columns. P and Q: multiples of 16."""
    N, Q = bias.shape[0], values.shape[0]
    out = torch._scaled_mm(
        rows,
        values.t(),
        scale_a=row_scales,
        scale_b=scales.view(1, -1),
        bias=bias if N == Q else F.pad(bias, (0, Q - N)),
        out_dtype=dtype,
        use_fast_accum=FAST_ACCUMULATION,
    )
    return out if N == Q else out[:, :N].contiguous()


def product(
    rows: Tensor, row_scales: Tensor, values: Tensor, scales: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """[..., N] in `dtype`, of rows [..., P] and their scales [..., 1]: `scaled_product` on a GPU, else its reference."""
    if not rows.is_cuda:
        return product_reference(rows, row_scales, values, scales, bias).to(dtype)
    flat = scaled_product(rows.flatten(0, -2), row_scales.flatten(0, -2), values, scales, bias, dtype)
    return flat.view(*rows.shape[:-1], -1)


@torch.library.custom_op("vidtta::float8_linear", mutates_args=())
def _float8_linear(
    x: Tensor, values: Tensor, scales: Tensor, bias: Tensor, weight: Tensor, gelu: bool
) -> Tensor:  # fmt: skip
    if not x.is_cuda:
        return float8_linear_reference(x, values, scales, bias, gelu)
    return product(*quantize_rows(x, gelu, MULTIPLE), values, scales, bias, x.dtype)


@_float8_linear.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor, weight: Tensor, gelu: bool):
    return x.new_empty(*x.shape[:-1], bias.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *_, weight, gelu = inputs
    ctx.save_for_backward(weight, x if gelu else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, x = ctx.saved_tensors
    dx = dy @ weight
    if x is not None:
        dx = torch.ops.aten.gelu_backward(dx, x, approximate="tanh")
    return dx, *[None] * 5


_float8_linear.register_autograd(_backward, setup_context=_setup)


def float8_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor,
    weight: Tensor,
    gelu: bool = False,
) -> Tensor:
    """x W^T + b, or gelu(x) W^T + b (tanh), in float8, [..., N] of x's dtype; differentiable in x: W and b are frozen.

    x: [..., K], bfloat16 on a GPU, of any number of rows. values, scales: of W, from `quantize_weight`. bias: [N] and weight: W [N, K],
    both of x's dtype; the weight is read by the backward alone. Raises ValueError where shapes disagree, or where a gradient is asked
    for that there is not.
    """
    N, K = weight.shape
    Q, P = padded(N, MULTIPLE), padded(K, MULTIPLE)
    check(
        x.ndim >= 2 and x.shape[-1] == K and values.shape == (Q, P) and scales.shape == (Q, 1) and bias.shape == (N,),
        f"float8_linear: x, values, scales and bias are {list(x.shape)}, {list(values.shape)}, {list(scales.shape)} and "
        f"{list(bias.shape)}; weight {[N, K]} needs [..., {K}], {[Q, P]}, {[Q, 1]} and {[N]}",
    )
    check(
        not (torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)),
        "float8_linear: weight and bias must be frozen; to train them use F.linear",
    )
    return _float8_linear(x, values, scales, bias, weight, gelu)
