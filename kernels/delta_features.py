"""The final-layer delta on cached features: loss and gradient of one step, and the sums that the closed forms need.

With W' = W diag(1 + scale_t) of a draw, the error at a token is e = r - w (what the delta adds), r the residual, w 1 where an
output counts. The loss is the mean over draws of sum e^2 / sum w (engine/methods/delta.py).

Site mid, and post with scale_t = 0: the delta adds W' d, the same at every token, so a step needs no features at all, only
sum w, sum r and sum r^2 of each draw. `residual_sums` makes them in one read; they are the closed forms' statistics too.

Site pre: it adds W' (LN(h + d) - LN(h)). Write x' for x less its mean over the channels; then LN(h + d) = rho (h' + d') with
one number rho a token, and W' LN(h + d) = rho (p + W' d'), where p = W' h' never changes and is kept, as are the mean of h and
r + w W' LN(h), from which the error then needs one subtraction. No matrix product is left in a step. The gradient needs none
either: with E = sum of rho e over tokens and c = rho (e . W' LN(h + d)) / D, dL/dd is proportional to
(W'^T E)' - sum of c LN(h + d). So one read of h gives a token's rho, then its e, then its part of the sums, all in float32.
Partial sums of programs are added in a fixed order.
Axes: K draws, N tokens, D channels, C outputs (at most 64 for the published model).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .common import cdiv, check, check_runs, jit, power_of_two

EPS = 1e-6
BLOCK_N = 2  # tokens that a program holds at a time
WARPS = 4
PROGRAMS = 792  # six on each multiprocessor of a Hopper card


def added_reference(features: Tensor, maps: Tensor, delta: Tensor) -> Tensor:
    """What a delta adds at site pre, [K, N, C], in the dtype given. features: [K, N, D]; maps (W'): [K, C, D]; delta: [K, D]."""
    D = features.shape[-1:]
    moved = F.layer_norm(features + delta[:, None], D, eps=EPS) - F.layer_norm(features, D, eps=EPS)
    return moved @ maps.mT


def loss_reference(features: Tensor, residual: Tensor, weight: Tensor | None, maps: Tensor, delta: Tensor) -> Tensor:
    """The loss at site pre; weight: [N, C] or None where all outputs count. Differentiable in delta [K, D]."""
    weight = torch.ones_like(residual[0]) if weight is None else weight
    error = residual - added_reference(features, maps, delta) * weight
    return (error.square().sum((1, 2)) / weight.sum()).mean()


@dataclass(frozen=True)
class Features:
    """What a step reads; float32 but for the features. features: [K, N, D], as the network gives them, and their means [K, N];
    target: residual + weight * W' LN(h), [K, N, C]; weight: [N, C] of 0 and 1, or None; maps (W'): [K, C, D]; projected (p):
    [K, N, C]."""

    features: Tensor
    means: Tensor
    target: Tensor
    weight: Tensor | None
    maps: Tensor
    projected: Tensor


@torch.no_grad()
def prepare(features_KND: Tensor, residual_KNC: Tensor, weight_NC: Tensor | None, maps_KCD: Tensor) -> Features:
    """Check the shapes and make what stays the same over all steps, once. Raises ValueError when they disagree."""
    K, N, D = features_KND.shape
    C = maps_KCD.shape[1]
    check(
        maps_KCD.shape == (K, C, D) and residual_KNC.shape == (K, N, C),
        f"delta_features: features are {[K, N, D]}, residual {list(residual_KNC.shape)}, maps {list(maps_KCD.shape)}; "
        f"they need [{K}, {N}, C] and [{K}, C, {D}]",
    )
    check(
        weight_NC is None or weight_NC.shape == (N, C),
        f"delta_features: weight is {None if weight_NC is None else list(weight_NC.shape)}, needs {[N, C]}",
    )
    for name, t in (("residual", residual_KNC), ("maps", maps_KCD), ("weight", weight_NC)):
        check(
            t is None or t.dtype == torch.float32,
            f"delta_features: {name} must be float32, was {None if t is None else t.dtype}",
        )
    means = torch.stack([h.float().mean(-1) for h in features_KND])
    target, projected = torch.empty_like(residual_KNC), torch.empty_like(residual_KNC)
    for k in range(K):
        centred = features_KND[k].float() - means[k, :, None]
        projected[k] = centred @ maps_KCD[k].T
        before = projected[k] * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
        target[k] = residual_KNC[k] + (before if weight_NC is None else before * weight_NC)
    weight = None if weight_NC is None else weight_NC.contiguous()
    return Features(features_KND.contiguous(), means, target, weight, maps_KCD.contiguous(), projected)


@jit
def _moved(h_ptr, row, real, d, mean, delta, D: tl.constexpr):
    """(h + d) less its mean over the channels, for the channels d."""
    inside = real[:, None] & (d < D)
    h = tl.load(h_ptr + row[:, None] * D + d, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, h - mean[:, None] + delta, 0.0)


@jit
def _pre_kernel(
    h_ptr, mean_ptr, target_ptr, projected_ptr, weight_ptr, delta_ptr, map_delta_ptr, loss_ptr, along_ptr, pulled_ptr,
    N, tokens_each,
    D: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Over `tokens_each` tokens of one draw: sum of e^2, E = sum of rho e [C], sum of c LN(h + d) [D].

    The channels are held as a power of two and a rest (1152 = 1024 + 128), not padded to the next power of two.
    """
    draw = tl.program_id(1).to(tl.int64)
    part = draw * tl.num_programs(0) + tl.program_id(0)
    d, c = tl.arange(0, MAIN), tl.arange(0, BLOCK_C)
    delta = tl.load(delta_ptr + draw * D + d)
    pulled = tl.zeros((BLOCK_N, MAIN), tl.float32)
    if TAIL > 0:
        d_tail = MAIN + tl.arange(0, TAIL)
        delta_tail = tl.load(delta_ptr + draw * D + d_tail, mask=d_tail < D, other=0.0)
        pulled_tail = tl.zeros((BLOCK_N, TAIL), tl.float32)
    map_delta = tl.load(map_delta_ptr + draw * C + c, mask=c < C, other=0.0)
    loss = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    along = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    first = tl.program_id(0) * tokens_each
    last = tl.minimum(first + tokens_each, N)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        real = n < last
        row = draw * N + n
        mean = tl.load(mean_ptr + row, mask=real, other=0.0)
        at = row[:, None] * C + c
        counted = real[:, None] & (c < C)
        target = tl.load(target_ptr + at, mask=counted, other=0.0)
        projected = tl.load(projected_ptr + at, mask=counted, other=0.0)
        moved = _moved(h_ptr, row, real, d, mean, delta, D)
        square = tl.sum(moved * moved, 1)
        if TAIL > 0:
            moved_tail = _moved(h_ptr, row, real, d_tail, mean, delta_tail, D)
            square += tl.sum(moved_tail * moved_tail, 1)
        rho = tl.rsqrt(square / D + EPS)
        after = rho[:, None] * (projected + map_delta)
        if WEIGHT:
            weight = tl.load(weight_ptr + n[:, None] * C + c, mask=counted, other=0.0)
            e = target - weight * after  # zero where the weight is, because the target is too
        else:
            e = target - tl.where(counted, after, 0.0)
        loss += e * e
        along += rho[:, None] * e
        pull = rho * rho * tl.sum(e * after, 1) / D
        pulled += pull[:, None] * moved
        if TAIL > 0:
            pulled_tail += pull[:, None] * moved_tail
    tl.store(loss_ptr + part, tl.sum(tl.sum(loss, 1), 0))
    tl.store(along_ptr + part * C + c, tl.sum(along, 0), mask=c < C)
    tl.store(pulled_ptr + part * D + d, tl.sum(pulled, 0))
    if TAIL > 0:
        tl.store(pulled_ptr + part * D + d_tail, tl.sum(pulled_tail, 0), mask=d_tail < D)


@jit
def _sums_kernel(
    residual_ptr, weight_ptr, sum_ptr, square_ptr, count_ptr, N, tokens_each,
    C: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Over `tokens_each` tokens of one draw: sums of r, r^2 and w for each output."""
    draw = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    first = tl.program_id(0) * tokens_each
    for start in range(first, tl.minimum(first + tokens_each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        counted = (n < tl.minimum(first + tokens_each, N))[:, None] & (c < C)
        r = tl.load(residual_ptr + (draw * N + n[:, None]) * C + c, mask=counted, other=0.0)
        total += r
        square += r * r
        if WEIGHT:
            count += tl.load(weight_ptr + n[:, None] * C + c, mask=counted, other=0.0)
        else:
            count += tl.where(counted, 1.0, 0.0)
    at = (draw * tl.num_programs(0) + tl.program_id(0)) * C + c
    tl.store(sum_ptr + at, tl.sum(total, 0), mask=c < C)
    tl.store(square_ptr + at, tl.sum(square, 0), mask=c < C)
    tl.store(count_ptr + at, tl.sum(count, 0), mask=c < C)


def _parts(N: int, K: int, block: int) -> tuple[int, int]:
    """Programs a draw, and tokens of each."""
    tokens_each = cdiv(cdiv(N, max(1, PROGRAMS // K)), block) * block
    return cdiv(N, tokens_each), tokens_each


@torch.no_grad()
def pre_loss_and_gradient(cached: Features, delta_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of site pre and its gradient for the delta of every draw, [K, D] float32; one read of the features.

    delta: [K, D] float32 (draws that share a vector repeat it, and add up their rows of the gradient).
    Raises ValueError when shapes, dtypes or devices disagree.
    """
    K, N, D = cached.features.shape
    C = cached.maps.shape[1]
    check_runs("pre_loss_and_gradient", delta_KD, cached.target, cached.maps)
    check_runs("pre_loss_and_gradient", cached.features)
    check(delta_KD.shape == (K, D), f"pre_loss_and_gradient: delta is {list(delta_KD.shape)}, needs {[K, D]}")
    delta = delta_KD - delta_KD.mean(-1, keepdim=True)
    map_delta = (cached.maps * delta[:, None]).sum(-1)  # [K, C]; not a matrix product, which might round to TF32
    programs, tokens_each = _parts(N, K, BLOCK_N)
    loss = delta.new_empty(K, programs)
    along, pulled = delta.new_empty(K, programs, C), delta.new_empty(K, programs, D)
    weight = cached.weight
    main = power_of_two(D + 1) // 2
    _pre_kernel[(programs, K)](
        cached.features, cached.means, cached.target, cached.projected, cached.target if weight is None else weight,
        delta, map_delta, loss, along, pulled, N, tokens_each,
        D=D, C=C, EPS=EPS, WEIGHT=weight is not None, BLOCK_N=BLOCK_N,
        MAIN=main, TAIL=power_of_two(D - main) if main < D else 0, BLOCK_C=power_of_two(C), num_warps=WARPS,
    )  # fmt: skip
    total = N * C if weight is None else weight.sum()
    back = (cached.maps * along.sum(1)[:, :, None]).sum(1)  # W'^T E, [K, D]
    gradient = back - back.mean(-1, keepdim=True) - pulled.sum(1)
    return loss.sum() / (total * K), gradient * (-2.0 / K) / total


@dataclass(frozen=True)
class ResidualSums:
    """Of each draw, float64: r and w summed over the tokens, [K, C] each, and the squares of r, [K]."""

    residual: Tensor
    count: Tensor
    square: Tensor


def residual_sums_reference(residual: Tensor, weight: Tensor | None) -> ResidualSums:
    weight = torch.ones_like(residual[0]) if weight is None else weight
    return ResidualSums(residual.sum(1), weight.sum(0).expand(residual.shape[0], -1), residual.square().sum((1, 2)))


@torch.no_grad()
def residual_sums(residual_KNC: Tensor, weight_NC: Tensor | None) -> ResidualSums:
    """The sums from which sites mid and post are solved or stepped, in one read. Raises ValueError as `prepare`."""
    K, N, C = residual_KNC.shape
    check_runs("residual_sums", residual_KNC, *(() if weight_NC is None else (weight_NC,)))
    check(residual_KNC.dtype == torch.float32, f"residual_sums: residual must be float32, was {residual_KNC.dtype}")
    check(
        weight_NC is None or weight_NC.shape == (N, C),
        f"residual_sums: weight is {None if weight_NC is None else list(weight_NC.shape)}, needs {[N, C]}",
    )
    residual = residual_KNC.contiguous()
    programs, tokens_each = _parts(N, K, 16)
    total, square, count = (residual.new_empty(K, programs, C) for _ in range(3))
    _sums_kernel[(programs, K)](
        residual, residual if weight_NC is None else weight_NC.contiguous(), total, square, count, N, tokens_each,
        C=C, WEIGHT=weight_NC is not None, BLOCK_N=16, BLOCK_C=power_of_two(C), num_warps=4,
    )  # fmt: skip
    wide = torch.float64
    return ResidualSums(total.sum(1, dtype=wide), count.sum(1, dtype=wide), square.sum((1, 2), dtype=wide))


@torch.no_grad()
def linear_loss_and_gradient(sums: ResidualSums, maps_KCD: Tensor, delta_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of sites mid and post (maps W' or W) and its gradient for every draw's delta, [K, D]; reads no features."""
    K = delta_KD.shape[0]
    # The loss is a difference of sums that are larger than it: a few numbers a draw, in float64.
    added = (maps_KCD * delta_KD[:, None]).sum(-1, dtype=torch.float64)  # [K, C]
    pull = sums.count * added - sums.residual
    total = sums.count.sum(-1)
    loss = (sums.square + (added * (pull - sums.residual)).sum(-1)) / total
    pull *= 2.0 / (K * total[:, None])
    return loss.mean().float(), (maps_KCD * pull.float()[:, :, None]).sum(1)
