"""The final-layer delta on cached features: loss and gradient of one step, and the sums that the closed forms need.

With W' = W diag(1 + scale_t) of a draw, the error at a token is e = r - w (what the delta adds), r the residual, w 1 where an
output counts. The loss is the mean over draws of sum e^2 / sum w (engine/methods/delta.py).

Site mid, and post with scale_t = 0: the delta adds W' d, the same at every token, so a step needs no features at all, only
sum w, sum r and sum r^2 of each draw. `residual_sums` makes them in one read; they are the closed forms' statistics too.

Site pre: it adds W' (LN(h + d) - LN(h)). Write x' for x less its mean over the channels, W'' for W' with every row so; then
LN(h + d) = rho (h' + d') with one number rho a token, and W' LN(h + d) = rho (p + W'' d'), where p = W'' h' never changes and is
kept, as are the mean of h and r + w W' LN(h), from which the error then needs one subtraction. No matrix product is left in a
step. The gradient needs none either: with E = sum of rho e over tokens and c = rho (e . W' LN(h + d)) / D, dL/dd is proportional
to W''^T E - sum of c LN(h + d). So one read of h gives a token's rho, then its e, then its part of the sums, all in float32.
A second kernel adds the programs' parts in a fixed order. What depends on d alone, d' and W'' d', comes with it (delta_step.py).
Axes: K draws, N tokens, D channels, C outputs (at most 64 for the published model), P parts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .common import cdiv, check, check_runs, head_and_rest, jit, power_of_two

EPS = 1e-6
# A warp alone has a token, so that no sum over its channels waits at a barrier.
BLOCK_N = 1  # tokens that a program holds at a time
WARPS = 1
STAGES = 4  # of the loop over tokens: one in use, the next three being loaded
PROGRAMS = 1584  # twelve on each multiprocessor of a Hopper card, which has registers for thirteen
BLOCK_D = 64  # channels, and
BLOCK_P = 64  # parts, that a program of the second kernel holds at a time


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
    target: residual + weight * W' LN(h), [K, N, C]; weight: [N, C] of 0 and 1, or None; total: how many numbers of a draw count;
    maps (W''): [K, C, D]; projected (p): [K, N, C]."""

    features: Tensor
    means: Tensor
    target: Tensor
    weight: Tensor | None
    total: int
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
    maps = (maps_KCD - maps_KCD.mean(-1, keepdim=True)).contiguous()
    means = residual_KNC.new_empty(K, N)
    target, projected = (residual_KNC.new_empty(K, N, C) for _ in range(2))
    for k in range(K):
        centred = features_KND[k].float()
        means[k] = centred.mean(-1)
        centred = centred - means[k, :, None]
        projected[k] = centred @ maps[k].T
        before = projected[k] * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
        target[k] = residual_KNC[k] + (before if weight_NC is None else before * weight_NC)
    weight = None if weight_NC is None else weight_NC.contiguous()
    total = N * C if weight is None else int(weight.count_nonzero())
    return Features(features_KND.contiguous(), means, target, weight, total, maps, projected)


@jit
def _moved(h_ptr, row, real, d, mean, delta, D: tl.constexpr, PADDED: tl.constexpr):
    """(h + d) less its mean over the channels, for the channels d, of which some lie past the last where they are padded."""
    inside = real[:, None] & (d < D) if PADDED else real[:, None]
    h = tl.load(h_ptr + row[:, None] * D + d, mask=inside, other=0.0).to(tl.float32)
    moved = h - mean[:, None] + delta
    return tl.where(inside, moved, 0.0) if PADDED else moved


@jit
def _pre_kernel(
    h_ptr, mean_ptr, target_ptr, projected_ptr, weight_ptr, delta_ptr, map_delta_ptr, loss_ptr, along_ptr, pulled_ptr,
    N, tokens_each,
    D: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, WEIGHT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Over `tokens_each` tokens of one draw: sum of e^2, E = sum of rho e [C], sum of c LN(h + d) [D].

    The channels are held as a power of two and a rest (1152 = 1024 + 128), not padded to the next power of two. A token past the
    last adds nothing: its target and weights are zero, so its e is.
    """
    draw = tl.program_id(1).to(tl.int64)
    part = draw * tl.num_programs(0) + tl.program_id(0)
    d, c = tl.arange(0, MAIN), tl.arange(0, BLOCK_C)
    delta = tl.load(delta_ptr + draw * D + d)
    pulled = tl.zeros((MAIN,), tl.float32)
    if TAIL > 0:
        d_tail = MAIN + tl.arange(0, TAIL)
        delta_tail = tl.load(delta_ptr + draw * D + d_tail, mask=d_tail < D, other=0.0)
        pulled_tail = tl.zeros((TAIL,), tl.float32)
    map_delta = tl.load(map_delta_ptr + draw * C + c, mask=c < C, other=0.0).to(tl.float32)
    loss = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    along = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    first = tl.program_id(0) * tokens_each
    last = tl.minimum(first + tokens_each, N)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        real = n < last
        row = draw * N + n
        mean = tl.load(mean_ptr + row, mask=real, other=0.0)
        at = row[:, None] * C + c
        counted = real[:, None] & (c < C)
        target = tl.load(target_ptr + at, mask=counted, other=0.0)
        projected = tl.load(projected_ptr + at, mask=counted, other=0.0)
        moved = _moved(h_ptr, row, real, d, mean, delta, D, False)
        square = tl.sum(moved * moved, 1)
        if TAIL > 0:
            moved_tail = _moved(h_ptr, row, real, d_tail, mean, delta_tail, D, MAIN + TAIL > D)
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
        pulled += tl.sum(pull[:, None] * moved, 0)
        if TAIL > 0:
            pulled_tail += tl.sum(pull[:, None] * moved_tail, 0)
    tl.store(loss_ptr + part, tl.sum(tl.sum(loss, 1), 0))
    tl.store(along_ptr + part * C + c, tl.sum(along, 0), mask=c < C)
    tl.store(pulled_ptr + part * D + d, pulled)
    if TAIL > 0:
        tl.store(pulled_ptr + part * D + d_tail, pulled_tail, mask=d_tail < D)


@jit
def _back(maps_ptr, draw, along, c, d, D: tl.constexpr, C: tl.constexpr):
    """The map's transpose on `along` [C], for the channels d."""
    maps = tl.load(maps_ptr + (draw * C + c[:, None]) * D + d, mask=(c < C)[:, None] & (d < D), other=0.0)
    return tl.sum(maps * along[:, None], 0)


@jit(do_not_specialize=["step"])
def _pre_gradient_kernel(
    loss_ptr, along_ptr, pulled_ptr, maps_ptr, losses_ptr, gradient_ptr, parts, all_parts, step, scale,
    D: tl.constexpr, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A draw's gradient on some channels, from the parts of its programs; the first program adds up the loss of all draws."""
    draw = tl.program_id(1).to(tl.int64)
    d, c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    along = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    pulled = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        part, real = draw * parts + p[:, None], (p < parts)[:, None]
        along += tl.load(along_ptr + part * C + c, mask=real & (c < C), other=0.0)
        pulled += tl.load(pulled_ptr + part * D + d, mask=real & (d < D), other=0.0)
    gradient = scale * (_back(maps_ptr, draw, tl.sum(along, 0), c, d, D, C) - tl.sum(pulled, 0))
    tl.store(gradient_ptr + draw * D + d, gradient, mask=d < D)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        loss = tl.zeros((1024,), tl.float32)
        for start in range(0, all_parts, 1024):
            p = start + tl.arange(0, 1024)
            loss += tl.load(loss_ptr + p, mask=p < all_parts, other=0.0)
        tl.store(losses_ptr + step, tl.sum(loss, 0) * scale * -0.5)


@jit(do_not_specialize=["step"])
def _linear_gradient_kernel(
    residual_ptr, count_ptr, square_ptr, added_ptr, maps_ptr, losses_ptr, gradient_ptr, K, step,
    D: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A draw's gradient on some channels at a linear site; the first program adds up the loss of all draws."""
    draw = tl.program_id(1).to(tl.int64)
    d, c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    at = draw * C + c
    count = tl.load(count_ptr + at, mask=c < C, other=0.0)
    pull = count * tl.load(added_ptr + at, mask=c < C, other=0.0) - tl.load(residual_ptr + at, mask=c < C, other=0.0)
    along = (pull * 2.0 / (K * tl.sum(count, 0))).to(tl.float32)
    tl.store(gradient_ptr + draw * D + d, _back(maps_ptr, draw, along, c, d, D, C), mask=d < D)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        loss = tl.zeros((BLOCK_K,), tl.float64)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            real = (k < K)[:, None] & (c < C)
            at_all = k[:, None] * C + c
            counts = tl.load(count_ptr + at_all, mask=real, other=0.0)
            added = tl.load(added_ptr + at_all, mask=real, other=0.0)
            residual = tl.load(residual_ptr + at_all, mask=real, other=0.0)
            # A difference of sums that are larger than it, hence float64.
            left = tl.load(square_ptr + k, mask=k < K, other=0.0) + tl.sum(added * (counts * added - 2.0 * residual), 1)
            loss += left / tl.where(k < K, tl.sum(counts, 1), 1.0)
        tl.store(losses_ptr + step, (tl.sum(loss, 0) / K).to(tl.float32))


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
def pre_gradient(cached: Features, centred_KD: Tensor, added_KC: Tensor, losses: Tensor, step: int) -> Tensor:
    """The gradient of site pre for every draw's delta, [K, D] float32, in one read of the features; the loss goes to losses[step].

    centred (d'): [K, D] float32; added (W'' d'): [K, C] float64; losses: float32.
    Raises ValueError when shapes, dtypes or devices disagree.
    """
    K, N, D = cached.features.shape
    C = cached.maps.shape[1]
    check_runs("pre_gradient", centred_KD, cached.target, cached.maps, losses)
    check_runs("pre_gradient", cached.features)
    _check_delta("pre_gradient", centred_KD, (K, D))
    _check_added("pre_gradient", added_KC, (K, C))
    _check_step("pre_gradient", losses, step)
    check(centred_KD.is_contiguous() and added_KC.is_contiguous(), "pre_gradient: centred and added must be contiguous")
    parts, tokens_each = _parts(N, K, BLOCK_N)
    loss, gradient = losses.new_empty(K, parts), losses.new_empty(K, D)
    along, pulled = losses.new_empty(K, parts, C), losses.new_empty(K, parts, D)
    weight, (main, tail) = cached.weight, head_and_rest(D)
    _pre_kernel[(parts, K)](
        cached.features, cached.means, cached.target, cached.projected, cached.target if weight is None else weight,
        centred_KD, added_KC, loss, along, pulled, N, tokens_each,
        D=D, C=C, EPS=EPS, WEIGHT=weight is not None, STAGES=STAGES, BLOCK_N=BLOCK_N,
        MAIN=main, TAIL=tail, BLOCK_C=power_of_two(C), num_warps=WARPS,
    )  # fmt: skip
    _pre_gradient_kernel[(cdiv(D, BLOCK_D), K)](
        loss, along, pulled, cached.maps, losses, gradient, parts, K * parts, step, -2.0 / (K * cached.total),
        D=D, C=C, BLOCK_P=BLOCK_P, BLOCK_C=power_of_two(C), BLOCK_D=BLOCK_D, num_warps=8,
    )  # fmt: skip
    return gradient


def _check_delta(name: str, delta: Tensor, shape: tuple[int, int]) -> None:
    check(delta.shape == shape, f"{name}: delta is {list(delta.shape)}, needs {list(shape)}")


def _check_step(name: str, losses: Tensor, step: int) -> None:
    check(0 <= step < len(losses), f"{name}: step is {step}, there is room for {len(losses)} losses")


def _check_added(name: str, added: Tensor, shape: tuple[int, int]) -> None:
    check(
        added.shape == shape and added.dtype == torch.float64,
        f"{name}: added is {added.dtype} {list(added.shape)}, needs float64 {list(shape)}",
    )


@dataclass(frozen=True)
class ResidualSums:
    """Of each draw, float64: r and w summed over the tokens, [K, C] each, and the squares of r, [K]; contiguous, as a kernel reads
    them at every step. Raises ValueError for others."""

    residual: Tensor
    count: Tensor
    square: Tensor

    def __post_init__(self) -> None:
        shape = self.residual.shape
        for name, t, wanted in (
            ("residual", self.residual, shape), ("count", self.count, shape), ("square", self.square, shape[:1])
        ):  # fmt: skip
            check(
                t.shape == wanted and t.is_contiguous(),
                f"residual_sums: {name} is {list(t.shape)} with strides {list(t.stride())}, must be {list(wanted)} and contiguous",
            )


def residual_sums_reference(residual: Tensor, weight: Tensor | None) -> ResidualSums:
    weight = torch.ones_like(residual[0]) if weight is None else weight
    return ResidualSums(residual.sum(1), weight.sum(0).repeat(residual.shape[0], 1), residual.square().sum((1, 2)))


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


def linear_loss_and_gradient(sums: ResidualSums, maps_KCD: Tensor, delta_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of sites mid and post (maps W' or W), a scalar in float64, and its gradient for every draw's delta, [K, D], in plain
    PyTorch; reads no features."""
    K = delta_KD.shape[0]
    # The loss is a difference of sums that are larger than it: a few numbers a draw, in float64.
    added = (maps_KCD * delta_KD[:, None]).sum(-1, dtype=torch.float64)  # [K, C]
    pull = sums.count * added - sums.residual
    total = sums.count.sum(-1)
    loss = (sums.square + (added * (pull - sums.residual)).sum(-1)) / total
    pull = pull * 2.0 / (K * total[:, None])
    return loss.mean(), (maps_KCD * pull.to(maps_KCD.dtype)[:, :, None]).sum(1)


@torch.no_grad()
def linear_gradient(sums: ResidualSums, maps_KCD: Tensor, added_KC: Tensor, losses: Tensor, step: int) -> Tensor:
    """The same in one kernel, given W' d or W d, `added` [K, C] in float64: the gradient [K, D] float32; the loss goes to
    losses[step], float32. Raises ValueError when shapes, dtypes or devices disagree."""
    K, C, D = maps_KCD.shape
    check_runs("linear_gradient", maps_KCD, losses)
    _check_added("linear_gradient", added_KC, (K, C))
    _check_step("linear_gradient", losses, step)
    check(maps_KCD.is_contiguous() and added_KC.is_contiguous(), "linear_gradient: maps and added must be contiguous")
    check(
        sums.residual.shape == (K, C),
        f"linear_gradient: sums are {list(sums.residual.shape)}, maps {[K, C, D]} need {[K, C]}",
    )
    gradient = losses.new_empty(K, D)
    _linear_gradient_kernel[(cdiv(D, BLOCK_D), K)](
        sums.residual, sums.count, sums.square, added_KC, maps_KCD, losses, gradient, K, step,
        D=D, C=C, BLOCK_K=8, BLOCK_C=power_of_two(C), BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return gradient
