"""The optimisation that the gradient methods share: AdamW on float32 masters, whatever dtype the network computes in.

bfloat16 weights near 0.03 round away steps below about 6e-5, so steps are taken on float32 copies and the network's own
weights are set from them (arXiv:1710.03740, section 3.1). Schedule, penalties and early stopping are parts.py's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .parts import BestStep, Fisher, Parts, Penalties


@dataclass
class Trace:
    """What adapting did. losses and zero_losses: of each step, before it (of a closed form: before
    and after it); steps: taken; penalties: of each step where there are any; held_out: (steps taken, loss on held-out draws) of
    early stopping, and kept_step the step it went back to; seconds are kept by the caller."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    zero_losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    kept_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class AdamW(Parts):
    """AdamW's settings; a method's settings inherit them."""

    steps: int = 20
    """Gradient steps a clip."""
    lr: float = 1e-5
    """Learning rate; `schedule` and `warmup` say how it goes over the steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and its square."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Decoupled decay towards zero."""
    gradient_clip: float = 1.0
    """Largest L2 norm of the gradient over all parameters; 0 switches clipping off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, was {self.steps}; to adapt nothing use method kind none")
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, was {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), were {list(self.betas)}")
        for name in ("weight_decay", "gradient_clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, was {getattr(self, name)}")


def random_of_equal_norm(value: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
    """start plus a random direction as long as value - start, in float32; for placebos. generator: on value's device."""
    noise = torch.randn(value.shape, generator=generator, device=value.device)
    length = (value.float() - start.float()).norm()
    return start.float() + noise * (length / noise.norm())


class Masters:
    """Float32 masters of a list of parameters, in storage that lives as long as the method is attached.

    A float32 parameter is its own master. `publish` sets the network's weights from the masters; `reset` takes the masters
    back to given values.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.tensors = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]

    def take_gradients(self) -> None:
        """Move each parameter's gradient to its master, in float32."""
        for parameter, master in zip(self.parameters, self.tensors, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, master in zip(self.parameters, self.tensors, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    @torch.no_grad()
    def reset(self, values: Sequence[Tensor]) -> None:
        for master, value in zip(self.tensors, values, strict=True):
            master.copy_(value)


def optimize(
    masters: Masters,
    settings: AdamW,
    loss: Callable[[int], Tensor],
    *,
    zero_loss: Callable[[int], Tensor] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    start: Sequence[Tensor] = (),
    fisher: Fisher | None = None,
    held_out: Callable[[], Tensor] | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    trace: Trace | None = None,
) -> Trace:
    """Take `settings.steps` steps on loss(step) + penalty(); the optimizer's moments start from zero.

    start, fisher: the unadapted masters and what EWC weighs by, for the settings' penalties; held_out: the loss that early
    stopping looks at. on_step(step, loss) runs after each step and may raise to stop; the weights in force are then the step's,
    and `trace` (given to be read there, and returned) says what has been done. Raises FloatingPointError at a loss that is not finite.
    """
    assert all(master.dtype == torch.float32 for master in masters.tensors), "steps on rounded weights would be lost"
    optimizer = torch.optim.AdamW(
        masters.tensors, settings.lr, settings.betas, settings.eps, weight_decay=settings.weight_decay
    )
    trace = Trace() if trace is None else trace
    penalties = Penalties(settings, start, fisher) if settings.l2 or settings.ewc else None
    best = None
    if settings.early_stopping:
        assert held_out is not None, "early stopping needs a held-out loss"
        best = BestStep(settings.early_stopping, held_out, masters.tensors)
        trace.held_out = best.losses
    try:
        for step in range(settings.steps):
            value = loss(step)
            total = value if penalty is None else value + penalty()
            total.backward()
            masters.take_gradients()
            if penalties:
                trace.penalties.append(penalties.add_gradients(masters.tensors))
            grads = [m.grad for m in masters.tensors if m.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            if settings.gradient_clip:
                torch.nn.utils.clip_grads_with_norm_(masters.tensors, settings.gradient_clip, norm)
            number = value.item()
            if not (torch.isfinite(value).item() and torch.isfinite(norm).item()):
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {step}; a smaller lr may help"
                )
            lr = settings.lr * settings.rate(step, settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            if penalties:
                penalties.step(masters.tensors, lr)
            optimizer.zero_grad(set_to_none=True)
            masters.publish()
            trace.steps += 1
            trace.losses.append(number)
            trace.gradient_norms.append(norm.item())
            if zero_loss is not None:
                trace.zero_losses.append(zero_loss(step).item())
            on_step(step, number)
            if best and best.look(step + 1):
                break
        if best:
            trace.kept_step = best.restore()
            masters.publish()
    finally:
        for tensor in (*masters.tensors, *masters.parameters):
            tensor.grad = None
    return trace
