"""Stopping a run on request: a signal sets a flag, and the run looks at it between steps and between clips.

SIGINT and SIGTERM: stop at the next step; the clip in hand is dropped. SIGUSR1, which a batch system sends ahead of a time
limit: the clip in hand may be finished, within GRACE seconds, and the exit status asks for a requeue.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import Interrupted, OutOfTime

GRACE = 300.0
"""Seconds after SIGUSR1 in which the clip in hand may be finished; the batch files ask for the signal twice as long ahead."""

LISTENER = "listens for SIGUSR1"
_heard: list[float] = []


class StopFlag:
    """Set by a signal. A second SIGINT or SIGTERM acts as it did before the run; a second SIGUSR1 changes nothing."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.earlier: dict[int, Any] = {}

    def check(self, *, in_clip: bool = False) -> None:
        """Raise Interrupted, or OutOfTime, if the run has to stop here. in_clip: a clip is begun and could be finished."""
        if _heard and (self.signal is not None or not in_clip or time.monotonic() - _heard[0] > GRACE):
            raise OutOfTime("stopped by SIGUSR1, ahead of a time limit")
        if self.signal is not None:
            raise Interrupted(f"stopped by {self.signal.name}")

    def _set(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self.earlier[number])


def listen_for_out_of_time() -> None:
    """From now on SIGUSR1 is taken note of, for `StopFlag.check`, and ends nothing. Call first: imports and loading take a while.

    Slurm sends it to every process of a step. Threads and programs that are started later inherit that it is blocked, so it
    does not end decoding workers or compilers either; one thread takes it.
    """
    _heard.clear()
    if all(thread.name != LISTENER for thread in threading.enumerate()):
        signal.signal(signal.SIGUSR1, _hear)  # for threads that were there before
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        threading.Thread(target=_listen, name=LISTENER, daemon=True).start()


def _hear(number: int, frame: object) -> None:
    _heard.append(time.monotonic())


def _listen() -> None:
    while True:
        _hear(signal.sigwait({signal.SIGUSR1}), None)


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
