"""The optimisation that the gradient methods share: AdamW on float32 masters, whatever dtype the network computes in.

bfloat16 weights near 0.03 round away steps below about 6e-5, so steps are taken on float32 copies and the network's own
weights are set from them (arXiv:1710.03740, section 3.1). Schedule, penalties and early stopping are parts.py's.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor and fused operations under private names alone)

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from ..models.paths import MethodPath
from ..transfer import on_its_way
from .adamw import PlainAdamW, stepper
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

    A float32 parameter is its own master. `publish` sets the network's weights from the masters, and what is computed from
    those (on_publish); `reset` takes the masters back to given values. path: how steps are taken (adamw.py).
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        on_publish: Callable[[], None] = lambda: None,
        *,
        path: MethodPath = "plain",
    ) -> None:
        self.parameters = list(parameters)
        self.on_publish = on_publish
        self.path: MethodPath = path
        self.tensors = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]

    def take_gradients(self) -> None:
        """Move each parameter's gradient to its master, in float32."""
        for parameter, master in zip(self.parameters, self.tensors, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        pairs = [(p, m) for p, m in zip(self.parameters, self.tensors, strict=True) if m is not p]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])
        self.on_publish()

    @torch.no_grad()
    def reset(self, values: Sequence[Tensor]) -> None:
        if self.tensors:
            torch._foreach_copy_([t.detach() for t in self.tensors], list(values))


def optimize(
    masters: Masters,
    settings: AdamW,
    loss: Callable[[int], Tensor],
    *,
    zero_loss: Callable[[int], Tensor] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    descend: Callable[[int], Callable[[], Tensor]] | None = None,
    ahead: Callable[[int], object] = lambda step: None,
    start: Sequence[Tensor] = (),
    fisher: Fisher | None = None,
    held_out: Callable[[], Tensor] | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    trace: Trace | None = None,
) -> Trace:
    """Take `settings.steps` steps on loss(step) + penalty(); the optimizer's moments start from zero.

    descend(step), where given, takes the place of computing loss(step) and its gradients (recorded_loss.py): it asks the device for
    them, which is done a step ahead, and what it returns takes them. ahead(step) may prepare a step while the device works on the one
    before. start, fisher: the unadapted masters and what EWC weighs by, for the settings' penalties; held_out: the loss that early
    stopping looks at. on_step(step, loss) runs after each step and may raise to stop; the weights in force are then the step's, and
    `trace` (given to be read there, and returned) says what has been done. Raises FloatingPointError at a loss that is not finite.
    """
    assert all(master.dtype == torch.float32 for master in masters.tensors), "steps on rounded weights would be lost"
    trace = Trace() if trace is None else trace
    penalties = Penalties(settings, start, fisher) if settings.l2 or settings.ewc else None
    optimizer = stepper(masters, settings, penalties)
    best = None
    if settings.early_stopping:
        assert held_out is not None, "early stopping needs a held-out loss"
        best = BestStep(settings.early_stopping, held_out, masters.tensors)
        trace.held_out = best.losses
    try:
        take = descend(0) if descend is not None else None
        for step in range(settings.steps):
            if take is not None:
                value, take = take(), None  # which would keep the gradients that it gave beside those asked for next
            else:
                value = loss(step)
                (value if penalty is None else value + penalty()).backward()
            norm = optimizer.gradient_norm()
            numbers = [value, norm] if zero_loss is None else [value, norm, zero_loss(step)]
            read = on_its_way(numbers)
            if step + 1 < settings.steps:
                ahead(step + 1)
            # The device is given its next work before the host waits for this step's numbers. A loss that is not finite makes the
            # norm NaN, and then no step is taken.
            optimizer.step(norm + 0 * value.detach(), settings.lr * settings.rate(step, settings.steps))
            if step + 1 < settings.steps:
                take = descend(step + 1) if descend is not None else None
            number, length, *zero = read()
            if not (isfinite(number) and isfinite(length)):
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {step}; a smaller lr may help"
                )
            if isinstance(optimizer, PlainAdamW) and penalties:
                trace.penalties.append(optimizer.penalty)
            trace.steps += 1
            trace.losses.append(number)
            trace.gradient_norms.append(length)
            trace.zero_losses += zero
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
