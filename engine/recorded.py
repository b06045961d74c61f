"""A computation recorded once as a CUDA graph and replayed: what was thousands of launches becomes one."""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor operations under private names alone)

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from .memory import note_peak

CAPTION_LENGTHS = 8
"""Records of a computation that are held at once: captions of another length have another."""


class Recorded:
    """compute(*inputs), recorded. Every tensor that it reads or writes besides its inputs must stay where it is: weights, tables,
    gradients that exist already (they are added to). Gradients that it makes lie in the record's storage, as its result does, and
    are overwritten by the next call.

    working: bytes that a call uses beside its result, which `memory.peak_memory` counts.
    warm_ups: runs before recording, in which code compiles and libraries choose algorithms; they have the computation's effects.
    pool: memory of an earlier record (`pool` of that record), to be used again: a call of either then overwrites the other's
    result. The same kernels run on the same numbers as in `compute`, so equal bits are expected; README.md says what was seen of
    it on a card.
    """

    made: ClassVar[int] = 0
    """How many this process has made, for benches."""

    def __init__(
        self, compute: Callable[..., Any], inputs: tuple[Tensor, ...], *, warm_ups: int, pool: Any = None
    ) -> None:
        Recorded.made += 1
        # Of the same strides, or code compiled for the inputs that were launched would be compiled anew while recording.
        self.inputs = [_room(tensor) for tensor in inputs]
        self.held: list[tuple[Tensor, int]] = []
        self._take(inputs)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(warm_ups):
                compute(*self.inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        note_peak(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        # Other threads may go on using the card.
        with _uncollected(), torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = compute(*self.inputs)
        self.working = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    @property
    def pool(self) -> Any:
        return self.graph.pool()

    def __call__(self, *inputs: Tensor) -> Any:
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{len(self.inputs)} inputs were recorded, {len(inputs)} given")
        self._take(inputs)
        note_peak(torch.cuda.memory_allocated() + self.working)
        self.graph.replay()
        return self.result

    @torch.no_grad()
    def _take(self, inputs: tuple[Tensor, ...]) -> None:
        """Copy the inputs to where the record reads them, but for those that lie there since the last call."""
        held = self.held or [(None, 0)] * len(inputs)
        new = [
            k
            for k, (t, (last, version)) in enumerate(zip(inputs, held, strict=True))
            if t is not last or t._version != version
        ]
        if new:
            torch._foreach_copy_([self.inputs[k] for k in new], [inputs[k] for k in new])
            self.held = [(t, t._version) for t in inputs]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector: a dead record that it finds would be destroyed while another is made, which CUDA does not permit."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _room(tensor: Tensor) -> Tensor:
    """Storage for a tensor like this, of its strides and as far into its memory, all of which a compiler may look at; one that is
    expanded gets a place for each of its numbers."""
    if any(stride == 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    start = tensor.storage_offset()
    last = start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.empty(last + 1, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), start)


class Records:
    """compute(*inputs), recorded once for each set of shapes and replayed from then on, for whatever inputs come.

    The first call at a set of shapes runs as it is, and so compiles and chooses algorithms where these are new; the second is
    recorded, and it and all later ones are replayed: their result lies in the record's storage, until the next call.
    limit: how many records are held; the one used longest ago goes first. All share their memory. Give every tensor that differs
    from call to call as an input; what else `compute` reads must stay where it is (see `Recorded`).
    """

    def __init__(self, compute: Callable[..., Any], limit: int) -> None:
        self.compute, self.limit = compute, limit
        self.seen: set[Hashable] = set()
        self.held: dict[Hashable, Recorded] = {}
        self.pool: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self.seen:
            self.seen.add(key)
            return self.compute(*inputs)
        record = self.held.pop(key, None) or self._record(inputs)
        self.held[key] = record  # the last one is the one used last
        return record(*inputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> Recorded:
        gone = self.held.pop(next(iter(self.held))) if len(self.held) == self.limit else None
        if gone:
            gone.result = None  # its memory is free then; the record itself keeps the pool alive until another does
        if self.pool is None and inputs[0].is_cuda:
            torch.cuda.empty_cache()  # what the launched call used, which the record's memory would come on top of
        record = Recorded(self.compute, inputs, warm_ups=0, pool=self.pool)
        self.pool = record.pool
        del gone
        return record
