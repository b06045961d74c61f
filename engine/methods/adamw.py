"""Three ways of one AdamW step on float32 masters, and which is taken: torch's, torch's fused kernel, and one Triton kernel.

Each has `gradient_norm()` of what `backward` left in the parameters' `.grad`, then `step(norm, lr)`, which clips by that norm,
steps, sets the network's weights and drops the gradients. Where the norm is not finite the step leaves weights, masters and moments as
they are; the fused ways see that on the device, so that the host need not wait for it. Moments start from zero.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor and fused operations under private names alone)

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import adamw_step
from ..models.paths import MethodPath
from .parts import Penalties

if TYPE_CHECKING:
    from .optimize import AdamW, Masters


def way_of_steps(masters: "Masters", settings: "AdamW") -> MethodPath:
    """Which way steps go. A penalty adds to float32 gradients of all parameters, which only the plain way has at once; the Triton
    kernel is for a GPU."""
    if masters.path == "plain" or settings.l2 or settings.ewc:
        return "plain"
    on_gpu = all(parameter.is_cuda for parameter in masters.parameters)
    return "triton" if masters.path == "triton" and on_gpu else "fused"


def describe_steps(masters: "Masters", settings: "AdamW") -> str:
    """Which way steps go, in words for the record."""
    way = way_of_steps(masters, settings)
    if way == "plain":
        return "torch's AdamW" + (" (the fused ones take no penalty)" if masters.path != "plain" else "")
    return {"fused": "torch's fused AdamW, a few parameters at a time", "triton": "AdamW in one Triton kernel"}[way]


def stepper(
    masters: "Masters", settings: "AdamW", penalties: Penalties | None
) -> "PlainAdamW | FusedAdamW | OnePassAdamW":
    """What takes the steps of a clip."""
    way = way_of_steps(masters, settings)
    if way == "plain":
        return PlainAdamW(masters, settings, penalties)
    return OnePassAdamW(masters, settings) if way == "triton" else FusedAdamW(masters, settings)


def clip_divisor(norm: Tensor, settings: "AdamW") -> Tensor:
    """What gradients are divided by: clip_grad_norm_'s rule, without a pass of its own; NaN where the norm is not finite."""
    divisor = (norm + 1e-6).div(settings.gradient_clip or torch.inf).clamp(min=1.0)
    return torch.where(norm.isfinite(), divisor, torch.nan)


class PlainAdamW:
    """torch's AdamW on float32 copies of the gradients. penalty: of the last step."""

    def __init__(self, masters: "Masters", settings: "AdamW", penalties: Penalties | None = None) -> None:
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
        if norm.isfinite():
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

    def __init__(self, masters: "Masters", settings: "AdamW") -> None:
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
        divisor, taken = clip_divisor(norm, s), norm.isfinite().float()
        harmful = 1 - taken
        for group in self._groups():
            parameters, masters = [m.parameters[i] for i in group], [m.tensors[i].detach() for i in group]
            torch._fused_adamw_(
                masters, [p.grad.float() for p in parameters if p.grad is not None],
                [self.first[i] for i in group], [self.second[i] for i in group], [], self._counted(group, taken),
                lr=lr, beta1=s.betas[0], beta2=s.betas[1], weight_decay=s.weight_decay, eps=s.eps,
                amsgrad=False, maximize=False, grad_scale=divisor, found_inf=harmful,
            )  # fmt: skip
            torch.autograd.graph.increment_version(
                masters
            )  # fused kernels write without telling (models/float8.py asks)
            for parameter in parameters:
                parameter.grad = None
        m.publish()

    def _counted(self, group: list[int], taken: Tensor) -> list[Tensor]:
        counts = [self.count[i] for i in group]
        torch._foreach_add_(counts, taken)
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


class OnePassAdamW:
    """The same step by one kernel over all parameters, which also clips and sets the network's weights."""

    def __init__(self, masters: "Masters", settings: "AdamW") -> None:
        self.masters, self.settings = masters, settings
        self.state = adamw_step.AdamWState(masters.parameters, masters.tensors)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        self.state.point([p.grad for p in self.masters.parameters])
        return adamw_step.gradient_norm(self.state)

    @torch.no_grad()
    def step(self, norm: Tensor, lr: float) -> None:
        """On the gradients that `gradient_norm` was taken of."""
        s = self.settings
        rates = adamw_step.Rates(lr, s.betas, s.eps, s.weight_decay)
        adamw_step.adamw_step(self.state, clip_divisor(norm, s), rates)
        torch.autograd.graph.increment_version(self.masters.parameters)  # as above
        for parameter in self.masters.parameters:
            parameter.grad = None
        self.masters.on_publish()
