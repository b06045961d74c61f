"""The cases of `bench.kernels` in float8: the passes that write rows, and whole linear layers beside those in the plain dtype.

Those of a layer have four shapes: qkv; proj, which is also the caption's q and proj; fc1; and fc2, whose pass takes the activation with
it (in 16 bits it is joined to fc1's product). The truth is the float8 layer in float64, so a check says that the product is right, not
how far float8 lies from 16 bits; bench.float8_error tells that.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..engine.models import float8_linear
from ..engine.models.linear_gelu import linear_gelu
from ..engine.models.norm_float8_linear import add_norm_float8_linear, norm_float8_linear_reference
from ..kernels import norm_modulate, quantize_rows
from .kernel_cases import Case, Inputs, Sizes, randn

# The interpreter's cast to float8 loses the carry into the exponent; the unit tests put torch's in its place.
INTERPRETED = isinstance(quantize_rows._quantize_kernel, InterpretedFunction)


def subtractable(values: Tensor, like: Tensor) -> Tensor:
    """The check subtracts from the truth's numbers, and numbers in float8 cannot be."""
    return values.double() if like.dtype == torch.float64 else values


def quantize_cases(s: Sizes) -> Iterator[Case]:
    if INTERPRETED:
        return
    for name, B, grid in s.batches:
        for width, gelu in ((s.dim, False), (4 * s.dim, True)):
            M = B * grid.tokens

            def make(device: torch.device, dtype: torch.dtype, M: int = M, K: int = width) -> Inputs:
                return [randn(device, dtype, M, K)]

            def reference(x: Tensor, gelu: bool = gelu) -> tuple[Tensor, Tensor]:
                values, scales = quantize_rows.quantize_rows_reference(x, gelu)
                return subtractable(values, x), scales

            yield Case(
                f"quantize_rows {'gelu ' if gelu else ''}{width}", name, make, reference,
                {"triton": lambda x, gelu=gelu: quantize_rows.quantize_rows(x, gelu)},
                (M * (2 * width + width + 4), 0),
                variants=(
                    *((quantize_rows, {"TILE": tile}) for tile in (4096, 16384)),
                    (quantize_rows, {"TILE": 4096, "WIDE": 4096}),
                ),
            )  # fmt: skip


def norm_quantize_cases(s: Sizes) -> Iterator[Case]:
    """The modulated norm that writes float8, alone and with a low-rank projection beside it; in 16 bits as the floor's yardstick."""
    if INTERPRETED:
        return
    for name, B, grid in s.batches:
        for rank in (0, s.rank):
            N, D = grid.tokens, s.dim

            def make(
                device: torch.device, dtype: torch.dtype, B: int = B, N: int = N, D: int = D, r: int = rank
            ) -> Inputs:
                vectors = (randn(device, dtype, B, 1, D, scale=0.3) for _ in range(2))
                down = [randn(device, dtype, r, D, scale=D**-0.5)] if r else []
                return [randn(device, dtype, B, N, D), *vectors, *down]

            def reference(x: Tensor, *rest: Any):
                values, scales, low = norm_modulate.norm_quantize_reference(x, *rest)
                return subtractable(values, x), scales, low

            yield Case(
                f"norm_quantize{' lora' * bool(rank)}", name, make, reference,
                {"triton": lambda x, *t: norm_modulate.add_norm_quantize(x, None, *t)[1:4]},
                (B * N * (3 * D + 4), 0),
                floors={
                    "norm in 16 bits": norm_modulate.norm_modulate,
                    "norm in 16 bits, then quantise": lambda *t, D=D: quantize_rows.quantize_rows(norm_modulate.norm_modulate(*t)[..., :D]),
                },
                variants=(
                    *((norm_modulate, {"BLOCK_N": n}) for n in (8, 32)),
                    (norm_modulate, {"WARPS": 2 if rank else 8}),
                    (norm_modulate, {"BLOCK_D": 256}),
                    *([] if rank else [(norm_modulate, {"BLOCK_N": 8, "BLOCK_D": 2048, "WARPS": 8})]),
                ),
                compile=False,
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

            def exact_sums(*tensors, ours=ours):
                float8_linear.FAST_ACCUMULATION = False
                try:
                    return ours(*tensors)
                finally:
                    float8_linear.FAST_ACCUMULATION = True

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
                {"quantise + product": ours, "quantise + product, sums in float32": exact_sums},
                (2 * M * K + N * K + 2 * M * N, 2 * M * N * K), floors=floors, compile=False,
            )  # fmt: skip


def norm_linear_cases(s: Sizes) -> Iterator[Case]:
    """The layers behind a norm, with it: the norm writes float8, or 16 bits that are quantised, or are multiplied as they are."""
    if INTERPRETED:
        return
    for name, B, grid in s.batches:
        for layer, width in (("qkv", 3), ("fc1", 4)):
            N, D, E = grid.tokens, s.dim, width * s.dim

            def make(
                device: torch.device, dtype: torch.dtype, B: int = B, N: int = N, D: int = D, E: int = E
            ) -> Inputs:
                vectors = (randn(device, dtype, B, 1, D, scale=0.3) for _ in range(2))
                weight = randn(device, dtype, E, D, scale=D**-0.5)
                frozen = [*float8_linear.quantize_weight(weight), randn(device, dtype, E), weight]
                return [randn(device, dtype, B, N, D), *vectors, *frozen]

            def reference(x, shift, scale, values, scales, bias, weight):
                wide = x.dtype if x.dtype == torch.float64 else torch.float32
                wide_x, shift, scale = (t.to(wide) for t in (x, shift, scale))
                return norm_float8_linear_reference(wide_x, shift, scale, values, scales, bias)[0].to(x.dtype)

            def apart(x, shift, scale, *frozen: Any):
                return float8_linear.float8_linear(norm_modulate.norm_modulate(x, shift, scale), *frozen)

            def exact(x, shift, scale, values, scales, bias, weight):
                return F.linear(norm_modulate.norm_modulate(x, shift, scale), weight, bias)

            yield Case(
                f"norm_float8_linear {layer}", name, make, reference,
                {"norm in float8, product": lambda x, *t: add_norm_float8_linear(x, None, *t)[1]},
                (2 * B * N * D + E * D + 2 * B * N * E, 2 * B * N * D * E),
                floors={"norm, linear": exact, "norm, quantise, product": apart}, compile=False,
            )  # fmt: skip


float8_cases = (quantize_cases, norm_quantize_cases, linear_cases, norm_linear_cases)
