"""A frozen linear layer with its low-rank addition inside: y = x W^T + b + s (x A^T) B^T (arXiv:2106.09685, section 4.1).

The addition joins in the float32 accumulator; it is never merged into 16-bit weights, which would round small updates away.
Two ways, of which measurement chooses:

`lora_linear`           two Triton kernels: a skinny product z = x A^T, and one matrix product over both terms, x W^T + z (s B)^T.
                        The gradient of x is the same kernel once more: dy W + dz A with dz = dy (s B).
`lora_linear_extended`  the library's matrix product with K longer by the rank: [x, z] [W, s B]^T. Whoever makes x also writes z
                        beside it (norm_modulate.py), and the gradient [dx without A's part, dz] is one product as well.

Gradients of A and B are skinny sums over the rows, split into parts that are added in a fixed order.
Axes: M rows, K inputs, N outputs, R columns that a rank takes (common.padded_rank).
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .column_sums import column_sums
from .common import block_for, cdiv, check, check_runs, jit, padded_rank, splits_for

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages of the matrix product
PRODUCT_BLOCKS = (128, 128, 64, 8, 4)


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """What an adapter computes, in whatever dtype the inputs have; one rounding for each call, as in plain PyTorch."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


@jit
def _skinny_kernel(
    x_ptr, w_ptr, z_ptr, M, K, rank, STRIDE_X, STRIDE_K, STRIDE_R,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z[m, r] = sum over k of x[m, k] w[k, r]; columns from `rank` on are zero."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, R)
    total = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * STRIDE_X + k, mask=(m[:, None] < M) & (k < K), other=0.0)
        w = tl.load(w_ptr + k[:, None] * STRIDE_K + r * STRIDE_R, mask=(k[:, None] < K) & (r < rank), other=0.0)
        total += tl.dot(x, w, input_precision="ieee")
    tl.store(z_ptr + m[:, None] * R + r, total.to(z_ptr.dtype.element_ty), mask=m[:, None] < M)


@jit
def _product_kernel(
    x_ptr, w_ptr, z_ptr, low_ptr, bias_ptr, out_ptr, M, N, K, rank,
    STRIDE_WK, STRIDE_WN, STRIDE_LR, STRIDE_LN,
    R: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum_k x[m, k] w[k, n] + sum_r z[m, r] low[r, n] (+ bias[n])."""
    # Programs that run together take a patch of GROUP blocks of rows, so that their tiles meet in the L2 cache.
    across = tl.cdiv(N, BLOCK_N)
    patch = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - patch * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    m = ((patch * GROUP + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (place // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, R)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + m[:, None] * K + k
    w_at = w_ptr + k[:, None] * STRIDE_WK + n * STRIDE_WN
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            x = tl.load(x_at, mask=m[:, None] < M, other=0.0)
            w = tl.load(w_at, mask=n[None, :] < N, other=0.0)
        else:
            x = tl.load(x_at, mask=(m[:, None] < M) & (k < K - start), other=0.0)
            w = tl.load(w_at, mask=(n[None, :] < N) & (k[:, None] < K - start), other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K * STRIDE_WK
    z = tl.load(z_ptr + m[:, None] * R + r, mask=m[:, None] < M, other=0.0)
    low = tl.load(low_ptr + r[:, None] * STRIDE_LR + n * STRIDE_LN, mask=(r[:, None] < rank) & (n < N), other=0.0)
    total = tl.dot(z, low, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + m[:, None] * N + n, total.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n < N))


@jit
def _outer_kernel(
    x_ptr, z_ptr, out_ptr, M, D, STRIDE_X, STRIDE_Z, rows_each,
    FACTOR: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Part of FACTOR * sum over m of x[m, d] z[m, r], [D, R], over `rows_each` rows. A constant: compiled code would give a float64."""
    split = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, R)
    total = tl.zeros((BLOCK_D, R), tl.float32)
    for start in range(split * rows_each, tl.minimum((split + 1) * rows_each, M), BLOCK_M):
        m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        x = tl.load(x_ptr + m[:, None] * STRIDE_X + d, mask=(m[:, None] < M) & (d < D), other=0.0)
        z = tl.load(z_ptr + m[:, None] * STRIDE_Z + r, mask=m[:, None] < M, other=0.0)
        total += tl.dot(tl.trans(x), z, input_precision="ieee")
    tl.store(out_ptr + (split * D + d[:, None]).to(tl.int64) * R + r, FACTOR * total, mask=d[:, None] < D)


def skinny_product(x_MK: Tensor, w_Kr: Tensor) -> Tensor:
    """x w, [M, R] in x's dtype, zero beyond the rank r of w [K, r]. x: rows contiguous, w: any strides."""
    M, K = x_MK.shape
    rank = w_Kr.shape[1]
    R = padded_rank(rank)
    z = x_MK.new_empty(M, R)
    blocks = {"BLOCK_M": 32, "BLOCK_K": block_for(K, 128), "num_warps": 4}
    _skinny_kernel[(cdiv(M, blocks["BLOCK_M"]),)](
        x_MK, w_Kr, z, M, K, rank, x_MK.stride(0), w_Kr.stride(0), w_Kr.stride(1), R=R, **blocks
    )
    return z


def two_term_product(x_MK: Tensor, w_KN: Tensor, z_MR: Tensor, low_rN: Tensor, bias_N: Tensor | None) -> Tensor:
    """x w + z low (+ bias), [M, N], all of it in one float32 accumulator. w, low: any strides; the columns of z beyond r are zero."""
    M, K = x_MK.shape
    N, R = w_KN.shape[1], z_MR.shape[1]
    block_m, block_n, block_k, warps, stages = PRODUCT_BLOCKS
    block_m, block_n, block_k = (
        block_for(M, block_m),
        block_for(N, block_n),
        block_for(K, block_k * 2 // x_MK.element_size()),
    )
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
    out = x_MK.new_empty(M, N)
    _product_kernel[(cdiv(M, block_m) * cdiv(N, block_n),)](
        x_MK, w_KN, z_MR, low_rN, x_MK if bias_N is None else bias_N, out, M, N, K, low_rN.shape[0],
        w_KN.stride(0), w_KN.stride(1), low_rN.stride(0), low_rN.stride(1),
        R=R, BIAS=bias_N is not None, EVEN=K % block_k == 0, GROUP=8, **blocks,
    )  # fmt: skip
    return out


def outer_product(x_MD: Tensor, z_MR: Tensor, factor: float = 1.0) -> Tensor:
    """factor * x^T z, [D, R] in float32. x and z may be column slices of wider rows."""
    M, D = x_MD.shape
    R = z_MR.shape[1]
    blocks = {"BLOCK_M": 64, "BLOCK_D": block_for(D, 128), "num_warps": 4}
    across = cdiv(D, blocks["BLOCK_D"])
    splits = splits_for(M, across, blocks["BLOCK_M"])
    rows_each = cdiv(cdiv(M, splits), blocks["BLOCK_M"]) * blocks["BLOCK_M"]
    parts = x_MD.new_empty(splits, D, R, dtype=torch.float32)
    _outer_kernel[(across, splits)](
        x_MD, z_MR, parts, M, D, x_MD.stride(0), z_MR.stride(0), rows_each, FACTOR=float(factor), R=R, **blocks
    )
    return column_sums(parts.flatten(1)).view(D, R)


def scaled_up(up_Nr: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s B in a dtype, contiguous; one pass over it."""
    return torch.mul(up_Nr, scale, out=torch.empty(up_Nr.shape, dtype=dtype, device=up_Nr.device))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        rows = x.flatten(0, -2).contiguous()
        a, b = down.to(x.dtype), scaled_up(up, scale, x.dtype)
        z = skinny_product(rows, a.T)
        ctx.save_for_backward(rows, weight, a, b, z)
        ctx.shape, ctx.scale, ctx.dtypes = x.shape, scale, (down.dtype, up.dtype)
        return two_term_product(rows, weight.T, z, b.T, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, z = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1]).contiguous()
        dz = skinny_product(dy, b)
        dx = two_term_product(dy, weight, dz, a, None).view(ctx.shape) if ctx.needs_input_grad[0] else None
        rank = a.shape[0]
        ddown = outer_product(rows, dz)[:, :rank].T.to(ctx.dtypes[0])
        dup = outer_product(dy, z, ctx.scale)[:, :rank].to(ctx.dtypes[1])
        return dx, None, None, ddown, dup, None


class _LoRALinearExtended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, scale: float, K: int) -> Tensor:
        # Of x only the few low-rank columns are kept: a view would keep all of it alive.
        ctx.save_for_backward(weight, x[..., K:].flatten(0, -2).clone())
        ctx.shape, ctx.scale, ctx.up = x.shape, scale, (up.shape[1], up.dtype)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, z = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1]).contiguous()
        dx = (dy @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        rank, dtype = ctx.up
        dup = outer_product(dy, z, ctx.scale)[:, :rank].to(dtype)
        return dx, None, None, dup, None, None


def _check_up(name: str, weight: Tensor, bias: Tensor, up: Tensor) -> None:
    N = weight.shape[0]
    check(bias.shape == (N,), f"{name}: bias is {list(bias.shape)}, weight {list(weight.shape)} needs [{N}]")
    check(
        up.ndim == 2 and up.shape[0] == N and up.device == weight.device,
        f"{name}: up is {list(up.shape)} on {up.device}, weight {list(weight.shape)} on {weight.device} needs [{N}, r]",
    )
    padded_rank(up.shape[1])


def lora_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor, down_rK: Tensor, up_Nr: Tensor, scale: float) -> Tensor:
    """x W^T + b + scale (x A^T) B^T, [..., N]; differentiable in x, down and up: W and b are frozen.

    x: [..., K], and weight and bias of its dtype. down (A), up (B): any float dtype (float32 masters are cast), r from 1 to 64.
    Raises ValueError when shapes, dtypes or devices disagree, or when weight or bias want a gradient.
    """
    N, K = weight_NK.shape
    check_runs("lora_linear", x, weight_NK, bias_N)
    check(x.ndim >= 2 and x.shape[-1] == K, f"lora_linear: x is {list(x.shape)}, weight {[N, K]} needs [..., {K}]")
    _check_up("lora_linear", weight_NK, bias_N, up_Nr)
    rank = up_Nr.shape[1]
    check(
        down_rK.shape == (rank, K) and down_rK.device == x.device,
        f"lora_linear: down is {list(down_rK.shape)} on {down_rK.device}, weight and up need {[rank, K]} on {x.device}",
    )
    check(
        not (torch.is_grad_enabled() and (weight_NK.requires_grad or bias_N.requires_grad)),
        "lora_linear: weight and bias must be frozen; to train them use F.linear",
    )
    return _LoRALinear.apply(x, weight_NK, bias_N, down_rK, up_Nr, scale)  # type: ignore[return-value]


@torch.no_grad()
def extend_weight(weight_NK: Tensor, rank: int) -> Tensor:
    """[W, 0], [N, K + R]: storage for `write_up`, made once; a view of its first K columns can stand for W itself."""
    return F.pad(weight_NK, (0, padded_rank(rank)))


@torch.no_grad()
def write_up(extended: Tensor, up_Nr: Tensor, scale: float) -> None:
    """Write s B into the columns kept for it; call it whenever B has changed."""
    start = extended.shape[1] - padded_rank(up_Nr.shape[1])
    extended[:, start : start + up_Nr.shape[1]] = scale * up_Nr


def lora_linear_extended(x_ext: Tensor, weight_ext: Tensor, bias_N: Tensor, up_Nr: Tensor, scale: float) -> Tensor:
    """[x, x A^T] [W, s B]^T + b, [..., N]; differentiable in x_ext and up. Any device: the product is the library's.

    x_ext: [..., K + R] as `norm_modulate` with a down projection gives it. weight_ext: [N, K + R] of the same dtype, from
    `extend_weight` and `write_up`: the value of B is read from there, `up` [N, r] only receives the gradient.
    Raises ValueError when shapes disagree, or when weight or bias want a gradient.
    """
    R = padded_rank(up_Nr.shape[1])
    check(
        x_ext.shape[-1] == weight_ext.shape[1] > R,
        f"lora_linear_extended: x is {list(x_ext.shape)}, weight {list(weight_ext.shape)}; both need K + {R} columns",
    )
    _check_up("lora_linear_extended", weight_ext, bias_N, up_Nr)
    check(
        not (torch.is_grad_enabled() and (weight_ext.requires_grad or bias_N.requires_grad)),
        "lora_linear_extended: weight and bias must be frozen; to train them use F.linear",
    )
    return _LoRALinearExtended.apply(x_ext, weight_ext, bias_N, up_Nr, scale, weight_ext.shape[1] - R)  # type: ignore[return-value]
