"""Queries, keys and values for attention from one projection: RMS norm, 3-D rotation and regrouping by window in one pass.

Rounding follows the official model (attention.py's RMSNorm): x / rms(x) is rounded to the input's dtype, so is its product
with the weight; the rotation (arXiv:2104.09864, eq. 34) then runs in float32 and is rounded once. The tables of cosines and
sines, rounded by the official rule, are inputs. The backward turns by the negated angle. What is normalised it reads from the
projection, or turns back from the results: those are kept for attention anyway, so that the projection, three widths of the network a
token, need not be. Their rounding then reaches the gradient, where it is divided by the norm's weights: only for weights that are
frozen and, in a pair, of like size (`turns_back`).
Axes: B samples, N tokens, H heads, d channels of a head, P = d / 2 pairs.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .column_sums import column_sums
from .common import cdiv, check, check_runs, jit, power_of_two
from .windows import WINDOW, Grid, group_windows, window_row

BLOCK = 16  # (token, head) pairs of a program: the backward holds several numbers of each channel
LARGEST_RATIO = 8.0  # of a pair's weights: rounding of the larger reaches the smaller so many times as large


def qk_norm_rope_reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    windows: Grid | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mathematics, in whatever dtype the inputs have: what the model's plain path computes, then regrouped."""
    d = q_weight.shape[0]
    q, k, v = qkv.unflatten(-1, (3, -1, d)).unbind(2)  # [B, N, H, d]
    repeats = qkv.shape[1] // cos.shape[0]

    def norm_rope(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = (table.repeat(repeats, 1)[:, None, :] for table in (cos, sin))
        return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2).to(x.dtype)

    outs = norm_rope(q, q_weight), norm_rope(k, k_weight), v
    q, k, v = (t.flatten(0, 1) if windows is None else group_windows(t, windows) for t in outs)
    return q, k, v


@torch.no_grad()
def turns_back(*weights: Tensor) -> bool:
    """Whether rotated rows can be turned back and divided by these norms' weights [d] without making their rounding large: no weight
    of a pair is more than LARGEST_RATIO times the other."""
    pairs = torch.stack([weight.float().abs().unflatten(0, (-1, 2)) for weight in weights])
    return bool((pairs.amax(-1) <= LARGEST_RATIO * pairs.amin(-1)).all() and (pairs > 0).all())


@jit
def _turn(x, cos, sin, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Turn the channel pairs of x [BLOCK, BLOCK_D] by angles [BLOCK, BLOCK_D / 2]."""
    a, b = tl.split(tl.reshape(x, (BLOCK, BLOCK_D // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK, BLOCK_D))


@jit
def _normed(x, H_D: tl.constexpr, EPS: tl.constexpr):
    """x / rms(x), and 1 / rms(x), in float32; x is zero beyond the head's channels."""
    rstd = tl.rsqrt(tl.sum(x * x, 1) / H_D + EPS)[:, None]
    return x * rstd, rstd


@jit
def _places(
    pairs, samples, H: tl.constexpr, H_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """For a program's (token, head) pairs: token, offsets in the projection and in q, k or v, and which are real."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, head = pair // H, pair % H
    to = token
    if WINDOW > 0:
        to = window_row(token, samples, FRAMES, ROWS, COLS, WINDOW)
    d = tl.arange(0, BLOCK_D)
    projected = (token.to(tl.int64) * (3 * H * H_D) + head * H_D)[:, None] + d
    grouped = (to.to(tl.int64) * (H * H_D) + head * H_D)[:, None] + d
    return token, projected, grouped, (pair < pairs)[:, None] & (d < H_D)


@jit
def _angles(cos_ptr, sin_ptr, token, real, table_rows, H_D: tl.constexpr, BLOCK_D: tl.constexpr):
    p = tl.arange(0, BLOCK_D // 2)
    at = (token % table_rows)[:, None] * (H_D // 2) + p
    inside = real & (p < H_D // 2)
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)


@jit
def _forward_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, rstd_ptr, pairs, samples, table_rows,
    H: tl.constexpr, H_D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WINDOW: tl.constexpr, RESULTS: tl.constexpr,
):  # fmt: skip
    token, projected, grouped, inside = _places(pairs, samples, H, H_D, BLOCK, BLOCK_D, FRAMES, ROWS, COLS, WINDOW)
    real = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) < pairs)[:, None]
    cos, sin = _angles(cos_ptr, sin_ptr, token, real, table_rows, H_D, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    for part in tl.static_range(3):  # type: ignore
        x = tl.load(qkv_ptr + projected + part * (H * H_D), mask=inside, other=0.0)
        if part == 2:
            tl.store(v_ptr + grouped, x, mask=inside)
        else:
            weight_ptr = q_weight_ptr if part == 0 else k_weight_ptr
            out_ptr = q_ptr if part == 0 else k_ptr
            weight = tl.load(weight_ptr + d, mask=d < H_D, other=0.0).to(tl.float32)
            normed, rstd = _normed(x.to(tl.float32), H_D, EPS)
            if RESULTS:
                pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
                tl.store(rstd_ptr + (2 * pair + part), rstd, mask=pair < pairs)
            weighted = (normed.to(x.dtype).to(tl.float32) * weight).to(x.dtype).to(tl.float32)
            tl.store(out_ptr + grouped, _turn(weighted, cos, sin, BLOCK, BLOCK_D).to(x.dtype), mask=inside)


@jit
def _backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, q_ptr, k_ptr, rstd_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dqkv_ptr,
    dweight_ptr, pairs, samples, table_rows,
    H: tl.constexpr, H_D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WINDOW: tl.constexpr, RESULTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """RESULTS: what is normalised comes from q, k and 1 / rms of each row, else from the projection."""
    token, projected, grouped, inside = _places(pairs, samples, H, H_D, BLOCK, BLOCK_D, FRAMES, ROWS, COLS, WINDOW)
    real = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) < pairs)[:, None]
    cos, sin = _angles(cos_ptr, sin_ptr, token, real, table_rows, H_D, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    if RESULTS:
        # Rounded cosines and sines turn and stretch a little; turning back divides by the stretch too.
        stretch = cos * cos + sin * sin
        stretch = tl.where(stretch > 0, stretch, 1.0)
        back_cos, back_sin = cos / stretch, -sin / stretch
    for part in tl.static_range(3):  # type: ignore
        if part == 2:
            tl.store(
                dqkv_ptr + projected + part * (H * H_D), tl.load(dv_ptr + grouped, mask=inside, other=0.0), mask=inside
            )
        else:
            dout_ptr = dq_ptr if part == 0 else dk_ptr
            weight_ptr = q_weight_ptr if part == 0 else k_weight_ptr
            dout = tl.load(dout_ptr + grouped, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + d, mask=d < H_D, other=1.0).to(tl.float32)
            if RESULTS:
                out_ptr = q_ptr if part == 0 else k_ptr
                out = tl.load(out_ptr + grouped, mask=inside, other=0.0).to(tl.float32)
                normed = _turn(out, back_cos, back_sin, BLOCK, BLOCK_D) / weight
                pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
                rstd = tl.load(rstd_ptr + (2 * pair + part), mask=pair < pairs, other=0.0)
            else:
                x = tl.load(qkv_ptr + projected + part * (H * H_D), mask=inside, other=0.0)
                normed, rstd = _normed(x.to(tl.float32), H_D, EPS)
            dweighted = _turn(dout, cos, -sin, BLOCK, BLOCK_D)
            if WEIGHTS:
                at = (tl.program_id(0).to(tl.int64) * 2 + part) * H_D + d
                tl.store(dweight_ptr + at, tl.sum(dweighted * normed, 0), mask=d < H_D)
            g = dweighted * weight
            dx = rstd * (g - normed * (tl.sum(g * normed, 1) / H_D)[:, None])
            tl.store(dqkv_ptr + projected + part * (H * H_D), dx.to(dqkv_ptr.dtype.element_ty), mask=inside)


def _launch_options(heads: int, d: int, windows: Grid | None, eps: float) -> dict[str, Any]:
    frames, rows, cols = windows or (1, 1, 1)
    return {
        "H": heads, "H_D": d, "EPS": eps, "BLOCK": BLOCK, "BLOCK_D": power_of_two(d),
        "FRAMES": frames, "ROWS": rows, "COLS": cols, "WINDOW": WINDOW if windows else 0, "num_warps": 4,
    }  # fmt: skip


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        windows: Grid | None,
        eps: float,
        results: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv.contiguous()
        B, N, width = qkv.shape
        d = q_weight.shape[0]
        heads = width // (3 * d)
        q, k, v = (qkv.new_empty(B * N, heads, d) for _ in range(3))
        pairs = B * N * heads
        rstd = qkv.new_empty(pairs if results else 1, 2, dtype=torch.float32)
        _forward_kernel[(cdiv(pairs, BLOCK),)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            q,
            k,
            v,
            rstd,
            pairs,
            B,
            cos.shape[0],
            RESULTS=results,
            **_launch_options(heads, d, windows, eps),
        )
        kept = (q, k, rstd) if results else (qkv,)
        ctx.save_for_backward(q_weight, k_weight, cos, sin, *kept)
        ctx.samples, ctx.windows, ctx.eps, ctx.results = B, windows, eps, results
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        q_weight, k_weight, cos, sin, *kept = ctx.saved_tensors
        q, k, rstd = kept if ctx.results else (dq, dq, dq)
        rows, heads, d = dq.shape
        B, pairs = ctx.samples, rows * heads
        programs = cdiv(pairs, BLOCK)
        weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dqkv = dq.new_empty(B, rows // B, 3 * heads * d)
        parts = dq.new_empty(programs if weights else 1, 2, d, dtype=torch.float32)
        _backward_kernel[(programs,)](
            dq.contiguous(), dk.contiguous(), dv.contiguous(), dq if ctx.results else kept[0], q, k, rstd, q_weight, k_weight,
            cos, sin, dqkv, parts, pairs, B, cos.shape[0], RESULTS=ctx.results, WEIGHTS=weights,
            **_launch_options(heads, d, ctx.windows, ctx.eps),
        )  # fmt: skip
        if not weights:
            return dqkv, None, None, None, None, None, None, None
        dq_weight, dk_weight = column_sums(parts.flatten(1), q_weight.dtype).view(2, d)
        return dqkv, dq_weight, dk_weight, None, None, None, None, None


def qk_norm_rope(
    qkv_BNE: Tensor,
    q_weight_d: Tensor,
    k_weight_d: Tensor,
    cos_SP: Tensor,
    sin_SP: Tensor,
    windows: Grid | None = None,
    eps: float = 1e-6,
    results: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each [B * N, H, d]; differentiable in the projection and the norms' weights.

    qkv: [B, N, 3 * H * d], ordered (q | k | v, head, channel). Weights: [d], qkv's dtype. cos, sin: [S, d / 2], any float
    dtype; token n takes row n mod S (S = tokens of a frame, or all N). windows: the token grid, to group the rows by window
    (`windows.split_windows` gives their views); None keeps the order, where a frame's tokens already follow one another. results: keep
    q and k for the backward and not the projection, for frozen weights that `turns_back` allows.
    Raises ValueError when shapes, dtypes or devices disagree, or when `results` is asked for and a weight wants a gradient.
    """
    N, width = qkv_BNE.shape[1:]
    d = q_weight_d.shape[0]
    check_runs("qk_norm_rope", qkv_BNE, q_weight_d, k_weight_d)
    check_runs("qk_norm_rope", cos_SP, sin_SP)
    check(
        d % 2 == 0 and q_weight_d.shape == k_weight_d.shape == (d,) and width % (3 * d) == 0,
        f"qk_norm_rope: weights are {list(q_weight_d.shape)} and {list(k_weight_d.shape)}; both need [d], d even, "
        f"with 3 * heads * d the projection's width {width}",
    )
    S = cos_SP.shape[0]
    check(
        cos_SP.shape == sin_SP.shape == (S, d // 2) and N % S == 0 and cos_SP.device == qkv_BNE.device,
        f"qk_norm_rope: tables are {list(cos_SP.shape)} and {list(sin_SP.shape)} on {cos_SP.device}; "
        f"{N} tokens of head dimension {d} need [S, {d // 2}] on {qkv_BNE.device} with S a divisor of {N}",
    )
    check(windows is None or windows.tokens == N, f"qk_norm_rope: windows are {windows}, the projection has {N} tokens")
    check(
        not (results and torch.is_grad_enabled() and (q_weight_d.requires_grad or k_weight_d.requires_grad)),
        "qk_norm_rope: the gradients of the norms' weights need the projection; leave results off",
    )
    return _QKNormRope.apply(  # type: ignore[return-value]
        qkv_BNE,
        q_weight_d.contiguous(),
        k_weight_d.contiguous(),
        cos_SP.contiguous(),
        sin_SP.contiguous(),
        windows,
        eps,
        results,
    )
