"""Sums down columns, for `bench.kernels`: biases of the layers that are adapted on, and the parts that a kernel's programs leave."""

from collections.abc import Iterator

import torch

from ..kernels import column_sums
from .kernel_cases import Case, Inputs, Sizes, randn


def sum_cases(s: Sizes) -> Iterator[Case]:
    """At the first shape alone; sums serve gradients."""
    _, B, grid = s.batches[0]
    tokens = B * grid.tokens
    for M, N in ((tokens, s.dim), (tokens, 3 * s.dim), (-(-tokens // 32), s.dim)):

        def make(device: torch.device, dtype: torch.dtype, M: int = M, N: int = N) -> Inputs:
            return [randn(device, dtype, M, N)]

        yield Case(
            "column_sums", f"{M} x {N}", make, column_sums.column_sums_reference, {"triton": column_sums.column_sums},
            (2 * M * N, M * N), variants=tuple((column_sums, {"SPLITS": splits}) for splits in (16, 64)),
        )  # fmt: skip
