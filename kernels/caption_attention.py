"""Attention of every token to a caption, in one pass: the first tokens to one caption, the rest to another.

Known frames attend to the null caption and the others to the prompt, and a caption has few keys: a program holds a block of a head's
queries, goes through the keys, and writes where the result belongs, so that the two parts need no second launch and no copy that joins
them. Keys that fit one block are loaded once for several blocks of queries. The backward computes the probabilities again; it makes
gradients of keys and values only where they are asked for, in parts that are added in a fixed order.
Axes: B samples, N tokens, L tokens of a caption, H heads, d channels of a head; D is d rounded up to a power of two.
"""

# pyright: reportUnboundVariable=false, reportGeneralTypeIssues=false
# (a kernel gives some names a value only under a constexpr condition, and loops over a range of its own)

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .common import SMALLEST_DOT, block_for, cdiv, check, check_runs, jit, power_of_two

BLOCK_M = 64
WARPS = 4
BLOCK_L = 64
EACH = 4  # blocks of queries of a program whose keys fit one block, which it then loads once
STAGES = 2  # of the loop over them: the next block's queries are on their way
WITH_TEXT = {"BLOCK_M": 128, "num_warps": 8}
"""Where such a program also adds up gradients of keys and values: the larger its part of the queries, the fewer parts remain."""
LOG2_E = 1.4426950408889634


def caption_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, known_k: Tensor | None = None, known_v: Tensor | None = None, split: int = 0
) -> Tensor:
    """The mathematics, in whatever dtype the inputs have."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bnhd,blhd->bhnl", q, k.expand(q.shape[0], -1, -1, -1)) * q.shape[-1] ** -0.5
        return torch.einsum("bhnl,blhd->bnhd", scores.softmax(-1), v.expand(q.shape[0], -1, -1, -1))

    if known_k is None or known_v is None or split == 0:
        return attend(q, k, v)
    return torch.cat([attend(q[:, :split], known_k, known_v), attend(q[:, split:], k, v)], dim=1)


@jit
def _part(
    k_ptr, v_ptr, known_k_ptr, known_v_ptr, N, split, L, L_known, batch, batch_known, row, row_known, b, h,
    d: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program's tokens (the first, and one behind the last of its part), and which caption they attend to: its first key and value,
    their number and the stride between them."""
    group = tl.program_id(1)
    groups_known = tl.cdiv(split, ROWS)
    if group < groups_known:
        first, last = group * ROWS, split
        k, v = known_k_ptr + b * batch_known + h * d, known_v_ptr + b * batch_known + h * d
        keys, stride = L_known, row_known
    else:
        first, last = split + (group - groups_known) * ROWS, N
        k, v = k_ptr + b * batch + h * d, v_ptr + b * batch + h * d
        keys, stride = L, row
    return first, last, k, v, keys, stride


@jit
def _text(k_ptr, v_ptr, start, keys, stride, d: tl.constexpr, D: tl.constexpr, BLOCK_L: tl.constexpr):
    """A block of keys and values from `start` on, which of them are real, and where they lie among all."""
    key = start + tl.arange(0, BLOCK_L)
    c = tl.arange(0, D)
    there = (key < keys)[:, None] & (c < d)[None, :]
    at = key[:, None] * stride + c[None, :]
    return tl.load(k_ptr + at, mask=there, other=0.0), tl.load(v_ptr + at, mask=there, other=0.0), there, key


@jit
def _probabilities(q, k, lse, real, key, keys, scale):
    """Of a block of queries for a block of keys, from the logarithm of their sum."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where((key < keys)[None, :] & real[:, None], tl.exp2(s - lse[:, None]), 0.0)


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, known_k_ptr, known_v_ptr, out_ptr, lse_ptr, N, split, L, L_known,
    q_batch, q_row, batch, batch_known, row, row_known, scale,
    H: tl.constexpr, d: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    ONE: tl.constexpr, EACH: tl.constexpr, STAGES: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    first, last, k_ptr, v_ptr, keys, stride = _part(
        k_ptr, v_ptr, known_k_ptr, known_v_ptr, N, split, L, L_known, batch, batch_known, row, row_known, b, h,
        d, EACH * BLOCK_M,
    )  # fmt: skip
    c = tl.arange(0, D)
    if ONE:
        k, v, _, key = _text(k_ptr, v_ptr, 0, keys, stride, d, D, BLOCK_L)
    for i in tl.range(0, tl.minimum(EACH, tl.cdiv(last - first, BLOCK_M)), num_stages=STAGES):
        n = first + i * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (n < last)[:, None] & (c < d)[None, :]
        q = tl.load(q_ptr + b * q_batch + n[:, None] * q_row + h * d + c[None, :], mask=inside, other=0.0)
        if ONE:
            s = tl.where((key < keys)[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
            largest = tl.max(s, 1)
            p = tl.exp2(s - largest[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        else:
            largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            out = tl.zeros((BLOCK_M, D), tl.float32)
            for start in range(0, keys, BLOCK_L):
                k, v, _, key = _text(k_ptr, v_ptr, start, keys, stride, d, D, BLOCK_L)
                s = tl.where(
                    (key < keys)[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf")
                )
                now = tl.maximum(largest, tl.max(s, 1))
                p, less = tl.exp2(s - now[:, None]), tl.exp2(largest - now)
                total = total * less + tl.sum(p, 1)
                out = out * less[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
                largest = now
        at = (b * N + n[:, None]) * (H * d) + h * d + c[None, :]
        tl.store(out_ptr + at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
        if SAVE:
            tl.store(lse_ptr + (b * H + h) * N + n, largest + tl.log2(total), mask=n < last)


@jit
def _backward_kernel(
    q_ptr, k_ptr, v_ptr, known_k_ptr, known_v_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr,
    N, split, L, L_known, L_most, q_batch, q_row, batch, batch_known, row, row_known, scale, natural,
    H: tl.constexpr, d: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    ONE: tl.constexpr, EACH: tl.constexpr, STAGES: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    first, last, k_ptr, v_ptr, keys, stride = _part(
        k_ptr, v_ptr, known_k_ptr, known_v_ptr, N, split, L, L_known, batch, batch_known, row, row_known, b, h,
        d, EACH * BLOCK_M,
    )  # fmt: skip
    c = tl.arange(0, D)
    part = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * L_most
    if ONE:
        k, v, there, key = _text(k_ptr, v_ptr, 0, keys, stride, d, D, BLOCK_L)
        if TEXT:
            dk = tl.zeros((BLOCK_L, D), tl.float32)
            dv = tl.zeros((BLOCK_L, D), tl.float32)
    for i in tl.range(0, tl.minimum(EACH, tl.cdiv(last - first, BLOCK_M)), num_stages=STAGES):
        n = first + i * BLOCK_M + tl.arange(0, BLOCK_M)
        real = n < last
        inside = real[:, None] & (c < d)[None, :]
        at = (b * N + n[:, None]) * (H * d) + h * d + c[None, :]
        q = tl.load(q_ptr + b * q_batch + n[:, None] * q_row + h * d + c[None, :], mask=inside, other=0.0)
        dout = tl.load(dout_ptr + at, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + (b * H + h) * N + n, mask=real, other=0.0)
        # The mean of dp comes from the probabilities: taken from the rounded result instead it would cost accuracy.
        if ONE:
            p = _probabilities(q, k, lse, real, key, keys, scale)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
            dq = tl.dot(ds, k, input_precision="ieee")
            if TEXT:
                dk += tl.dot(tl.trans(ds), q, input_precision="ieee")
                dv += tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision="ieee")
        else:
            mean = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, keys, BLOCK_L):
                k, v, _, key = _text(k_ptr, v_ptr, start, keys, stride, d, D, BLOCK_L)
                p = _probabilities(q, k, lse, real, key, keys, scale)
                mean += tl.sum(p * tl.dot(dout, tl.trans(v), input_precision="ieee"), 1)
            dq = tl.zeros((BLOCK_M, D), tl.float32)
            for start in range(0, keys, BLOCK_L):
                k, v, there, key = _text(k_ptr, v_ptr, start, keys, stride, d, D, BLOCK_L)
                p = _probabilities(q, k, lse, real, key, keys, scale)
                ds = (p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - mean[:, None])).to(q.dtype)
                dq += tl.dot(ds, k, input_precision="ieee")
                if TEXT:  # EACH is 1 here
                    to = (part + key[:, None]) * d + c[None, :]
                    tl.store(dk_ptr + to, tl.dot(tl.trans(ds), q, input_precision="ieee") * natural, mask=there)
                    tl.store(dv_ptr + to, tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision="ieee"), mask=there)
        tl.store(dq_ptr + at, (dq * natural).to(dq_ptr.dtype.element_ty), mask=inside)
    if ONE and TEXT:
        to = (part + key[:, None]) * d + c[None, :]
        tl.store(dk_ptr + to, dk * natural, mask=there)
        tl.store(dv_ptr + to, dv, mask=there)


def _launch(
    q: Tensor, k: Tensor, known_k: Tensor, split: int, text: bool = False
) -> tuple[tuple[int, int], int, list[Any], dict[str, Any]]:
    """The grid, how many of its groups are of known frames, and the arguments that both kernels share."""
    B, N, H, d = q.shape
    longest = max(k.shape[1], known_k.shape[1] if split else 0)
    one = longest <= BLOCK_L
    options: dict[str, Any] = {
        "H": H, "d": d, "D": max(SMALLEST_DOT, power_of_two(d)), "BLOCK_M": BLOCK_M, "BLOCK_L": block_for(longest, BLOCK_L),
        "num_warps": 2 * WARPS if text else WARPS,  # for registers
        "ONE": one, "EACH": EACH if one else 1, "STAGES": STAGES if one else 1,
    }  # fmt: skip
    if not one:
        options["num_stages"] = 1
    elif text:
        options |= WITH_TEXT
    strides = [
        q.stride(0), q.stride(1), *(0 if t.shape[0] == 1 else t.stride(0) for t in (k, known_k)), k.stride(1), known_k.stride(1),
    ]  # fmt: skip
    rows = options["EACH"] * options["BLOCK_M"]
    known = cdiv(split, rows)
    return (B * H, known + cdiv(N - split, rows)), known, strides, options


@torch.library.custom_op("vidtta::caption_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, known_k: Tensor, known_v: Tensor, split: int, save: bool
) -> tuple[Tensor, Tensor]:
    """The result, and what the backward needs of the scores: the base-2 logarithm of the sum of their exponentials."""
    B, N, H, d = q.shape
    grid, _, strides, options = _launch(q, k, known_k, split)
    out, lse = q.new_empty(B, N, H, d), q.new_empty(*((B, H, N) if save else (0,)), dtype=torch.float32)
    _forward_kernel[grid](
        q, k, v, known_k, known_v, out, lse, N, split, k.shape[1], known_k.shape[1], *strides, d**-0.5 * LOG2_E,
        SAVE=save, **options,
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, known_k: Tensor, known_v: Tensor, split: int, save: bool
) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(*((B, H, N) if save else (0,)), dtype=torch.float32)


@torch.library.custom_op("vidtta::caption_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, known_k: Tensor, known_v: Tensor, lse: Tensor, dout: Tensor,
    split: int, text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, known k and known v; those of the text are empty unless asked for."""
    B, N, H, d = q.shape
    grid, known_groups, strides, options = _launch(q, k, known_k, split, text)
    L, L_known = k.shape[1], known_k.shape[1]
    dq, most = q.new_empty(B, N, H, d), max(L, L_known)
    parts = q.new_empty(*((2, grid[1], B * H, most, d) if text else (2, 0)), dtype=torch.float32)
    _backward_kernel[grid](
        q, k, v, known_k, known_v, lse, dout.contiguous(), dq, parts[0], parts[1],
        N, split, L, L_known, most, *strides, d**-0.5 * LOG2_E, d**-0.5, TEXT=text, **options,
    )  # fmt: skip
    if not text:
        return dq, q.new_empty(0), q.new_empty(0), q.new_empty(0), q.new_empty(0)

    def joined(parts: Tensor, like: Tensor) -> Tensor:
        found = parts[:, :, : like.shape[1]].sum(0).unflatten(0, (B, H)).transpose(1, 2)
        return (found.sum(0, keepdim=True) if like.shape[0] < B else found).to(like.dtype).contiguous()

    own, known = parts[:, known_groups:], parts[:, :known_groups]
    return dq, joined(own[0], k), joined(own[1], v), joined(known[0], known_k), joined(known[1], known_v)


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, known_k: Tensor, known_v: Tensor, lse: Tensor, dout: Tensor,
    split: int, text: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_text = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v, known_k, known_v)]
    return torch.empty_like(q, memory_format=torch.contiguous_format), *(
        of_text if text else (q.new_empty(0) for _ in range(4))
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, known_k, known_v, ctx.split, _ = inputs
    ctx.save_for_backward(q, k, v, known_k, known_v, output[1])


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    text = any(ctx.needs_input_grad[1:5])
    dq, *of_text = _backward(*ctx.saved_tensors, dout, ctx.split, text)
    return dq, *(of_text if text else [None] * 4), None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of equal strides, heads and channels dense; copies where they are not."""
    if k.stride() == v.stride() and k.stride()[2:] == (k.shape[3], 1):
        return k, v
    return k.contiguous(), v.contiguous()


def caption_attention(
    q: Tensor, k: Tensor, v: Tensor, known_k: Tensor | None = None, known_v: Tensor | None = None, split: int = 0
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of each head, [B, N, H, d]: of the first `split` tokens to the known frames' caption, of the rest to
    the other; differentiable in all.

    q: [B, N, H, d]. k, v: [B or 1, L, H, d]; known_k, known_v: the same with a length of their own, needed where split is not 0.
    All of one dtype. Raises ValueError when shapes, dtypes or devices disagree.
    """
    if known_k is None or known_v is None:
        check(split == 0, f"caption_attention: split is {split}, but there is no caption for the tokens before it")
        known_k, known_v = k, v
    check_runs("caption_attention", q, k, v, known_k, known_v)
    B, N, H, d = q.shape
    check(0 <= split <= N, f"caption_attention: split must be from 0 to {N} tokens, was {split}")
    for name, t in (("k", k), ("v", v), ("known_k", known_k), ("known_v", known_v)):
        check(
            t.ndim == 4 and t.shape[0] in (1, B) and t.shape[2:] == (H, d) and t.shape[1] > 0,
            f"caption_attention: {name} is {list(t.shape)}, q {list(q.shape)} needs [{B} or 1, L, {H}, {d}]",
        )
    check(v.shape == k.shape and known_v.shape == known_k.shape, "caption_attention: keys and values differ in shape")
    q = q if q.stride()[2:] == (d, 1) else q.contiguous()
    (k, v), (known_k, known_v) = _alike(k, v), _alike(known_k, known_v)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, known_k, known_v))
    return _forward(q, k, v, known_k, known_v, split, save)[0]
