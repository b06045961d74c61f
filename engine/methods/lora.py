"""Low-rank adaptation: W x + (alpha / rank) B A x on chosen linear layers (arXiv:2106.09685, section 4.1).

A and B are float32 (their own masters) and are cast to the input's dtype to compute; B starts at zero, so step 0 is the base.
With the last n layers only, everything before them is constant for a fixed draw: it runs once and its output is kept.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor and fused operations under private names alone)

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.common import MAX_RANK
from ..adaptation import AdaptationSettings, Draw, Task
from ..models.attention import TextStates, apart, joined
from ..models.float8 import learns_in_float8
from ..models.lora_linear import LoRALinear
from ..models.paths import made_again, method_path, raise_if_strict, records
from ..models.stdit3 import Caption, Embedded, STDiT3
from ..recorded import CAPTION_LENGTHS, Records
from ..seeds import generator_for
from .adamw import describe_steps
from .optimize import AdamW, Masters, Trace, optimize, random_of_equal_norm
from .parts import Fisher
from .protocol import Change, OnStep, by_layer
from .recorded_loss import RecordedLoss

Target = Literal[
    "attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2"
]


@dataclass(frozen=True, kw_only=True)
class LoRA(AdamW):
    """Train low-rank additions to linear layers."""

    kind: Literal["lora"] = "lora"
    lr: float = 1e-4
    """Learning rate; `schedule` and `warmup` say how it goes over the steps."""
    rank: int = 16
    """Columns of B and rows of A."""
    alpha: float = 16.0
    """The addition is scaled by alpha / rank."""
    targets: tuple[Target, ...] = ("attn.qkv", "attn.proj")
    """Which linear layers of each adapted layer."""
    last_layers: int | Literal["all"] = "all"
    """How many layers, counted from the end (STDiT3-XL/2 has 56: spatial and temporal in turn)."""
    cache_prefix: bool = False
    """Keep the output of the layers before the first adapted one, once a draw; needs a number of `draws` and of `last_layers`."""
    start: Literal["random", "svd"] = "random"
    """A at the start: random (uniform, Kaiming), or the base weight's leading right singular vectors. B starts at zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, was {self.rank}")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets must name each linear layer once and at least one, was {list(self.targets)}")
        if self.last_layers != "all" and self.last_layers < 1:
            raise ValueError(f"last_layers must be at least 1 or all, was {self.last_layers}")
        if self.cache_prefix and self.last_layers == "all":
            raise ValueError(
                "cache_prefix needs last_layers to be a number: before the first layer there is nothing to keep"
            )

    def check(self, adaptation: AdaptationSettings) -> None:
        if self.cache_prefix and adaptation.draws == "fresh":
            raise ValueError(
                "cache_prefix needs adaptation.draws to be a number, was fresh: a fresh draw has nothing cached"
            )

    def attach(self, model: STDiT3, recipe_seed: int) -> "LoRAAdapter":
        return LoRAAdapter(self, model, recipe_seed)


class LoRAAdapter:
    def __init__(self, settings: LoRA, model: STDiT3, recipe_seed: int) -> None:
        self.settings = settings
        self.steps = settings.steps
        self.model = model
        layers = model.layers
        count = len(layers) if settings.last_layers == "all" else settings.last_layers
        if count > len(layers):
            raise ValueError(f"last_layers must be at most {len(layers)} for this network, was {count}")
        self.cut = len(layers) - count
        self.adapters: dict[str, LoRALinear] = {}
        self._slots: list[tuple[nn.Module, str, nn.Linear]] = []
        fast = method_path(model) != "plain"
        self.extends = fast and settings.rank <= MAX_RANK
        why = f"rank {settings.rank} is above {MAX_RANK}, the most that LoRA in one product takes"
        if fast and not self.extends:
            raise_if_strict(model, why)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for index in range(self.cut, len(layers)):
            for target in settings.targets:
                self._wrap(layers[index], index, target)
        self.start_A = [self._start(name, a, recipe_seed) for name, a in self.adapters.items()]
        trained = [p for a in self.adapters.values() for p in (a.A, a.B)]
        self.masters = Masters(trained, self._refresh, path=method_path(model))
        self.prefixed = settings.cache_prefix
        products = "one product" if self.extends else "three products" + (f" ({why})" if fast else "")
        in_float8 = [learns_in_float8(adapter.base) for adapter in self.adapters.values()]
        self.ways = {
            "steps": "recorded" if records(model, "training") else "launched",
            **({"prefix": "recorded" if records(model, "features") else "launched"} if self.prefixed else {}),
            **made_again(model),
            "lora": "; ".join([products] * (not all(in_float8)) + ["a float8 product and two"] * any(in_float8)),
            "optimizer": describe_steps(self.masters, settings),
        }
        self.trains_text = "cross_attn.kv_linear" in settings.targets
        self.recorded_prefix: Records | None = None
        self.recorded: RecordedLoss | None = None
        self.sampling: Records | None = None
        self.fisher: Fisher | None = None
        self.trace = Trace()
        self.restore()

    def _wrap(self, layer: nn.Module, index: int, target: str) -> None:
        path, name = target.rsplit(".", 1)
        parent = layer.get_submodule(path)
        base = getattr(parent, name)
        rank = self.settings.rank
        if rank > min(base.in_features, base.out_features):
            raise ValueError(
                f"rank must be at most {min(base.in_features, base.out_features)} for {target}, was {rank}"
            )
        adapter = LoRALinear(base, rank, self.settings.alpha)
        if self.extends and not learns_in_float8(base):
            adapter.extend()
        setattr(parent, name, adapter)
        self._slots.append((parent, name, base))
        self.adapters[f"layers.{index}.{target}"] = adapter

    @torch.no_grad()
    def _refresh(self) -> None:
        """As `LoRALinear.refresh` of each, in few launches."""
        extended = [adapter for adapter in self.adapters.values() if adapter.extended is not None]
        if extended:
            scaled = torch._foreach_mul([adapter.B for adapter in extended], extended[0].scale)
            torch._foreach_copy_([adapter.room for adapter in extended], scaled)

    @torch.no_grad()
    def _start(self, name: str, adapter: LoRALinear, recipe_seed: int) -> Tensor:
        if self.settings.start == "svd":
            weight = adapter.base.weight.double()
            _, vectors = torch.linalg.eigh(weight.T @ weight)  # ascending; eigenvectors are the right singular vectors
            leading = vectors[:, -self.settings.rank :].flip(1).T.float()
            largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
            return leading * largest.sign()  # fixes the sign that an eigenvector leaves open
        bound = adapter.base.in_features**-0.5
        generator = generator_for(recipe_seed, "", "lora start", zlib.crc32(name.encode()))
        return (torch.rand(adapter.A.shape, generator=generator) * 2 - 1).mul(bound).to(adapter.A.device)

    def adapt(self, task: Task, on_step: OnStep) -> Trace:
        # Keys and values of captions, once a clip where no step changes them.
        with torch.no_grad():
            text = None if self.trains_text else task.captions()
        clip = (task.latents, *(task.prompt.tensors() if text is None else joined(text)))
        prefix, loss = self._computations(task)
        prefixes: dict[int, list[Tensor]] = {}

        def inputs(step: int) -> list[Tensor]:
            draw, before = task.draw(step), []
            if prefix:
                assert task.settings.draws != "fresh"
                k = step % task.settings.draws
                if k not in prefixes:
                    prefixes[k] = [tensor.clone() for tensor in prefix(*draw, *clip)]  # the next draw's may lie there
                before = prefixes[k]
            return [*draw, *before, *clip]

        recorded, self.trace = self.recorded, Trace()
        zeros = [torch.zeros_like(adapter.B) for adapter in self.adapters.values()]
        return optimize(
            self.masters,
            self.settings,
            lambda step: loss(*inputs(step)),
            descend=None if recorded is None else lambda step: recorded(*inputs(step)),
            zero_loss=lambda step: task.zero_loss(task.draw(step)),
            ahead=task.draw,
            start=[tensor for pair in zip(self.start_A, zeros, strict=True) for tensor in pair],
            fisher=self.fisher,
            held_out=lambda: task.held_out_loss(self.settings.held_out_draws, text),
            on_step=on_step,
            trace=self.trace,
        )

    def _computations(self, task: Task) -> tuple[Callable[..., Any] | None, Callable[..., Tensor]]:
        """What runs before the first adapted layer, where that is kept, and the loss from there on, as functions of a draw and a clip
        alone: where they are recorded (the loss as `self.recorded`), this task's serve for every clip to come."""
        layers = len(self.model.layers)
        cut, kept = (self.cut, len(Embedded._fields)) if self.prefixed else (0, 0)

        def given(latents: Tensor, text: Sequence[Tensor]) -> tuple[Task, tuple[TextStates, TextStates]]:
            if not self.trains_text:
                return task.of(latents), apart(text, layers)
            other = task.of(latents, Caption(*text))
            return other, other.captions()

        @torch.no_grad()
        def prefix(t: Tensor, noise: Tensor, latents: Tensor, *text: Tensor) -> Embedded:
            other, states = given(latents, text)
            return self.model.run_layers(other.embed(Draw(t, noise)), *states, task.geometry, 0, cut)

        def loss(t: Tensor, noise: Tensor, *rest: Tensor) -> Tensor:
            draw, before, (latents, *text) = Draw(t, noise), rest[:kept], rest[kept:]
            other, states = given(latents, text)
            return other.loss_from(Embedded(*before) if kept else other.embed(draw), draw, cut, states)

        if self.prefixed and records(self.model, "features"):
            self.recorded_prefix = self.recorded_prefix or Records(prefix, CAPTION_LENGTHS)
        else:
            self.recorded_prefix = None
        if records(self.model, "training"):
            self.recorded = self.recorded or RecordedLoss(self.masters.parameters, loss, CAPTION_LENGTHS)
        else:
            self.recorded = None
        return (self.recorded_prefix or prefix) if self.prefixed else None, loss

    @torch.no_grad()
    def change(self) -> Change:
        # One question to the device at the end, not several an adapter.
        master = effective = torch.zeros((), dtype=torch.float64, device=self.model.device)
        changed, dtype = torch.zeros((), dtype=torch.int64, device=self.model.device), self.model.dtype
        for adapter, start in zip(self.adapters.values(), self.start_A, strict=True):
            master = master + ((adapter.A - start).norm() ** 2 + adapter.B.norm() ** 2).double()
            effective = effective + (adapter.added(dtype).norm() ** 2).double()
            changed += (adapter.B.to(dtype) != 0).sum() + (adapter.A.to(dtype) != start.to(dtype)).sum()
        trained = sum(p.numel() for p in self.masters.parameters)
        return Change(master.sqrt().item(), effective.sqrt().item(), int(changed), trained)

    @torch.no_grad()
    def distances(self) -> dict[str, tuple[float, float]]:
        return by_layer(
            (
                name,
                (adapter.A - start).norm().item() ** 2 + adapter.B.norm().item() ** 2,
                adapter.added(self.model.dtype).norm().item() ** 2,
            )
            for (name, adapter), start in zip(self.adapters.items(), self.start_A, strict=True)
        )

    @contextmanager
    def suspended(self) -> Iterator[None]:
        wrapped = [getattr(parent, name) for parent, name, _ in self._slots]
        for parent, name, base in self._slots:
            setattr(parent, name, base)
        try:
            yield
        finally:
            for (parent, name, _), adapter in zip(self._slots, wrapped, strict=True):
                setattr(parent, name, adapter)

    def state(self) -> dict[str, Tensor]:
        pairs = ((f"{name}.{key}", getattr(a, key)) for name, a in self.adapters.items() for key in ("A", "B"))
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in pairs}

    @torch.no_grad()
    def randomize(self, generator: torch.Generator) -> None:
        for adapter, start in zip(self.adapters.values(), self.start_A, strict=True):
            adapter.A.copy_(random_of_equal_norm(adapter.A, start, generator))
            adapter.B.copy_(random_of_equal_norm(adapter.B, torch.zeros_like(adapter.B), generator))
        self._refresh()

    @torch.no_grad()
    def restore(self) -> None:
        adapters = self.adapters.values()
        if adapters:
            torch._foreach_copy_([a.A.detach() for a in adapters], self.start_A)
            torch._foreach_zero_([a.B.detach() for a in adapters])
        self._refresh()

    def detach(self) -> None:
        for parent, name, base in self._slots:
            setattr(parent, name, base)
        self._slots, self.adapters, self.start_A, self.masters = [], {}, [], Masters([])
        self.recorded_prefix = self.recorded = self.sampling = None
