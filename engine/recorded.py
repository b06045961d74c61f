"""A computation recorded once as a CUDA graph and replayed: what was thousands of launches becomes one."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 3  # runs before recording, in which libraries choose their algorithms and workspaces


class Recorded:
    """compute(*inputs), recorded. Every tensor that it reads or writes besides its inputs must stay where it is: weights,
    gradients that exist already (their `.grad` is added to), tables.

    It runs a few times while recording, so the caller resets what it adds to. The result of a call lies in the record's storage
    and is overwritten by the next one.
    """

    def __init__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(tensor.detach().clone() for tensor in inputs)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                compute(*self.inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = compute(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.result
