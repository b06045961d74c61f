"""What the trainings of the autoencoder and the transformer share: cards, the optimizer's step, and weight files.

float32 weights compute in bfloat16 under autocast, so the optimizers (AdamW; Muon for matrices, where asked) move float32 masters.
On a card the forward and backward pass is recorded once a shape as a CUDA graph and replayed. With torchrun, one process a card takes
its share of every batch and gradients are averaged; the weights then stay equal on all of them.
"""

import math
import os
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..recorded import Recorded
from .muon import Muon

PIECE_BYTES = 16_000_000
"""Largest weight file; below 16 MiB."""


@dataclass(frozen=True)
class Cards:
    """The processes of one training. rank: of this one; count: of all; device: this one's."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls) -> "Cards":
        """This process among those that torchrun started, or alone."""
        rank, count, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, count, device)

    def average(self, tensor: Tensor) -> None:
        """Replace the tensor by its mean over the processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor /= self.count

    def autocast(self) -> torch.autocast:
        """bfloat16 compute on a card; float32 on a CPU, where bfloat16 is slow."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


@dataclass(frozen=True)
class Plan:
    """How long and how fast. The rate rises over `warmup` steps to `lr` and falls in a cosine to nothing."""

    steps: int
    """Steps of the optimizer."""
    batch: int
    """Clips a step and card."""
    lr: float
    warmup: int = 200
    decay: float = 0.999
    """Of the running average of the weights, which is what is saved."""
    minutes: float = math.inf
    """End after so long, if that comes before `steps`; what such a training did is told by its record."""


class Trainer:
    """Steps on trained tensors, equal on every card, and the running average of their values.

    AdamW, but for the `matrices` among them, which take Muon's steps (muon.py).
    Gradients are views of one flat buffer: one message between the cards and one norm.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], plan: Plan, cards: Cards, matrices: Sequence[nn.Parameter] = ()
    ) -> None:
        self.parameters, self.plan, self.cards = list(parameters), plan, cards
        apart = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in apart]
        fused = cards.device.type == "cuda"
        self.optimizers: list[torch.optim.Optimizer | Muon] = [
            torch.optim.AdamW(rest, plan.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
        ]
        if matrices:
            self.optimizers.append(Muon(matrices, plan.lr))
        self.averages = [p.detach().clone() for p in self.parameters]
        self.gradient = torch.zeros(sum(p.numel() for p in self.parameters), device=cards.device)
        parts = self.gradient.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self.records: dict[Hashable, Recorded] = {}
        self.taken, self.progress, self.start = 0, 0.0, time.perf_counter()

    def backward(self, kind: Hashable, losses: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        """Add the gradient of the first of `losses(*inputs)` to the buffer; returns all of them, detached, [number of losses].

        On a card the first computation of a kind is recorded, and later ones of it, whose inputs have the same shapes, replayed.
        """

        def compute(*inputs: Tensor) -> Tensor:
            with self.cards.autocast():
                values = losses(*inputs)
            values[0].backward()
            return torch.stack([value.detach() for value in values])

        if self.cards.device.type == "cpu":
            return compute(*inputs)
        if kind not in self.records:
            self.records[kind] = Recorded(compute, inputs, warm_ups=3)
            self.gradient.zero_()
        return self.records[kind](*inputs).clone()

    def step(self) -> bool:
        """One step on the gradients' mean over the cards, clipped at norm 1; returns whether another one follows."""
        self.cards.average(self.gradient)
        self.gradient *= (1 / self.gradient.norm().clamp(min=1e-6)).clamp(max=1)
        rise = min(1.0, (self.taken + 1) / self.plan.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.lr * rise * (0.5 + 0.5 * math.cos(math.pi * self.progress))
            optimizer.step()
        self.gradient.zero_()
        # The average is short at first, so that the start is forgotten.
        decay = min(self.plan.decay, (1 + self.taken) / (10 + self.taken))
        get_ema_multi_avg_fn(decay)(self.averages, [p.detach() for p in self.parameters], None)
        self.taken += 1
        return self._advance() < 1

    def _advance(self) -> float:
        """The share of the plan that is done, the same on every card."""
        if math.isinf(self.plan.minutes):
            self.progress = self.taken / self.plan.steps
        elif self.taken % 20 == 0 or self.taken == self.plan.steps:
            minutes = torch.tensor([(time.perf_counter() - self.start) / 60], device=self.cards.device)
            self.cards.average(minutes)
            self.progress = min(1.0, max(minutes.item() / self.plan.minutes, self.taken / self.plan.steps))
        return self.progress

    @torch.no_grad()
    def take_averages(self) -> None:
        """Set the trained tensors to their running averages."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)


def save_pieces(module: nn.Module, folder: Path) -> None:
    """The module's weights in bfloat16 as the hub publishes them: model.safetensors, or pieces of at most 16 MiB and their index."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().bfloat16().contiguous() for name, value in module.state_dict().items()}
    save_torch_state_dict(state, folder, filename_pattern="model{suffix}.safetensors", max_shard_size=PIECE_BYTES)
    for piece in folder.glob("model*.safetensors"):
        piece.chmod(0o644)  # the library leaves them for their owner's eyes alone
