"""Clips converted side by side, a process each; decoding and encoding take one thread, so results depend on no number.

A worker that outlives its parent would hold memory for ever, so each watches for the parent's end.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..processors import usable_cpus
from .settings import Settings


@dataclass(frozen=True)
class Job:
    """What a worker is handed."""

    id: str
    video: Path
    out: Path
    settings: Settings


def work(job: Job) -> dict[str, Any]:
    """`convert`, imported where it runs: the process that hands out jobs needs neither torch nor av."""
    from .convert import convert

    return convert(job)


def executor(workers: int) -> Executor:
    """Something to submit work to: processes, or for one worker this process."""
    return _Processes(workers) if workers > 1 else _Here()


def end_workers() -> None:
    """End the processes at once. What they had in hand is lost, and done anew by the next command."""
    for process in multiprocessing.active_children():
        process.terminate()


def usual_workers() -> int:
    """As many as processors, at most 16: each worker takes 0.4 GB."""
    return min(16, usable_cpus())


class _Here(Executor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Processes(ProcessPoolExecutor):
    def __init__(self, workers: int) -> None:
        # Forking a process in which torch has run threads can hang, so workers start afresh.
        super().__init__(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # Ctrl-C reaches every process of a terminal, and the parent decides; workers inherit what is blocked here.
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _begin() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
