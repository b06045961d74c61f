"""Rows in float8: the largest magnitude of each row becomes its scale, and the row over it is rounded to e4m3, in one read.

x ~ values * scales, with scales = max |x| / 448 over a row (448 is e4m3's largest number) and values = x / scales rounded to
nearest, ties to even (arXiv:2209.05433). A row is a token's activations, or one output channel of a weight: a product of two such
matrices needs no scale inside its sum. With `gelu` the row is the activation of what is read, so an MLP's hidden state is not
written a second time in 16 bits. A row lies in two tiles, so that few lanes idle at the model's widths, and may be made longer by
zeros, as products in float8 take multiples of 16. Other kernels that hold a row write it so themselves (norm_modulate.py,
gate_residual.py). Without gradients: who needs one takes that of the unrounded x (engine/models/float8_linear.py).
Axes: M rows, K columns, P of them written.
"""

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .common import cdiv, check, check_runs, head_and_rest, jit, power_of_two

LARGEST = 448.0  # of e4m3
SMALLEST = 2.0**-100  # a scale; a row of zeros has it, and products of two scales stay normal numbers
TILE = 8192  # numbers of a program: whole rows, in registers between their largest magnitude and the rounding
WIDE = 2048  # numbers above which a program has 8 warps
MOST_COLUMNS = 16384


def padded(size: int, multiple: int) -> int:
    """The next multiple of a number."""
    return cdiv(size, multiple) * multiple


def quantize_rows_reference(x: Tensor, gelu: bool = False, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """The mathematics: values [..., P] float8_e4m3fn, scales [..., 1], in float32, or in float64 for a float64 x."""
    wide = x if x.dtype == torch.float64 else x.float()
    if gelu:
        wide = F.gelu(wide, approximate="tanh")
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=LARGEST * SMALLEST)
    most = torch.full_like(largest, LARGEST)  # a number in its place would be divided by in two roundings
    values = F.pad(wide * (most / largest), (0, padded(x.shape[-1], multiple) - x.shape[-1]))
    return values.to(torch.float8_e4m3fn), largest / most


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    """values * scales in the scales' dtype."""
    return values.to(scales.dtype) * scales


@jit
def row_scale(largest, MOST: tl.constexpr, LEAST: tl.constexpr):
    """What a row is multiplied with, and its scale, from its largest magnitude. Divisions as IEEE rounds them, one a row each, so that
    the numbers are those of the reference."""
    largest = tl.maximum(largest, MOST * LEAST)
    most = tl.full(largest.shape, MOST, tl.float32)
    return tl.div_rn(most, largest), tl.div_rn(largest, most)


@jit
def _tile(x_ptr, m, k, M, K: tl.constexpr, GELU: tl.constexpr):
    """Rows m and columns k of x, or of its activation, in float32; zero where there are none."""
    inside = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if GELU:
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi): tanh as a sigmoid
    return x


@jit
def _store(values_ptr, m, k, M, P: tl.constexpr, x, inverse):
    values = (x * inverse[:, None]).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + m[:, None] * P + k[None, :], values, mask=(m < M)[:, None] & (k < P)[None, :])


@jit
def _quantize_kernel(
    x_ptr, values_ptr, scales_ptr, M, K: tl.constexpr, P: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr,
    GELU: tl.constexpr, BLOCK_M: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, HEAD)
    head = _tile(x_ptr, m, k, M, K, GELU)
    largest = tl.max(tl.abs(head), 1)
    if TAIL > 0:
        after = HEAD + tl.arange(0, TAIL)
        tail = _tile(x_ptr, m, after, M, K, GELU)
        largest = tl.maximum(largest, tl.max(tl.abs(tail), 1))
    inverse, scale = row_scale(largest, MOST, LEAST)
    _store(values_ptr, m, k, M, P, head, inverse)
    if TAIL > 0:
        _store(values_ptr, m, after, M, P, tail, inverse)
    tl.store(scales_ptr + m, scale, mask=m < M)


def quantize_rows(
    x: Tensor, gelu: bool = False, multiple: int = 1, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """values [..., P] float8_e4m3fn and scales [..., 1] float32 with x ~ values * scales, or gelu(x) (tanh) in x's place.

    x: [..., K], float32, bfloat16 or float16, K at most 16384; what is not finite comes out as not finite, for its whole row where
    it is an infinity. P: the next multiple of `multiple` from K on, zeros behind K. out: storage of those shapes and dtypes,
    contiguous, to write into. Raises ValueError for other x or out.
    """
    check_runs("quantize_rows", x)
    K = x.shape[-1]
    check(1 <= K <= MOST_COLUMNS, f"quantize_rows: x is {list(x.shape)}, its rows may have 1 to {MOST_COLUMNS} columns")
    P = padded(K, multiple)
    wanted = (*x.shape[:-1], P)
    if out is None:
        out = (
            torch.empty(wanted, dtype=torch.float8_e4m3fn, device=x.device),
            torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device),
        )
    values, scales = out
    check(
        values.shape == wanted and values.dtype == torch.float8_e4m3fn and values.is_contiguous()
        and scales.shape == (*x.shape[:-1], 1) and scales.dtype == torch.float32 and scales.is_contiguous(),
        f"quantize_rows: out is {list(values.shape)} {values.dtype} and {list(scales.shape)} {scales.dtype}, x {list(x.shape)} needs "
        f"contiguous {list(wanted)} float8_e4m3fn and {[*x.shape[:-1], 1]} float32",
    )  # fmt: skip
    M, (head, tail) = scales.numel(), head_and_rest(P)
    if head == tail:
        head, tail = 2 * head, 0
    if M:
        block_m = max(1, min(TILE // head, power_of_two(M)))
        _quantize_kernel[(cdiv(M, block_m),)](
            x.contiguous(), values, scales, M, K=K, P=P, MOST=LARGEST, LEAST=SMALLEST, GELU=gelu,
            BLOCK_M=block_m, HEAD=head, TAIL=tail, num_warps=8 if block_m * head > WIDE else 4,
        )  # fmt: skip
    return out
