"""No adaptation: the baseline every method is compared with, and the same time spent on more sampling steps instead."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..adaptation import AdaptationSettings, Task
from ..models.stdit3 import STDiT3
from ..recorded import Records
from .optimize import Trace
from .protocol import Change, OnStep


@dataclass(frozen=True, kw_only=True)
class NoAdaptation:
    """Sample from the network as it is."""

    kind: Literal["none"] = "none"

    def check(self, adaptation: AdaptationSettings) -> None:
        pass

    def attach(self, model: STDiT3, recipe_seed: int) -> "NoAdapter":
        return NoAdapter()


@dataclass(frozen=True, kw_only=True)
class MoreSampling:
    """Adapt nothing, and sample in more steps: what a method must beat that takes as long."""

    kind: Literal["more_sampling"] = "more_sampling"
    sampling_steps: int = 60
    """Euler steps instead of `sampler.steps`; everything else of the sampler stays."""

    def __post_init__(self) -> None:
        if self.sampling_steps < 1:
            raise ValueError(f"sampling_steps must be at least 1, was {self.sampling_steps}")

    def check(self, adaptation: AdaptationSettings) -> None:
        pass

    def attach(self, model: STDiT3, recipe_seed: int) -> "NoAdapter":
        return NoAdapter(self.sampling_steps)


class NoAdapter:
    steps = 0

    def __init__(self, sampling_steps: int | None = None) -> None:
        self.ways: dict[str, str] = {}
        self.sampling_steps = sampling_steps
        self.sampling: Records | None = None
        self.trace = Trace()

    def adapt(self, task: Task, on_step: OnStep) -> Trace:
        return Trace()

    def change(self) -> Change:
        return Change(0.0, 0.0, 0, 0)

    def distances(self) -> dict[str, tuple[float, float]]:
        return {}

    @contextmanager
    def suspended(self) -> Iterator[None]:
        yield

    def state(self) -> dict[str, Tensor]:
        return {}

    def randomize(self, generator: torch.Generator) -> None:
        pass

    def restore(self) -> None:
        pass

    def detach(self) -> None:
        self.sampling = None
