"""While the device works on a clip, one thread reads the next one and finishes the one before.

Reading decodes and resizes a file. Finishing is what needs processors and no device: Farneback's flow, the videos, the result. None
of it touches the device, so the clip in hand computes as it would alone, a step may be recorded meanwhile (CUDA graphs forbid calls
of other threads), and a clip is finished even where the device has failed. What works on the device or starts from what is there is
done before, in the main thread. At most one clip is unfinished: it is waited for before the next one is handed over, before the arm
ends, and where the run stops or fails.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from types import TracebackType
from typing import Generic, TypeVar

import torch

from .processors import usable_cpus

Item = TypeVar("Item")
Made = TypeVar("Made")


def pays(device: torch.device) -> bool:
    """Whether to overlap: on a GPU. A clip on a CPU needs the same processors."""
    return device.type == "cuda"


class Begun(Generic[Made]):
    """Work that the thread does, or without one the caller, once, when it asks for the result. seconds: that it took, once done."""

    def __init__(self, work: Callable[[], Made], thread: ThreadPoolExecutor | None) -> None:
        self.seconds = 0.0
        self._work = work
        self._future = thread.submit(self._do) if thread else None

    def result(self) -> Made:
        """What the work gave; raises what it raised."""
        return self._future.result() if self._future else self._done

    def cancel(self) -> None:
        """Leave undone what is not begun: nobody will ask for it."""
        if self._future:
            self._future.cancel()

    @cached_property
    def _done(self) -> Made:
        return self._do()

    def _do(self) -> Made:
        begun = time.perf_counter()
        try:
            return self._work()
        finally:
            self.seconds = time.perf_counter() - begun


class Overlap:
    """The thread, and the clip that it finishes. Use as a context manager: at its end that clip is finished, whatever happened.

    on: False has no thread, and everything is done where it is asked for. processors: as many as flow may use.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        self.processors = max(1, usable_cpus() // 2) if on else usable_cpus()  # the rest launch the device's work
        self._thread = ThreadPoolExecutor(1, "beside the device") if on else None
        self._settle: Callable[[], object] | None = None

    def start(self, work: Callable[[], Made]) -> Begun[Made]:
        """Work that may run while the caller goes on; after all that was started before it."""
        return Begun(work, self._thread)

    def each(self, items: Sequence[Item], work: Callable[[Item], Made]) -> Iterator[tuple[Item, Begun[Made]]]:
        """Each item with work(item), which is started while the caller is at the item before."""
        begun = [self.start(partial(work, item)) for item in items[:1]]
        for item, following in zip(items, [*items[1:], None], strict=True):
            now = begun.pop()
            if following is not None:
                begun.append(self.start(partial(work, following)))
            yield item, now
            now.cancel()

    def hand_over(self, settle: Callable[[], object]) -> None:
        """Leave a clip to be finished: settle() waits for it and tells of it. The one before must be settled."""
        assert self._settle is None, "two clips unfinished"
        self._settle = settle
        if not self.on:
            self.settle()

    def settle(self) -> float:
        """Wait for the unfinished clip, if there is one, and tell of it; the seconds that took. Raises what ends a run."""
        settle, self._settle = self._settle, None
        begun = time.perf_counter()
        if settle:
            settle()
        return time.perf_counter() - begun

    def __enter__(self) -> "Overlap":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with suppress(Exception) if error else nullcontext():  # what ends the run already says why
                self.settle()
        finally:
            if self._thread:
                self._thread.shutdown(cancel_futures=True)
