"""Full fine-tuning: every parameter of the network, with float32 masters."""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor and fused operations under private names alone)

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..adaptation import AdaptationSettings, Draw, Task
from ..models.float8 import float8_everywhere
from ..models.paths import made_again, method_path, records
from ..models.stdit3 import Caption, STDiT3
from ..recorded import Records
from .adamw import describe_steps
from .optimize import AdamW, Masters, Trace, optimize, random_of_equal_norm
from .parts import Fisher
from .protocol import Change, OnStep, by_layer
from .recorded_loss import RecordedLoss


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(AdamW):
    """Train all parameters; `rope.freqs` is frozen, as in the official model."""

    kind: Literal["full"] = "full"

    def check(self, adaptation: AdaptationSettings) -> None:
        pass

    def attach(self, model: STDiT3, recipe_seed: int) -> "FullAdapter":
        return FullAdapter(self, model)


class FullAdapter:
    """Holds the base weights (a copy in the network's dtype) and the masters; both stay allocated between clips."""

    def __init__(self, settings: FullFineTuning, model: STDiT3) -> None:
        self.settings = settings
        self.steps = settings.steps
        self.model = model
        self.trained = {n: p for n, p in model.named_parameters() if n != "rope.freqs"}
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.base = [p.detach().clone() for p in self.trained.values()]
        self.masters = Masters(list(self.trained.values()), path=method_path(model))
        self.ways = {
            "optimizer": describe_steps(self.masters, settings),
            "steps": "recorded" if records(model, "training") else "launched",
            **made_again(model),
        }
        if float8_everywhere(model):
            self.ways["float8"] = "sampling alone, as every weight is trained"
        self.recorded: RecordedLoss | None = None
        self.sampling: Records | None = None
        self.fisher: Fisher | None = None
        self.trace = Trace()

    def adapt(self, task: Task, on_step: OnStep) -> Trace:
        self.trace = Trace()
        return optimize(
            self.masters,
            self.settings,
            lambda step: task.loss(task.draw(step)),
            descend=self._descend(task),
            zero_loss=lambda step: task.zero_loss(task.draw(step)),
            ahead=task.draw,
            start=self.base,
            fisher=self.fisher,
            held_out=lambda: task.held_out_loss(self.settings.held_out_draws),
            on_step=on_step,
            trace=self.trace,
        )

    def _descend(self, task: Task) -> Callable[[int], Callable[[], Tensor]] | None:
        """What asks for a step's loss and gradients, recorded; None where steps are launched one by one."""
        if not records(self.model, "training"):
            self.recorded = None
            return None

        def loss(t: Tensor, noise: Tensor, latents: Tensor, words: Tensor, *mask: Tensor) -> Tensor:
            return task.of(latents, Caption(words, *mask)).loss(Draw(t, noise))

        recorded = self.recorded = self.recorded or RecordedLoss(self.masters.parameters, loss, limit=1)
        clip = task.latents, *task.prompt.tensors()
        return lambda step: recorded(*task.draw(step), *clip)

    @torch.no_grad()
    def change(self) -> Change:
        device = self.model.device  # one question to the device at the end, not three a tensor
        master = effective = torch.zeros((), dtype=torch.float64, device=device)
        changed = torch.zeros((), dtype=torch.int64, device=device)
        for tensor, parameter, base in zip(self.masters.tensors, self.trained.values(), self.base, strict=True):
            master = master + (tensor.float() - base.float()).norm().double() ** 2
            effective = effective + (parameter.float() - base.float()).norm().double() ** 2
            changed = changed + (parameter != base).sum()
        trained = sum(p.numel() for p in self.trained.values())
        return Change(master.sqrt().item(), effective.sqrt().item(), int(changed), trained)

    @torch.no_grad()
    def distances(self) -> dict[str, tuple[float, float]]:
        return by_layer(
            (name, (master - base).norm().item() ** 2, (parameter.float() - base.float()).norm().item() ** 2)
            for (name, parameter), master, base in zip(
                self.trained.items(), self.masters.tensors, self.base, strict=True
            )
        )

    @contextmanager
    def suspended(self) -> Iterator[None]:
        adapted = [p.detach().clone() for p in self.trained.values()]
        self._set(self.base)
        try:
            yield
        finally:
            self._set(adapted)

    def state(self) -> dict[str, Tensor]:
        pairs = zip(self.trained.items(), self.base, strict=True)
        return {name: (p.detach().float() - base.float()).cpu() for (name, p), base in pairs}

    def randomize(self, generator: torch.Generator) -> None:
        pairs = zip(self.masters.tensors, self.base, strict=True)
        self.masters.reset([random_of_equal_norm(tensor.detach(), base, generator) for tensor, base in pairs])
        self.masters.publish()

    def restore(self) -> None:
        self._set(self.base)
        self.masters.reset(self.base)

    def detach(self) -> None:
        self.restore()
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        self.trained, self.base, self.masters, self.recorded = {}, [], Masters([]), None
        self.sampling = None

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        torch._foreach_copy_([p.detach() for p in self.trained.values()], values)
