"""Stopping a run on request: the signal handler sets a flag, and the run looks at it between steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import Interrupted


class StopFlag:
    """Set by SIGINT or SIGTERM; `check` raises Interrupted once it is set. A second signal acts as it did before the run."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.earlier: dict[int, Any] = {}

    def check(self) -> None:
        if self.signal is not None:
            raise Interrupted(f"stopped by {self.signal.name}")

    def _set(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self.earlier[number])


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Install the handlers for the time of a run, and put the earlier ones back."""
    flag = StopFlag()
    flag.earlier = {number: signal.signal(number, flag._set) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in flag.earlier.items():
            signal.signal(number, handler)
