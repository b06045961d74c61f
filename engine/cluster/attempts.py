"""Making a clip's result again after what was not the clip's fault."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import Interrupted, MachineFailed
from ..models.stdit3 import STDiT3
from ..recompute import recomputed
from .machine import gpu_failed, out_of_memory, storage_failed, wait_for

Made = TypeVar("Made")

STORAGE, MEMORY = "the file system was gone", "out of memory; again with activation checkpointing"
TIMES = {STORAGE: 3, MEMORY: 1}


def persist(
    make: Callable[[tuple[str, ...]], Made],
    dit: STDiT3,
    root: Path,
    check_stop: Callable[[], None],
    say: Callable[[str], Any],
) -> Made:
    """What make(retries) gives; retries: why it was called again, for the record.

    Once more with activation checkpointing where memory ran out, and up to three times where the file system of the run
    directory was gone, after it is back. Raises MachineFailed where the GPU fails or the file system stays away, and what `make`
    raises for the clip's own faults and after the last retry.
    """
    retries: tuple[str, ...] = ()
    while True:
        try:
            with recomputed(dit) if MEMORY in retries else nullcontext():
                return make(retries)
        except (Interrupted, MachineFailed):
            raise
        except Exception as error:
            if gpu_failed(error):
                raise MachineFailed(f"GPU error ({_first_line(error)})") from error
            reason = MEMORY if out_of_memory(error) else STORAGE if storage_failed(error, root) else None
            if reason is None or retries.count(reason) >= TIMES[reason]:
                raise
            say(f"{reason} ({_first_line(error)})")
        # Out of the handler, so that the error no longer holds what was computed.
        retries = (*retries, reason)
        if reason == STORAGE:
            wait_for(root, check_stop, say)
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
