"""Telling failures of the machine, which another process or a later moment is spared, from those of a clip.

A GPU whose driver reported an error computes nothing more in this process. A file system that is gone for a minute (a server
that restarts) comes back: what was in hand is then done again.
"""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import MachineFailed, UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
GONE_NAMES = (
    "EIO",
    "ESTALE",
    "ENOTCONN",
    "ETIMEDOUT",
    "EHOSTDOWN",
    "EHOSTUNREACH",
    "EREMOTEIO",
    "ENODEV",
    "ENXIO",
    "ESHUTDOWN",
)
GONE = frozenset(getattr(errno, name) for name in GONE_NAMES if hasattr(errno, name))
MEMORY_TEXTS = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
GPU_TEXTS = ("CUDA error", "Triton Error [CUDA]", "CUDNN_STATUS_EXECUTION_FAILED")
PATIENCE = 600.0
"""Seconds to wait for a file system that is gone, before the process ends and asks for a requeue."""
AGAIN = 5.0
"""Seconds between two looks."""


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it was raised from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    return any(
        isinstance(e, torch.OutOfMemoryError | MemoryError)
        or (isinstance(e, RuntimeError) and any(text in str(e) for text in MEMORY_TEXTS))
        for e in causes(error)
    )


def gpu_failed(error: BaseException) -> bool:
    """Whether the GPU or its driver failed, so that this process can compute nothing more on it."""
    return not out_of_memory(error) and any(
        isinstance(e, torch.AcceleratorError)
        or (isinstance(e, RuntimeError) and any(text in str(e) for text in GPU_TEXTS))
        for e in causes(error)
    )


def storage_failed(error: BaseException, root: Path) -> bool:
    """Whether the file system failed, not the clip: by the system's error, or as the run directory is not there."""
    return any(isinstance(e, OSError) and e.errno in GONE for e in causes(error)) or not there(root)


def there(root: Path) -> bool:
    """Whether a run directory that was begun can be read. An empty mount point is not one."""
    try:
        return bool((root / "recipe.yaml").read_bytes())
    except OSError:
        return False


def wait_for(root: Path, check_stop: Callable[[], None], say: Callable[[str], None]) -> None:
    """Wait until the run directory is there again; raises MachineFailed after PATIENCE seconds."""
    until = time.monotonic() + PATIENCE
    say(f"waiting for the file system of {root}")
    while True:
        time.sleep(AGAIN)
        check_stop()
        if there(root):
            return
        if time.monotonic() > until:
            raise MachineFailed(f"{root}: the file system has been gone for {PATIENCE / 60:.0f} minutes")


@contextmanager
def system_errors_told(root: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full, or that its file system is gone; what is finished stays."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(f"{root}: {error.strerror}; free some space and give the same command again") from error
        if error.errno in GONE:
            raise MachineFailed(f"{root}: the file system failed ({error.strerror})") from error
        raise
