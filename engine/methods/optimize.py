"""The optimisation that the gradient methods share: AdamW on float32 masters, whatever dtype the network computes in.

bfloat16 weights near 0.03 round away steps below about 6e-5, so steps are taken on float32 copies and the network's own
weights are set from them (arXiv:1710.03740, section 3.1). Schedule, penalties and early stopping are parts.py's.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor and fused operations under private names alone)

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite

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

    A float32 parameter is its own master. `publish` sets the network's weights from the masters, and what is computed from
    those (on_publish); `reset` takes the masters back to given values. fused: take steps by FusedAdamW, a few parameters
    at a time, without float32 gradients of all of them.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        on_publish: Callable[[], None] = lambda: None,
        *,
        fused: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.on_publish = on_publish
        self.fused = fused
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
    descend: Callable[[int], Tensor] | None = None,
    ahead: Callable[[int], object] = lambda step: None,
    start: Sequence[Tensor] = (),
    fisher: Fisher | None = None,
    held_out: Callable[[], Tensor] | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    trace: Trace | None = None,
) -> Trace:
    """Take `settings.steps` steps on loss(step) + penalty(); the optimizer's moments start from zero.

    descend(step), where given, takes the place of computing loss(step) and its gradients (recorded_loss.py).
    ahead(step) may prepare a step while the device works on the one before. start, fisher: the unadapted masters and what EWC
    weighs by, for the settings' penalties; held_out: the loss that early stopping looks at. on_step(step, loss) runs after each
    step and may raise to stop; the weights in force are then the step's, and `trace` (given to be read there, and returned) says
    what has been done. Raises FloatingPointError at a loss that is not finite.
    """
    assert all(master.dtype == torch.float32 for master in masters.tensors), "steps on rounded weights would be lost"
    trace = Trace() if trace is None else trace
    penalties = Penalties(settings, start, fisher) if settings.l2 or settings.ewc else None
    fused = takes_fused_steps(masters, settings)
    optimizer = FusedAdamW(masters, settings) if fused else PlainAdamW(masters, settings, penalties)
    best = None
    if settings.early_stopping:
        assert held_out is not None, "early stopping needs a held-out loss"
        best = BestStep(settings.early_stopping, held_out, masters.tensors)
        trace.held_out = best.losses
    try:
        for step in range(settings.steps):
            if descend is not None:
                value = descend(step)
            else:
                value = loss(step)
                (value if penalty is None else value + penalty()).backward()
            norm = optimizer.gradient_norm()
            zero = None if zero_loss is None else zero_loss(step)
            if step + 1 < settings.steps:
                ahead(step + 1)
            number = value.item()
            if not (isfinite(number) and isfinite(norm.item())):
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {step}; a smaller lr may help"
                )
            optimizer.step(norm, settings.lr * settings.rate(step, settings.steps))
            if isinstance(optimizer, PlainAdamW) and penalties:
                trace.penalties.append(optimizer.penalty)
            trace.steps += 1
            trace.losses.append(number)
            trace.gradient_norms.append(norm.item())
            if zero is not None:
                trace.zero_losses.append(zero.item())
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


def takes_fused_steps(masters: Masters, settings: AdamW) -> bool:
    """Whether `optimize` steps by FusedAdamW. A penalty adds to float32 gradients of all parameters, which that never has at once."""
    return masters.fused and not (settings.l2 or settings.ewc)


def describe_steps(masters: Masters, settings: AdamW) -> str:
    """Which optimizer `optimize` takes, for the record."""
    if takes_fused_steps(masters, settings):
        return "torch's fused AdamW, a few parameters at a time"
    return "torch's AdamW" + (" (the fused one takes no penalty)" if masters.fused else "")


class PlainAdamW:
    """torch's AdamW on float32 copies of the gradients. penalty: of the last step."""

    def __init__(self, masters: Masters, settings: AdamW, penalties: Penalties | None = None) -> None:
        self.masters, self.settings, self.penalties, self.penalty = masters, settings, penalties, 0.0
        self.optimizer = torch.optim.AdamW(
            masters.tensors, settings.lr, settings.betas, settings.eps, weight_decay=settings.weight_decay
        )

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradient that `backward` left and of the penalties' share, over all parameters."""
        self.masters.take_gradients()
        if self.penalties:
            self.penalty = self.penalties.add_gradients(self.masters.tensors)
        return torch.nn.utils.get_total_norm([m.grad for m in self.masters.tensors if m.grad is not None])

    def step(self, norm: Tensor, lr: float) -> None:
        """Clip, step, and set the network's weights."""
        if self.settings.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(self.masters.tensors, self.settings.gradient_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.penalties:
            self.penalties.step(self.masters.tensors, lr)
        self.optimizer.zero_grad(set_to_none=True)
        self.masters.publish()


class FusedAdamW:
    """The same step by torch's fused kernel: cast, clip, step and publish a bounded number of parameters at a time."""

    GROUP = 2**26  # numbers whose float32 gradients exist at once: 256 MiB

    def __init__(self, masters: Masters, settings: AdamW) -> None:
        self.masters, self.settings = masters, settings
        with torch.no_grad():
            self.first = [torch.zeros_like(m) for m in masters.tensors]
            self.second = [torch.zeros_like(m) for m in masters.tensors]
        self.count = [torch.zeros((), device=m.device) for m in masters.tensors]

    def gradient_norm(self) -> Tensor:
        grads = [p.grad for p in self.masters.parameters if p.grad is not None]
        return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).norm()

    @torch.no_grad()
    def step(self, norm: Tensor, lr: float) -> None:
        s, m = self.settings, self.masters
        # The kernel divides gradients by this number: clip_grad_norm_'s rule, without a pass of its own.
        divisor = (norm + 1e-6).div(s.gradient_clip).clamp(min=1.0) if s.gradient_clip else torch.ones_like(norm)
        for group in self._groups():
            parameters, masters = [m.parameters[i] for i in group], [m.tensors[i].detach() for i in group]
            torch._fused_adamw_(
                masters, [p.grad.float() for p in parameters if p.grad is not None],
                [self.first[i] for i in group], [self.second[i] for i in group], [], self._counted(group),
                lr=lr, beta1=s.betas[0], beta2=s.betas[1], weight_decay=s.weight_decay, eps=s.eps,
                amsgrad=False, maximize=False, grad_scale=divisor, found_inf=None,
            )  # fmt: skip
            torch.autograd.graph.increment_version(
                masters
            )  # the fused kernel writes without telling (models/float8.py asks)
            for parameter in parameters:
                parameter.grad = None
        m.publish()

    def _counted(self, group: list[int]) -> list[Tensor]:
        counts = [self.count[i] for i in group]
        torch._foreach_add_(counts, 1)
        return counts

    def _groups(self) -> Iterator[list[int]]:
        """Indices of the parameters that have a gradient, in groups of about GROUP numbers."""
        group: list[int] = []
        size = 0
        for i, parameter in enumerate(self.masters.parameters):
            if parameter.grad is None:
                continue
            group.append(i)
            size += parameter.numel()
            if size >= self.GROUP:
                yield group
                group, size = [], 0
        if group:
            yield group
