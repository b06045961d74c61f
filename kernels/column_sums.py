"""Sums down the columns of a matrix, as bias gradients and the parts of programs need them: few rows at once, float32, a fixed order.

The library's reduction gives each column to few threads, which a matrix of thousands of rows and about a thousand columns leaves waiting.
Here the rows are split among programs, and what they found is summed by a second launch; few rows take one.
Axes: P matrices, M rows, N columns.
"""

import torch
import triton.language as tl
from torch import Tensor

from .common import cdiv, check, check_runs, jit, power_of_two

FEW = 512  # rows, up to which one launch does it
ONE = {"BLOCK_M": 128, "BLOCK_N": 16}
MANY = {"BLOCK_M": 32, "BLOCK_N": 64}
SPLITS = 32
MOST_MATRICES = 65535  # that a launch's grid takes along its last axis


def column_sums_reference(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The mathematics: in float32, or in float64 for a float64 x."""
    return x.sum(-2, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32).to(dtype or x.dtype)


@jit
def _sum_kernel(x_ptr, out_ptr, M, N, rows_each, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    split, matrix = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * rows_each, tl.minimum((split + 1) * rows_each, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None] & (n < N)[None, :]
        total += tl.load(x_ptr + (matrix * M + m[:, None]) * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    at = (matrix * tl.num_programs(1) + split) * N + n
    tl.store(out_ptr + at, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=n < N)


def _launch(x: Tensor, splits: int, blocks: dict[str, int], dtype: torch.dtype) -> Tensor:
    """Sums of `splits` parts of the rows, [P, splits, N]."""
    P, M, N = x.shape
    blocks = blocks | {"BLOCK_M": min(blocks["BLOCK_M"], power_of_two(M))}
    rows_each = cdiv(cdiv(M, splits), blocks["BLOCK_M"]) * blocks["BLOCK_M"]
    splits = cdiv(M, rows_each)
    out = x.new_empty(P, splits, N, dtype=dtype)
    _sum_kernel[(cdiv(N, blocks["BLOCK_N"]), splits, P)](x, out, M, N, rows_each, **blocks, num_warps=4)
    return out


def column_sums(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x summed over its last but one axis, [..., N]; without gradients.

    x: [..., M, N], float32, bfloat16 or float16, summed in float32 and rounded once to `dtype`, x's own by default. Raises ValueError
    for another dtype or shape, or where the kernel cannot run.
    """
    check_runs("column_sums", x)
    check(
        x.ndim > 1 and x.shape[:-2].numel() <= MOST_MATRICES,
        f"column_sums: x is {list(x.shape)}, needs two axes and at most {MOST_MATRICES} matrices",
    )
    dtype = dtype or x.dtype
    if 0 in x.shape:
        return x.new_zeros(*x.shape[:-2], x.shape[-1], dtype=dtype)
    matrices = x.reshape(-1, *x.shape[-2:]).contiguous()
    if x.shape[-2] > FEW:
        matrices = _launch(matrices, SPLITS, MANY, torch.float32)
    return _launch(matrices, 1, ONE, dtype).view(*x.shape[:-2], x.shape[-1])
