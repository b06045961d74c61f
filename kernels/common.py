"""What the kernels share: where they can run, and how sizes become blocks."""

import os
from typing import Any

import torch
import triton
from torch import Tensor

# Typed loosely: a launch takes plain numbers for constexpr parameters, and options that no kernel declares.
jit: Any = triton.jit

# Triton reads this when a kernel is decorated, so it must be set before a kernel's module is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
SMALLEST_DOT = 16  # tl.dot takes no side below 16
MAX_RANK = 64


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def head_and_rest(columns: int) -> tuple[int, int]:
    """Two powers of two that hold a row in registers between them: the largest not above it, and one for what is left, 0 where nothing
    is. 1152 is 1024 and 128 with no lane idle, where one tile would be 2048."""
    head = power_of_two(columns + 1) // 2
    return head, power_of_two(columns - head) if columns > head else 0


def block_for(size: int, largest: int) -> int:
    """A power of two that tl.dot takes, no larger than needed for `size` and than `largest`."""
    return min(largest, max(SMALLEST_DOT, power_of_two(size)))


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_runs(name: str, *tensors: Tensor) -> None:
    """Raise ValueError unless all tensors lie on one device where a Triton kernel can run, in one floating dtype."""
    first = tensors[0]
    for t in tensors:
        if t.device != first.device or t.dtype != first.dtype:
            raise ValueError(
                f"{name}: tensors must share device and dtype, were {first.device} {first.dtype} and {t.device} {t.dtype}"
            )
    if first.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: dtype must be float32, bfloat16 or float16, was {first.dtype}")
    if not (first.is_cuda or INTERPRETED):
        raise ValueError(
            f"{name}: tensors are on {first.device}; Triton needs a GPU, or TRITON_INTERPRET=1 set before the import. "
            "The file's reference function computes the same anywhere"
        )


def padded_rank(rank: int) -> int:
    """Columns that a rank takes in a kernel: a power of two from 16 up. Raises ValueError outside 1 to 64."""
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the rank of a low-rank addition must be from 1 to {MAX_RANK}, was {rank}")
    return max(SMALLEST_DOT, power_of_two(rank))


def splits_for(rows: int, programs: int, block: int, wanted: int = 512) -> int:
    """Into how many parts to split a sum over `rows` so that about `wanted` programs run; each part at least one block."""
    return max(1, min(cdiv(rows, block), wanted // max(programs, 1)))
