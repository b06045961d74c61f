"""Parts that compose with every gradient method: schedule, penalties on the distance from the start, early stopping.

`optimize` calls them around its step; none knows which method it serves. The penalties are quadratic in the masters' distance
from the unadapted start, so their gradients are added in closed form, in float32, and nothing is rounded by the network's dtype:

    L2 to the start   weight / 2 sum (w - w0)^2                        (L2-SP, arXiv:1802.01483, eq. 2)
    proximal step     w <- (w + lr weight w0) / (1 + lr weight)        the minimum of that penalty + |w - w_step|^2 / (2 lr)
    EWC               weight / (2 N) sum F (w - w0)^2                  (arXiv:1612.00796, eq. 3), F from engine/fisher.py

N is how many numbers the Fisher information's samples predict, so that EWC's penalty is, to second order, `weight` times the KL
divergence a predicted number, the same unit as the loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class L2ToStart:
    """Pull towards the unadapted weights."""

    weight: float
    """Of half the squared distance from the start."""
    step: Literal["gradient", "proximal"] = "gradient"
    """gradient: the penalty's gradient joins the loss's, and AdamW rescales both, so a heavy weight swings around the start by about
    the learning rate; proximal: an exact pull after each step, which AdamW does not rescale."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, was {self.weight}; for no penalty leave l2 out")


@dataclass(frozen=True, kw_only=True)
class EWC:
    """Elastic weight consolidation: pull back what the base network's predictions on other clips depend on."""

    clips: str
    """Validation clips for the Fisher information, as `data.clips`; none may be among the clips adapted on or scored."""
    weight: float = 1.0
    """Of the KL divergence a predicted number, to second order."""
    limit: int = 8
    """Only the first so many of them."""
    draws: int = 4
    """Draws of timestep and noise a clip."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, was {self.weight}; for no penalty leave ewc out")
        if not self.clips:
            raise ValueError("clips is empty; name validation clips that the run neither adapts on nor scores")
        for name in ("limit", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stop when the loss on held-out draws no longer falls, and go back to the best step."""

    every: int = 1
    """Look after every so many steps."""
    patience: int = 3
    """Looks in a row without a new best that end adapting."""
    draws: int = 4
    """Held-out draws of timestep and noise on the same known latents; no step trains on them."""

    def __post_init__(self) -> None:
        for name in ("every", "patience", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What any gradient method's settings also hold."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate over the steps: constant, or falling to zero after the last one."""
    warmup: int = 0
    """Steps over which the learning rate first rises linearly; the first step already has 1 / warmup of it."""
    l2: L2ToStart | None = None
    """Penalty on the distance from the unadapted weights."""
    ewc: EWC | None = None
    """Penalty on that distance weighted by the Fisher information of other clips."""
    early_stopping: EarlyStopping | None = None
    """Stop on held-out draws, and keep the best step."""

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, was {self.warmup}")

    @property
    def held_out_draws(self) -> int:
        """How many held-out draws early stopping looks at."""
        return self.early_stopping.draws if self.early_stopping else 0

    def rate(self, step: int, steps: int) -> float:
        """The factor on the learning rate at a step, counted from 0, of so many."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "linear":
            return rise * (1 - step / steps)
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if self.schedule == "cosine" else rise


class Fisher(NamedTuple):
    """Diagonal Fisher information. diagonal: as the masters, float32; numbers: how many numbers a sample predicts."""

    diagonal: list[Tensor]
    numbers: int


class Penalties:
    """The penalties of some settings. start: the unadapted masters, any float dtype; fisher: needed where settings name EWC."""

    def __init__(self, settings: Parts, start: Sequence[Tensor], fisher: Fisher | None) -> None:
        if settings.ewc and fisher is None:
            raise ValueError("ewc needs the Fisher information of its validation clips, which nothing has given")
        self.settings = settings
        self.start = start
        self.fisher = fisher if settings.ewc else None

    @torch.no_grad()
    def add_gradients(self, masters: Sequence[Tensor]) -> float:
        """Add the penalties' gradients to the masters'; returns the penalties' value before the step."""
        l2, ewc, value = self.settings.l2, self.settings.ewc, 0.0
        for i, (master, start) in enumerate(zip(masters, self.start, strict=True)):
            away = master - start
            scale: Tensor | float = l2.weight if l2 else 0.0
            if ewc and self.fisher:
                scale = scale + self.fisher.diagonal[i] * (ewc.weight / self.fisher.numbers)
            pull = away * scale
            value += (pull * away).sum().item() / 2
            if l2 and l2.step == "proximal":
                pull = pull - away * l2.weight  # that part follows after the step
            master.grad = pull if master.grad is None else master.grad + pull
        return value

    @torch.no_grad()
    def step(self, masters: Sequence[Tensor], lr: float) -> None:
        """The proximal step of L2, where the settings ask for it."""
        l2 = self.settings.l2
        if l2 and l2.step == "proximal":
            pull = lr * l2.weight
            for master, start in zip(masters, self.start, strict=True):
                master.lerp_(start.to(master.dtype), pull / (1 + pull))


class BestStep:
    """Early stopping over masters. held_out: the loss on the held-out draws under the weights in force, called without gradients."""

    def __init__(self, settings: EarlyStopping, held_out: Callable[[], Tensor], masters: Sequence[Tensor]) -> None:
        self.settings = settings
        self.held_out = held_out
        self.masters = masters
        self.best = math.inf
        self.step = 0
        self.without = 0
        self.losses: list[tuple[int, float]] = []
        self.kept = [torch.empty_like(master) for master in masters]
        self.look(0)

    @torch.no_grad()
    def look(self, steps: int) -> bool:
        """After so many steps: measure where it is time, keep a new best; whether to stop."""
        if steps % self.settings.every:
            return False
        loss = self.held_out().item()
        self.losses.append((steps, loss))
        if loss < self.best or not self.losses[1:]:
            self.best, self.step, self.without = (loss if math.isfinite(loss) else math.inf), steps, 0
            for kept, master in zip(self.kept, self.masters, strict=True):
                kept.copy_(master)
        else:
            self.without += 1
        return self.without >= self.settings.patience

    @torch.no_grad()
    def restore(self) -> int:
        """Take the masters back to the best step; returns it."""
        for kept, master in zip(self.kept, self.masters, strict=True):
            master.copy_(kept)
        return self.step
