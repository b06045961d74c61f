"""No adaptation: the baseline every method is compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..adaptation import AdaptationSettings, Task
from ..models.stdit3 import STDiT3
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


class NoAdapter:
    steps = 0

    def adapt(self, task: Task, on_step: OnStep) -> Trace:
        return Trace()

    def change(self) -> Change:
        return Change(0.0, 0.0, 0, 0)

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
        pass
