"""What adapting did to a network, looked at while it runs: losses by noise level, KL divergence, distances, forgetting.

All of it is measured on fixed draws, the ten noise levels of evaluation.py with noise of their own, that no step trains on. It draws
from no random state and changes no weight, so a run with diagnostics gives the same bits as one without. Written as
`curves.json` beside a clip's result, whose own `adaptation` has the losses of the trained draws and the gradient norms.

KL divergence: the predictive distribution of a velocity is taken as a Gaussian around the network's output, with the base network's
mean squared error on this clip at that level as its variance s2, before and after adapting alike. Then KL = |v - v_base|^2 / (2 s2),
in nats, here a mean over the predicted numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .adaptation import Draw, Task
from .clip import Experiment, Known, sample_continuation, task_of
from .evaluation import TIMESTEPS, fixed_draw
from .methods.none import NoAdapter
from .methods.protocol import Adapter


@dataclass(frozen=True, kw_only=True)
class DiagnosticSettings:
    """What is measured while adapting; none of it changes a result."""

    every: int = 0
    """Measure at the start and after every so many steps: ten forward passes each. 0 measures nothing."""
    held_out: str = ""
    """Clips on which forgetting is measured after adapting, as `data.clips`; none of them may be among those. Empty: not measured."""
    held_out_limit: int = 4
    """Only the first so many of them."""
    held_out_scores: bool = False
    """Also continue the held-out clips with the adapted weights and score them; takes as long as sampling them."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must not be negative, was {self.every}")
        if self.held_out_limit < 1:
            raise ValueError(f"held_out_limit must be at least 1, was {self.held_out_limit}")
        if self.held_out_scores and not self.held_out:
            raise ValueError("held_out_scores needs held_out to name clips, was empty")

    @property
    def wanted(self) -> bool:
        return bool(self.every or self.held_out)


@dataclass(frozen=True)
class HeldOut:
    """A clip on which forgetting is measured. pixels: [3, F, H, W]."""

    known: Known
    pixels: Tensor


@dataclass
class Levels:
    """Velocities at each noise level, [1, C, K, h, w] each, and their mean squared errors."""

    velocities: list[Tensor]
    losses: list[float]


@torch.no_grad()
def at_levels(task: Task) -> Levels:
    """The network's predictions at the ten levels under the weights in force."""
    text, found = task.captions(), Levels([], [])
    for draw in _draws(task):
        velocity = task.velocity(draw, text)
        found.velocities.append(velocity)
        found.losses.append((velocity - task.target(draw)).square().mean().item())
    return found


def _draws(task: Task) -> list[Draw]:
    return [fixed_draw(task, index) for index in range(len(TIMESTEPS))]


@dataclass
class Curves:
    """Watches one clip at a time; see clip.Observer. score: the scores of generated pixels against a clip's."""

    settings: DiagnosticSettings
    experiment: Experiment
    score: Callable[[Tensor, Tensor], dict[str, dict[str, Any]]]
    held_out: Sequence[HeldOut] = ()
    found: dict[str, Any] = field(default_factory=dict)
    """The last clip's curves, plain JSON; None stands for a number that is not finite."""

    def __post_init__(self) -> None:
        self._before: dict[str, dict[str, Any]] = {}

    def begin(self, task: Task, adapter: Adapter) -> None:
        self.task, self.adapter = task, adapter
        self.found = {}
        if not self.settings.every:
            return
        with adapter.suspended():
            self.base = at_levels(task)
        self.found = {
            "timesteps": list(TIMESTEPS),
            "zero_losses": [task.zero_loss(draw).item() for draw in _draws(task)],
            "residual_variance": self.base.losses,
            "steps": [],
            "losses": [],
            "kl": [],
            "distances": [],
        }
        self._look(0)

    def step(self, steps: int) -> None:
        if self.settings.every and steps % self.settings.every == 0:
            self._look(steps)

    def adapted(self) -> None:
        if self.settings.every:
            if self.found["steps"][-1] < self.adapter.trace.steps and self.adapter.trace.kept_step is None:
                self._look(self.adapter.trace.steps)
            self.found["layers"] = {name: list(pair) for name, pair in self.adapter.distances().items()}
        if self.held_out:
            self.found["forgetting"] = {one.known.clip_id: self._forgetting(one) for one in self.held_out}
        self.found = _finite(self.found)

    def _look(self, steps: int) -> None:
        now = at_levels(self.task)
        apart = [
            ((a - b).square().mean() / (2 * variance)).item()
            for a, b, variance in zip(now.velocities, self.base.velocities, self.base.losses, strict=True)
        ]
        change = self.adapter.change()
        self.found["steps"].append(steps)
        self.found["losses"].append(now.losses)
        self.found["kl"].append(apart)
        self.found["distances"].append({name: asdict(change)[name] for name in ("master", "effective", "changed")})

    def _forgetting(self, one: HeldOut) -> dict[str, Any]:
        clip_id = one.known.clip_id
        if clip_id not in self._before:
            with self.adapter.suspended():
                self._before[clip_id] = self._measure(one, NoAdapter())
        return {"before": self._before[clip_id], "after": self._measure(one, self.adapter)}

    @torch.no_grad()
    def _measure(self, one: HeldOut, adapter: Adapter) -> dict[str, Any]:
        value: dict[str, Any] = {"losses": at_levels(task_of(self.experiment, one.known)).losses}
        if self.settings.held_out_scores:
            latents, *_ = sample_continuation(self.experiment, one.known, adapter, lambda phase, done, total: None)
            pixels = self.experiment.vae.decode(latents, self.experiment.window.generated)[0].float()
            scores = self.score(pixels, one.pixels)
            value["scores"] = {name: score.get("mean") for name, score in scores.items()}
        return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value
