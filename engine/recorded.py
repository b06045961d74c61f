"""A computation recorded once as a CUDA graph and replayed: what was thousands of launches becomes one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Recorded:
    """compute(*inputs), recorded. Every tensor that it reads or writes besides its inputs must stay where it is: weights, tables,
    gradients that exist already (they are added to). Gradients that it makes lie in the record's storage, as its result does, and
    are overwritten by the next call.

    warm_ups: runs before recording, in which code compiles and libraries choose algorithms; they have the computation's effects.
    pool: memory of an earlier record that no one calls any more, to be used again (`pool` of that record).
    The same kernels run on the same numbers as in `compute`, so equal bits are expected; README.md says what was seen of it on a card.
    """

    def __init__(
        self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], *, warm_ups: int, pool: Any = None
    ) -> None:
        self.inputs = tuple(tensor.detach().clone() for tensor in inputs)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(warm_ups):
                compute(*self.inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the card.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = compute(*self.inputs)

    @property
    def pool(self) -> Any:
        return self.graph.pool()

    def __call__(self, *inputs: Tensor) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.result
