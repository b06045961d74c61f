"""Time and memory of a step on a GPU (or, as a check, a CPU), compile time apart, and how many graphs were compiled."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch._dynamo.utils import counters

from ..engine.memory import peak_memory, reset_peak_memory
from .timing import FLUSH_BYTES, Ceilings

T = TypeVar("T")
Row = dict[str, Any]


class Phases:
    """Seconds between calls, the device's queue drained at each."""

    def __init__(self, watch: "Stopwatch") -> None:
        self.watch, self.seconds = watch, {}
        self.last = watch.now()

    def __call__(self, name: str) -> None:
        now = self.watch.now()
        self.seconds[name] = now - self.last
        self.last = now


class Stopwatch:
    """Times calls, each with a cold L2 cache: between two of them as many bytes are written as several caches hold."""

    def __init__(self, device: torch.device, runs: int = 5) -> None:
        self.device, self.runs = device, runs
        self._flush: torch.Tensor | None = None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reset_peak(self) -> None:
        reset_peak_memory(self.device)

    def peak(self) -> float:
        return (peak_memory(self.device) or 0) / 2**30

    def phases(self) -> Phases:
        return Phases(self)

    def measure(self, call: Callable[[], T], runs: int | None = None) -> tuple[Row, T]:
        """Median of calls after the first two, by CUDA events on a GPU; `first_s` holds what compiling takes. The peak is of the
        second call, before the memory that empties the cache is taken."""
        start = self.now()
        result = call()
        first = self.now() - start
        self.reset_peak()
        call()
        self.now()
        peak = self.peak()
        times = self.cold(call, runs or self.runs)
        row = {
            "ms": statistics.median(times), "low": min(times), "high": max(times), "runs": len(times), "times": times,
            "first_s": first, "peak_gib": peak,
        }  # fmt: skip
        return row, result

    def cold(self, call: Callable[[], Any], runs: int) -> list[float]:
        """Milliseconds of calls, the cache emptied before each."""
        if self.device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        try:
            return [self.once(call) for _ in range(runs)]
        finally:
            self._flush = None

    def ceilings(self) -> Ceilings:
        """What this machine reaches in this run: a copy of 1 GiB and a bfloat16 product of side 8192; less on a CPU, as a check."""
        cuda = self.device.type == "cuda"
        count, side, dtype = (2**30, 8192, torch.bfloat16) if cuda else (2**20, 256, torch.float32)
        source, target = torch.ones(2, count, dtype=torch.int8, device=self.device)
        copy, _ = self.measure(lambda: target.copy_(source), 10)
        a, b = torch.randn(2, side, side, device=self.device, dtype=dtype)
        product, _ = self.measure(lambda: a @ b, 10)
        return Ceilings(2 * count / copy["ms"] * 1e3, 2 * side**3 / product["ms"] * 1e3)

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        if self._flush is not None:
            self._flush.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        before.record()
        call()
        after.record()
        torch.cuda.synchronize(self.device)
        return before.elapsed_time(after)

    def wall(self, call: Callable[[], T], undo: Callable[[], Any]) -> tuple[Row, T]:
        """Median wall time of whole calls, each undone before the next; what undoing touches is the cache's last content."""
        times, self_peak = [], 0.0
        for _ in range(3):
            self.reset_peak()
            start = self.now()
            result = call()
            times.append((self.now() - start) * 1e3)
            self_peak = max(self_peak, self.peak())
            undo()
        row = {
            "ms": statistics.median(times),
            "low": min(times),
            "high": max(times),
            "times": times,
            "peak_gib": self_peak,
        }
        return row, result  # type: ignore[possibly-undefined]

    def steps(self, adapt: Callable[[Callable[[int, float], None]], T], undo: Callable[[], Any]) -> tuple[Row, T]:
        """Median wall time from step to step of a loop that reports its steps, each when its numbers have come from the device, which is
        by then at work on the next; a first loop compiles and is undone.

        Nothing empties the cache inside the method's own loop: a step reads weights of many times its size."""
        start = self.now()
        adapt(lambda step, loss: None)
        first = self.now() - start
        undo()
        times: list[float] = []
        self.reset_peak()
        begin = self.now()
        result = adapt(lambda step, loss: times.append(time.perf_counter()))
        whole = self.now() - begin
        between = [(b - a) * 1e3 for a, b in pairwise(times)]
        row = {
            "ms": statistics.median(between), "low": min(between), "high": max(between), "runs": len(between), "times": between,
            "first_s": first, "loop_s": whole, "steps": len(times), "peak_gib": self.peak(),
        }  # fmt: skip
        if self.device.type == "cuda":  # a recorded step's activations count as reserved, not as allocated
            row["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        return row, result

    def graphs(self, before: Row | None = None) -> Row:
        """Graphs compiled so far and breaks of graphs, or how many more than `before`."""
        found = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
        if before is None:
            return found
        return {"graphs_more": found["graphs"] - before["graphs"], "breaks_more": found["breaks"] - before["breaks"]}
