"""Time and memory of one call on a GPU, and the two ceilings it is held against."""

import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

FLUSH_BYTES = 2**28  # several times the L2 cache


@dataclass(frozen=True)
class Timing:
    """milliseconds: median of `runs`; low and high: their quartiles; peak: bytes above what was held before; how: replayed from
    a CUDA graph (what Python takes to launch is then in no figure, eager PyTorch's included), or launched from Python."""

    milliseconds: float
    low: float
    high: float
    runs: int
    peak: int
    how: str
    times: tuple[float, ...] = ()
    """Each of the runs, in milliseconds."""


class Timer:
    """Times calls with CUDA events, each with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def measure(self, prepare: Callable[[], Callable[[], Any]], budget_ms: float = 150.0) -> Timing:
        """`prepare` makes what is not timed and gives the call; everything runs on the timer's own stream."""
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            call = prepare()
            call()
            torch.cuda.synchronize(self.device)
            held = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            for _ in range(3):
                call()
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) - held
            replay, how = self._captured(call)
            estimate = self._once(replay)
            runs = max(10, min(100, int(budget_ms / max(estimate, 1e-3))))
            times = self._many(replay, runs)
        low, middle, high = statistics.quantiles(times, n=4)
        return Timing(middle, low, high, runs, peak, how, tuple(times))

    def _captured(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
        """Replayed from a graph, small kernels are timed and not the time it takes Python to launch them."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                call()
        except RuntimeError:
            with suppress(RuntimeError):
                torch.cuda.synchronize(self.device)
            return call, "launched"
        graph.replay()
        torch.cuda.synchronize(self.device)
        return graph.replay, "graph"

    def _many(self, call: Callable[[], Any], runs: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for before, after in events:
            self._flush.zero_()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) for before, after in events]

    def _once(self, call: Callable[[], Any]) -> float:
        return statistics.median(self._many(call, 3))


@dataclass(frozen=True)
class Ceilings:
    """Measured on this card in this run: a large copy, bytes read plus written, and a large bfloat16 product."""

    bytes_per_second: float
    flops_per_second: float

    def shares(self, milliseconds: float, moved: int, flops: int) -> tuple[float, float]:
        """What part of each ceiling a call reached."""
        seconds = milliseconds / 1e3
        return moved / seconds / self.bytes_per_second, flops / seconds / self.flops_per_second

    def figures(self, milliseconds: float, moved: int, flops: int) -> dict[str, Any]:
        """The declared work of a call, its rates, and their shares of the ceilings."""
        of_copy, of_product = self.shares(milliseconds, moved, flops)
        return {
            "bytes": moved, "flops": flops,
            "gb_per_s": moved / milliseconds / 1e6, "tflop_per_s": flops / milliseconds / 1e9,
            "share_of_copy": of_copy, "share_of_product": of_product,
        }  # fmt: skip


def measure_ceilings(timer: Timer) -> Ceilings:
    source, target = torch.empty(2, 2**30, dtype=torch.int8, device=timer.device).random_()
    copy = timer.measure(lambda: partial(target.copy_, source))
    side = 8192
    a, b = torch.randn(2, side, side, device=timer.device, dtype=torch.bfloat16)
    product = timer.measure(lambda: lambda: a @ b)
    return Ceilings(2 * 2**30 / copy.milliseconds * 1e3, 2 * side**3 / product.milliseconds * 1e3)
