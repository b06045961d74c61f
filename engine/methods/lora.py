"""Low-rank adaptation: W x + (alpha / rank) B A x on chosen linear layers (arXiv:2106.09685, section 4.1).

A and B are float32 (their own masters) and are cast to the input's dtype to compute; B starts at zero, so step 0 is the base.
With the last n layers only, everything before them is constant for a fixed draw: it runs once and its output is kept.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor and fused operations under private names alone)

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels.common import MAX_RANK
from ..adaptation import AdaptationSettings, Draw, Task
from ..models.attention import TextStates
from ..models.float8 import float8_everywhere
from ..models.lora_linear import LoRALinear
from ..models.paths import method_path, raise_if_strict, records
from ..models.stdit3 import Embedded, STDiT3
from ..seeds import generator_for
from .optimize import AdamW, Masters, Trace, describe_steps, optimize, random_of_equal_norm
from .parts import Fisher
from .protocol import Change, OnStep, by_layer
from .recorded_loss import recorded_loss

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
        in_float8 = float8_everywhere(model)
        self.extends = fast and settings.rank <= MAX_RANK and not in_float8
        why = f"rank {settings.rank} is above {MAX_RANK}, the most that LoRA in one product takes"
        if fast and not self.extends and not in_float8:
            raise_if_strict(model, why)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for index in range(self.cut, len(layers)):
            for target in settings.targets:
                self._wrap(layers[index], index, target)
        self.start_A = [self._start(name, a, recipe_seed) for name, a in self.adapters.items()]
        self.masters = Masters([p for a in self.adapters.values() for p in (a.A, a.B)], self._refresh, fused=fast)
        self.prefixed = settings.cache_prefix
        apart = "a float8 product and two" if in_float8 else "three products" + (f" ({why})" if fast else "")
        self.ways = {
            "steps": "recorded" if records(model) and not self.prefixed else "launched",
            "lora": "one product" if self.extends else apart,
            "optimizer": describe_steps(self.masters, settings),
        }
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
        if self.extends:
            adapter.extend()
        setattr(parent, name, adapter)
        self._slots.append((parent, name, base))
        self.adapters[f"layers.{index}.{target}"] = adapter

    def _refresh(self) -> None:
        for adapter in self.adapters.values():
            adapter.refresh()

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
        trains_text = "cross_attn.kv_linear" in self.settings.targets
        with torch.no_grad():
            fixed_text = None if trains_text else task.captions()
        prefixes: dict[int, Embedded] = {}

        def loss(step: int) -> Tensor:
            draw = task.draw(step)
            text: tuple[TextStates, TextStates] = fixed_text or task.captions()
            if not self.prefixed:
                return task.loss(draw, text)
            assert task.settings.draws != "fresh"
            k = step % task.settings.draws
            if k not in prefixes:
                with torch.no_grad():
                    prefixes[k] = self.model.run_layers(task.embed(draw), *text, task.geometry, 0, self.cut)
            return task.loss_from(prefixes[k], draw, self.cut, text)

        def of_draw(draw: Draw) -> Tensor:
            return task.loss(draw, fixed_text)

        self.trace = Trace()
        zeros = [torch.zeros_like(adapter.B) for adapter in self.adapters.values()]
        return optimize(
            self.masters,
            self.settings,
            loss,
            descend=None if self.prefixed else recorded_loss(self.model, self.masters, task.draw, of_draw),
            zero_loss=lambda step: task.zero_loss(task.draw(step)),
            ahead=task.draw,
            start=[tensor for pair in zip(self.start_A, zeros, strict=True) for tensor in pair],
            fisher=self.fisher,
            held_out=lambda: task.held_out_loss(self.settings.held_out_draws, fixed_text),
            on_step=on_step,
            trace=self.trace,
        )

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
