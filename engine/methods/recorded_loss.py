"""The loss and its gradients of a clip's steps, recorded on a card: a step of thousands of small launches is replayed as one.

The first step of a clip runs as it is, and so compiles and chooses algorithms where these are new; the second is recorded, and
it and the rest are replayed. The same kernels run as when each step is launched (see recorded.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..adaptation import Draw
from ..models.paths import records
from ..models.stdit3 import STDiT3
from ..recorded import Recorded
from .optimize import Masters


def recorded_loss(
    model: STDiT3, masters: Masters, draw: Callable[[int], Draw], loss: Callable[[Draw], Tensor]
) -> "RecordedLoss | None":
    """For `optimize`; None where steps are launched one by one (`paths.records`), which also frees an earlier record."""
    if records(model):
        return RecordedLoss(masters, draw, loss)
    masters.record = None
    return None


class RecordedLoss:
    """loss(draw) and its gradients for the draw of each step. masters: whose parameters it is descended in; they keep the last
    clip's record, whose memory the next one uses again."""

    def __init__(self, masters: Masters, draw: Callable[[int], Draw], loss: Callable[[Draw], Tensor]) -> None:
        self.masters, self.draw, self.loss = masters, draw, loss
        self.gradients: list[Tensor | None] = []
        self.ready = False

    def __call__(self, step: int) -> Tensor:
        """The loss, detached; gradients are left in the parameters' `.grad`."""
        draw = self.draw(step)
        if step == 0:
            return self._launch(draw.t, draw.noise)
        if not self.ready:
            self._record(draw)
        assert self.masters.record is not None
        value = self.masters.record(draw.t, draw.noise)
        for parameter, gradient in zip(self.masters.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return value

    def _launch(self, t: Tensor, noise: Tensor) -> Tensor:
        value = self.loss(Draw(t, noise))
        value.backward()
        return value.detach()

    def _record(self, draw: Draw) -> None:
        last, self.masters.record = self.masters.record, None
        for parameter in self.masters.parameters:
            parameter.grad = None  # made anew inside the record
        pool = None if last is None else last.pool
        if pool is None and draw.noise.is_cuda:
            torch.cuda.empty_cache()  # the launched step's activations, which the record's would come on top of
        self.masters.record = Recorded(self._launch, (draw.t, draw.noise), warm_ups=0, pool=pool)
        self.gradients = [parameter.grad for parameter in self.masters.parameters]
        self.ready = True
