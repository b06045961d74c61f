"""What `bench.kernels` runs of the optimizer: a step of AdamW over all of the network's parameters, and the norm that clips it."""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor operations under private names alone)

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.methods.adamw import FusedAdamW, OnePassAdamW, clip_divisor
from ..engine.methods.full import FullFineTuning
from ..engine.methods.optimize import Masters
from ..engine.models.stdit3 import STDiT3
from ..kernels import adamw_step
from .kernel_cases import Case, Inputs, Sizes, randn

SETTINGS = FullFineTuning(lr=1e-3)
RATES = adamw_step.Rates(SETTINGS.lr, SETTINGS.betas, SETTINGS.eps, SETTINGS.weight_decay)


def optimizer_cases(s: Sizes) -> Iterator[Case]:
    """The float64 truth of a step takes 70 GiB for a moment at the real size."""
    with torch.device("meta"):
        shapes = [p.shape for name, p in STDiT3(s.network).named_parameters() if name != "rope.freqs"]
    count = sum(shape.numel() for shape in shapes)

    def make_grads(device: torch.device, dtype: torch.dtype) -> Inputs:
        return [randn(device, dtype, *shape) for shape in shapes]

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        masters, first = ([randn(device, torch.float32, *shape, scale=0.03) for shape in shapes] for _ in range(2))
        # Away from zero: a step divides by its root, and what rounding did before would be all that is compared.
        second = [randn(device, torch.float32, *shape, scale=0.03).square_().add_(1e-4) for shape in shapes]
        return [*masters, *first, *second, *make_grads(device, dtype)]

    yield Case(
        "adamw_step", str(count), make, _reference,
        {"triton": _Steps(OnePassAdamW), "torch's fused, in groups": _Steps(FusedAdamW)},
        # The norm over all gradients must be known before the first of them is used, so they are read twice.
        ((2 + 28) * count, 0), floors={"torch's fused, float32 gradients given": _fused_alone},
        variants=tuple((adamw_step, {"CHUNK": n}) for n in (4096, 65536)), compile=False, traced=False,
    )  # fmt: skip
    yield Case(
        "gradient_norm", str(count), make_grads, _norm, {"triton": _Norm()}, (2 * count, 0),
        variants=tuple((adamw_step, {"SQUARES": n}) for n in (2048, 8192)), compile=False, traced=False,
    )  # fmt: skip


def _quarters(tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """Masters, first and second moments, gradients."""
    n = len(tensors) // 4
    return [list(tensors[i * n : (i + 1) * n]) for i in range(4)]


def _norm(*grads: Tensor) -> Tensor:
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(grads), 2, dtype=wide)).norm()


def _reference(*tensors: Tensor) -> list[Tensor]:
    """Weights and masters after the first step, an operation at a time."""
    masters, first, second, grads = _quarters(tensors)
    divisor = clip_divisor(_norm(*grads), SETTINGS)
    state = zip(masters, first, second, grads, strict=True)
    after = [adamw_step.adamw_step_reference(*row, 1, divisor, RATES)[0] for row in state]
    return [*(master.to(grad.dtype) for master, grad in zip(after, grads, strict=True)), *after]


def _fused_alone(*tensors: Tensor) -> None:
    """Neither norm, cast nor weights, and one call for all; the moments are the inputs' own and change."""
    masters, first, second, grads = _quarters(tensors)
    (b1, b2), counts = SETTINGS.betas, [torch.ones((), device=grads[0].device)] * len(grads)
    torch._fused_adamw_(
        masters, masters, first, second, [], counts, lr=SETTINGS.lr, beta1=b1, beta2=b2, eps=SETTINGS.eps,
        weight_decay=0.0, amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
    )  # fmt: skip


class _Kept:
    """What a call makes of its inputs the first time, and further calls go on with; of one call at a time, for memory's sake."""

    now: tuple[Any, Any] = (None, None)

    def of(self, tensors: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        key = id(self), tensors[0].data_ptr(), adamw_step.CHUNK
        if _Kept.now[0] != key:
            _Kept.now = None, None
            _Kept.now = key, make()
        return _Kept.now[1]


class _Steps(_Kept):
    """A way of steps, on a copy of the inputs: the first call takes the step that is checked, timed ones go on from there."""

    def __init__(self, kind: type[FusedAdamW] | type[OnePassAdamW]) -> None:
        self.kind = kind

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        masters, first, second, grads = _quarters(tensors)

        def start() -> FusedAdamW | OnePassAdamW:
            optimizer = self.kind(
                Masters([nn.Parameter(m.to(g.dtype)) for m, g in zip(masters, grads, strict=True)]), SETTINGS
            )
            mine = optimizer if isinstance(optimizer, FusedAdamW) else optimizer.state
            for kept, given in ((optimizer.masters.tensors, masters), (mine.first, first), (mine.second, second)):
                torch._foreach_copy_(kept, given)
            return optimizer

        with torch.no_grad():
            optimizer = self.of(tensors, start)
        for parameter, grad in zip(optimizer.masters.parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step(optimizer.gradient_norm(), SETTINGS.lr)
        return [t.detach() for t in (*optimizer.masters.parameters, *optimizer.masters.tensors)]


class _Norm(_Kept):
    """The norm, with the gradients standing for their weights."""

    def __call__(self, *grads: Tensor) -> Tensor:
        state = self.of(grads, lambda: adamw_step.AdamWState(grads, [g.float() for g in grads]))
        state.point(grads)
        return adamw_step.gradient_norm(state)
