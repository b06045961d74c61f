"""The cases of `bench.kernels` in float8: the pass that quantises rows, and whole linear layers beside those in the plain dtype.

A layer has six linears of four shapes: qkv; proj, which is also the caption's q and proj; fc1; and fc2, whose pass takes the activation
with it (in 16 bits it is joined to fc1's product). The truth is the float8 layer in float64, so a check says that the product is
right, not how far float8 lies from 16 bits; bench.float8_error tells that.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..engine.models import float8_linear
from ..engine.models.linear_gelu import linear_gelu
from ..kernels import quantize_rows
from .kernel_cases import Case, Inputs, Sizes, randn


def quantize_cases(s: Sizes) -> Iterator[Case]:
    if isinstance(quantize_rows._quantize_kernel, InterpretedFunction):
        return  # the interpreter's cast to float8 loses the carry into the exponent; the unit tests put torch's in its place
    for name, B, grid in s.batches:
        for width, gelu in ((s.dim, False), (4 * s.dim, True)):
            M = B * grid.tokens

            def make(device: torch.device, dtype: torch.dtype, M: int = M, K: int = width) -> Inputs:
                return [randn(device, dtype, M, K)]

            def reference(x: Tensor, gelu: bool = gelu) -> tuple[Tensor, Tensor]:
                values, scales = quantize_rows.quantize_rows_reference(x, gelu)
                # Numbers in float8 cannot be subtracted, which the check does with the truth's.
                return (values.double() if x.dtype == torch.float64 else values), scales

            yield Case(
                f"quantize_rows {'gelu ' if gelu else ''}{width}", name, make, reference,
                {"triton": lambda x, gelu=gelu: quantize_rows.quantize_rows(x, gelu)},
                (M * (2 * width + width + 4), 0),
                variants=tuple((quantize_rows, {"TILE": tile}) for tile in (4096, 16384)),
            )  # fmt: skip


def linear_cases(s: Sizes) -> Iterator[Case]:
    D = s.dim
    shapes = {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}
    for name, B, grid in s.batches:
        for layer, (K, N) in shapes.items():
            M, gelu = B * grid.tokens, layer == "fc2"

            def make(
                device: torch.device, dtype: torch.dtype, M: int = M, K: int = K, N: int = N, gelu: bool = gelu
            ) -> Inputs:
                x, weight = randn(device, dtype, M, K), randn(device, dtype, N, K, scale=K**-0.5)
                rows = quantize_rows.quantize_rows_reference(x, gelu, float8_linear.MULTIPLE)
                return [x, weight, randn(device, dtype, N), *float8_linear.quantize_weight(weight), *rows]

            def reference(x, weight, bias, values, scales, rows, row_scales, gelu: bool = gelu):
                return float8_linear.float8_linear_reference(x, values, scales, bias, gelu)

            def ours(x, weight, bias, values, scales, rows, row_scales, gelu: bool = gelu):
                return float8_linear.float8_linear(x, values, scales, bias, weight, gelu)

            def fast(*tensors, ours=ours):
                float8_linear.FAST_ACCUMULATION = True
                try:
                    return ours(*tensors)
                finally:
                    float8_linear.FAST_ACCUMULATION = False

            def product(x, weight, bias, values, scales, rows, row_scales):
                return float8_linear.scaled_product(rows, row_scales, values, scales, bias, x.dtype)

            floors = {
                "linear": lambda x, weight, bias, *_: F.linear(x, weight, bias),
                "float8 product alone": product,
            }
            if layer == "fc1":
                floors["linear, gelu in the product"] = lambda x, weight, bias, *_: linear_gelu(x, weight, bias)
            yield Case(
                f"float8_linear {layer}", name, make, reference,
                {"quantise + product": ours, "quantise + product, fast accumulation": fast},
                (2 * M * K + N * K + 2 * M * N, 2 * M * N * K), floors=floors, compile=False,
            )  # fmt: skip
