"""One step of AdamW on the vectors of a delta: from every draw's gradient to what the next step's objective reads, in one launch.

Draws of one range of timesteps share a vector d; its gradient is the sum of theirs, plus 2 ridge d. All ranges are clipped
together by their L2 norm, then AdamW (arXiv:1711.05101, algorithm 2, with the operations of torch.optim.AdamW) changes d, and the
objective (delta_features.py) wants the map's W' d of every draw, at site pre from d less its mean over the channels, and that too.
A program makes a few outputs of W' d of one draw. For that it needs the new d, so each makes it anew from all gradients, which
are small, instead of waiting for another: one program of each range writes it. What is read is never written: the vectors before
and after every step are kept, and the moments lie twice. Sums are in a fixed order; which step it is, the host says.
Axes: K draws (those of a range side by side), R ranges, D channels, C outputs.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .adamw_step import Rates, adamw_step_reference
from .common import cdiv, check, check_runs, jit, power_of_two

TILE = 8192  # numbers of the map that a program holds at a time
WARPS = 8


class Rule(NamedTuple):
    """rates: learning rate of each step. decay: decoupled weight decay. clip: largest norm of the gradient, 0 for none."""

    rates: list[float]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    ridge: float = 0.0
    clip: float = 0.0


def first_of_range(ranges: Sequence[int]) -> list[int]:
    """Where each range's draws begin, and at last how many draws there are; ranges: of each draw, rising from 0 without gaps."""
    starts = [k for k, r in enumerate(ranges) if k == 0 or r != ranges[k - 1]]
    check(
        [ranges[k] for k in starts] == list(range(len(starts))),
        f"delta_step: ranges of the draws must rise from 0 without gaps, were {list(ranges)}",
    )
    return [*starts, len(ranges)]


def delta_step_reference(
    gradient_KD: Tensor, ranges: Sequence[int], delta_RD: Tensor, first: Tensor, second: Tensor, step: int, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mathematics, in the dtype given: delta and moments after step `step` (from 0), and the gradient's norm."""
    gradient = torch.stack([gradient_KD[a:b].sum(0) for a, b in pairwise(first_of_range(ranges))])
    gradient = gradient + 2 * rule.ridge * delta_RD
    norm = gradient.norm()
    divisor = ((norm + 1e-6) / rule.clip).clamp(min=1.0) if rule.clip else torch.ones_like(norm)
    rates = Rates(rule.rates[step], rule.betas, rule.eps, rule.decay)
    return *adamw_step_reference(delta_RD, first, second, gradient, step + 1, divisor, rates), norm


@jit(do_not_specialize=["step"])
def _step_kernel(
    gradient_ptr, starts_ptr, ranges_ptr, rates_ptr, maps_ptr, deltas_ptr, moments_ptr, norms_ptr, centred_ptr, added_ptr,
    step, R, new1, beta2, new2, eps, ridge, clip,
    D: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, RIDGE: tl.constexpr, CLIP: tl.constexpr, CENTRE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """deltas: [steps + 1, R, D], of which row `step` is read and, where STEP, the next one written; moments: [2, 2, R, D], the second
    two and the first two in turn; rates: [steps, 3] of what the delta is kept by, lr over the first correction, the second one's root."""
    draw, block = tl.program_id(0), tl.program_id(1)
    d, mine = tl.arange(0, BLOCK_D), tl.load(ranges_ptr + draw)
    inside = d < D
    delta = tl.load(deltas_ptr + (step * R + mine) * D + d, mask=inside, other=0.0)
    if STEP:
        owner = (draw == tl.load(starts_ptr + mine)) & (block == 0)
        gradient = tl.zeros((BLOCK_D,), tl.float32)
        square = tl.zeros((BLOCK_D,), tl.float32)
        for r in range(0, R):
            total = tl.zeros((BLOCK_D,), tl.float32)
            for k in range(tl.load(starts_ptr + r), tl.load(starts_ptr + r + 1)):
                total += tl.load(gradient_ptr + k * D + d, mask=inside, other=0.0)
            if RIDGE:
                total += 2.0 * ridge * tl.load(deltas_ptr + (step * R + r) * D + d, mask=inside, other=0.0)
            square += total * total
            gradient = tl.where(r == mine, total, gradient)
        norm = tl.sqrt_rn(tl.sum(square, 0))
        if CLIP:
            gradient *= tl.minimum(clip / (norm + 1e-6), 1.0)
        keep, size = tl.load(rates_ptr + 3 * step), tl.load(rates_ptr + 3 * step + 1)
        root = tl.load(rates_ptr + 3 * step + 2)
        old, new = step % 2, 1 - step % 2
        first = tl.load(moments_ptr + (2 * old * R + mine) * D + d, mask=inside, other=0.0)
        second = tl.load(moments_ptr + ((2 * old + 1) * R + mine) * D + d, mask=inside, other=0.0)
        first += new1 * (gradient - first)
        second = beta2 * second + new2 * gradient * gradient
        delta = delta * keep - size * tl.div_rn(first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
        if owner:
            tl.store(deltas_ptr + ((step + 1) * R + mine) * D + d, delta, mask=inside)
            tl.store(moments_ptr + (2 * new * R + mine) * D + d, first, mask=inside)
            tl.store(moments_ptr + ((2 * new + 1) * R + mine) * D + d, second, mask=inside)
        if (draw == 0) & (block == 0):
            tl.store(norms_ptr + step, norm)
    if CENTRE:
        delta = tl.where(inside, delta - tl.sum(tl.where(inside, delta, 0.0), 0) / D, 0.0)
        if block == 0:
            tl.store(centred_ptr + draw * D + d, delta, mask=inside)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    maps = tl.load(maps_ptr + (draw * C + c[:, None]) * D + d, mask=(c < C)[:, None] & inside, other=0.0)
    tl.store(added_ptr + draw * C + c, tl.sum((maps * delta).to(tl.float64), 1), mask=c < C)


class DeltaSteps:
    """A fit's storage, and its steps. deltas: [steps + 1, R, D] float32, before each step and after the last; norms: [steps], of the
    gradient at each; for the step to come, added: maps times the delta of each draw, [K, C] float64, and where `centre`, both the
    delta less its mean over the channels: centred, [K, D] float32.

    start: [R, D] and maps: [K, C, D], float32; ranges: which row each draw uses, as in `first_of_range`.
    Raises ValueError for what the kernel does not take.
    """

    def __init__(self, start_RD: Tensor, ranges: Sequence[int], maps_KCD: Tensor, rule: Rule, centre: bool) -> None:
        (K, C, D), R, device = maps_KCD.shape, len(start_RD), maps_KCD.device
        check_runs("delta_step", start_RD, maps_KCD)
        check(
            start_RD.dtype == torch.float32 and start_RD.shape[1:] == (D,) and len(ranges) == K,
            f"delta_step: start is {start_RD.dtype} {list(start_RD.shape)}, maps {[K, C, D]}, of {len(ranges)} draws a range is "
            f"known; start must be float32 [ranges, {D}], the draws {K}",
        )
        starts = first_of_range(ranges)
        check(len(starts) == R + 1, f"delta_step: the draws are of {len(starts) - 1} ranges, start has {R}")
        self.rule, self.centre, self.maps, self.taken = rule, centre, maps_KCD.contiguous(), 0
        (beta1, beta2), counts = rule.betas, range(1, len(rule.rates) + 1)
        rates = [
            (1 - lr * rule.decay, lr / (1 - beta1**count), (1 - beta2**count) ** 0.5)
            for lr, count in zip(rule.rates, counts, strict=True)
        ]
        self.rates = torch.tensor(rates, device=device)
        self.ranges, self.starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (list(ranges), starts))
        self.deltas = start_RD.new_zeros(len(rates) + 1, R, D)
        self.deltas[0] = start_RD
        self.moments = start_RD.new_zeros(2, 2, R, D)
        self.norms = start_RD.new_zeros(len(rates))
        self.centred = start_RD.new_empty(K, D)
        self.added = start_RD.new_empty(K, C, dtype=torch.float64)
        self._launch(self.centred, step=False)

    def take(self, gradient_KD: Tensor) -> None:
        """The next step, on the gradient of every draw's delta, [K, D] float32, contiguous; asks nothing of the device."""
        check_runs("delta_step", gradient_KD, self.maps)
        check(
            gradient_KD.shape == self.centred.shape and gradient_KD.is_contiguous(),
            f"delta_step: gradient is {list(gradient_KD.shape)}, needs {list(self.centred.shape)}, contiguous",
        )
        check(self.taken < len(self.norms), f"delta_step: all {len(self.norms)} steps are taken")
        self._launch(gradient_KD, step=True)
        self.taken += 1

    def _launch(self, gradient: Tensor, step: bool) -> None:
        (K, C, D), rule = self.maps.shape, self.rule
        beta1, beta2 = rule.betas
        block_d = power_of_two(D)
        block_c = max(1, min(power_of_two(C), TILE // block_d))
        _step_kernel[(K, cdiv(C, block_c))](
            gradient, self.starts, self.ranges, self.rates, self.maps, self.deltas, self.moments, self.norms, self.centred,
            self.added, self.taken, self.deltas.shape[1],
            1.0 - beta1, float(beta2), 1.0 - beta2, float(rule.eps), float(rule.ridge), float(rule.clip),
            D=D, C=C, STEP=step, RIDGE=rule.ridge != 0, CLIP=rule.clip != 0, CENTRE=self.centre,
            BLOCK_D=block_d, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
