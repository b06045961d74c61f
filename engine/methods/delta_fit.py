"""AdamW on the final-layer delta with loss and gradient from kernels/delta_features.py, every step on the device.

A step is two launches at the linear sites and three at `pre`, each fed by the one before; nothing is asked of the device before
the last step, so the host is ahead of it. Float32, and the arithmetic of torch's AdamW.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.delta_features import linear_gradient, pre_gradient, prepare, residual_sums
from ...kernels.delta_step import DeltaSteps, Rule
from .optimize import AdamW, Trace

if TYPE_CHECKING:
    from .delta import CachedDraw, DeltaFinalLayer


@dataclass(frozen=True)
class Objective:
    """gradient(centred, added, losses, step): of every draw's delta, [K, D]; the loss goes to losses[step]. added: what `maps`
    [K, C, D] make of the deltas, [K, C] float64, where `centre` of the deltas less their mean over the channels: centred, [K, D]."""

    maps: Tensor
    centre: bool
    gradient: Callable[[Tensor, Tensor, Tensor, int], Tensor]


@torch.no_grad()
def draw_objective(layer: "DeltaFinalLayer", used: Tensor, cached: "Sequence[CachedDraw]") -> Objective:
    """The objective of cached draws at the layer's site. used: indices of the outputs that are the velocity."""
    maps = layer.map_of(torch.cat([c.state.time for c in cached]))[:, used]
    residual = torch.cat([c.residual for c in cached])
    weight = None if bool((cached[0].weight == 1).all()) else cached[0].weight[0].contiguous()
    if layer.site == "pre":
        features = prepare(torch.cat([c.state.tokens for c in cached]), residual, weight, maps)
        return Objective(features.maps, True, lambda *given: pre_gradient(features, *given))
    sums = residual_sums(residual, weight)
    return Objective(maps, False, lambda centred, added, losses, step: linear_gradient(sums, maps, added, losses, step))


@torch.no_grad()
def fit(
    objective: Objective, delta_RD: Tensor, ranges: Sequence[int], settings: AdamW, ridge: float = 0.0
) -> tuple[Trace, Tensor]:
    """Take `settings.steps` steps on objective + ridge |delta|^2 from delta [R, D] float32; returns also the delta after each step,
    [steps, R, D].

    ranges: which row each draw uses, the draws of a row side by side. Raises FloatingPointError, after the last step, if a loss or
    gradient was not finite.
    """
    s = settings
    rates = [s.lr * s.rate(step, s.steps) for step in range(s.steps)]
    rule = Rule(rates, s.betas, s.eps, s.weight_decay, ridge, s.gradient_clip)
    steps = DeltaSteps(delta_RD, ranges, objective.maps, rule, objective.centre)
    losses = torch.zeros_like(steps.norms)
    for step in range(s.steps):
        steps.take(objective.gradient(steps.centred, steps.added, losses, step))
    found: list[list[float]] = torch.stack([losses, steps.norms]).tolist()
    if not all(isfinite(number) for numbers in found for number in numbers):
        raise FloatingPointError("the loss or its gradient is not finite; a smaller lr may help")
    return Trace(steps=s.steps, losses=found[0], gradient_norms=found[1]), steps.deltas[1:]
