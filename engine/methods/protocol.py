"""What a method is: settings that a recipe fills, and an adapter that changes a network for one clip and puts it back.

A method knows nothing of videos, disks or clusters. It is attached once to a network and keeps its storage until detached;
between clips `restore` brings every weight back bit for bit, in place.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..adaptation import AdaptationSettings, Task
from ..models.stdit3 import STDiT3
from ..recorded import Records
from .optimize import Masters, Trace
from .parts import Fisher

OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class Change:
    """How far a method moved from its start.

    master: L2 distance of the float32 trainable state; effective: L2 distance of the weights that compute (for LoRA and the
    delta, of what they add); changed: how many effective numbers differ; trained: how many numbers are trained.
    """

    master: float
    effective: float
    changed: int
    trained: int


def layer_of(name: str) -> str:
    """The layer that a parameter's name lies in: `layers.3` of `layers.3.attn.qkv.weight`, else the first part."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "layers" else 1])


def by_layer(squares: Iterable[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """Distances a layer from (parameter's name, squared distance of the master, of what computes)."""
    sums: dict[str, list[float]] = {}
    for name, master, effective in squares:
        total = sums.setdefault(layer_of(name), [0.0, 0.0])
        total[0] += master
        total[1] += effective
    return {layer: (master**0.5, effective**0.5) for layer, (master, effective) in sums.items()}


class Adapter(Protocol):
    """A method attached to a network."""

    trace: Trace
    """What the running or last `adapt` has done so far."""
    ways: dict[str, str]
    """How it computes what is its own, in words, by part; where that is not the fastest way, why. For the record."""

    sampling: Records | None
    """Of the sampler's steps with this adapter in the network, where they are recorded; None at first and when detached."""

    @property
    def steps(self) -> int:
        """Steps that `adapt` will take."""
        ...

    def adapt(self, task: Task, on_step: OnStep) -> Trace:
        """Adapt to a clip, from the state in force. on_step(step, loss) runs after each step with its weights in force, and may raise
        to stop."""
        ...

    def change(self) -> Change:
        """How far the state is from the start."""
        ...

    def distances(self) -> dict[str, tuple[float, float]]:
        """L2 distance from the start a layer: of its masters, and of the weights that compute (as `change` has them)."""
        ...

    def suspended(self) -> AbstractContextManager[None]:
        """A context inside which the network computes with its base weights."""
        ...

    def state(self) -> dict[str, Tensor]:
        """A copy of the adapted state, by name, for a recipe that keeps it; of full fine-tuning, the difference from the base."""
        ...

    def randomize(self, generator: torch.Generator) -> None:
        """Replace the change of each trained tensor by a random one of equal norm: a placebo. generator: on the device."""
        ...

    def restore(self) -> None:
        """Back to the start, bit for bit, in the same storage. Safe to call at any time."""
        ...

    def detach(self) -> None:
        """Restore and give the network back as it was before `attach`."""
        ...


@runtime_checkable
class GradientAdapter(Adapter, Protocol):
    """An adapter that takes gradient steps on float32 masters."""

    masters: Masters
    fisher: Fisher | None
    """What EWC weighs by; whoever attaches a method with that penalty sets it."""


class Method(Protocol):
    """A method's settings, a frozen dataclass with a literal `kind`."""

    @property
    def kind(self) -> str: ...

    def check(self, adaptation: AdaptationSettings) -> None:
        """Raise ValueError where the method cannot run with these adaptation settings."""
        ...

    def attach(self, model: STDiT3, recipe_seed: int) -> Adapter: ...
