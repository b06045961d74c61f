"""The loss and its gradients, recorded on a card: a step of thousands of small launches is replayed as one.

A record reads nothing of a clip but its inputs, so it serves all clips of a run whose latents and captions have the same shapes. The
same kernels run as when each step is launched (see recorded.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..recorded import Records


class RecordedLoss:
    """loss(*inputs) and its gradients; lives as long as its method is attached.

    inputs: all that differs from step to step and from clip to clip. parameters: what the loss is descended in, in storage that
    stays where it is. limit: see `Records`.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], loss: Callable[..., Tensor], limit: int) -> None:
        self.parameters = parameters = list(parameters)

        def descend(*inputs: Tensor) -> list[Tensor | None]:
            for parameter in parameters:
                parameter.grad = None  # made anew by the computation, and when it is recorded in the record's memory
            value = loss(*inputs)
            value.backward()
            return [value.detach(), *(parameter.grad for parameter in parameters)]

        self.records = Records(descend, limit)

    def __call__(self, *inputs: Tensor) -> Callable[[], Tensor]:
        """Ask the device for the loss and its gradients, and wait for nothing. What is returned lays the gradients in the parameters'
        `.grad` and gives the loss, detached; until the next call."""
        value, *gradients = self.records(*inputs)
        for parameter in self.parameters:
            parameter.grad = None

        def take() -> Tensor:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            return value

        return take
