"""Who is at work in a run directory: a small file a task, touched while its process lives and removed when it ends.

For `vidtta status` alone: nothing is decided by it, so a file that a killed task left harms nobody. Told by age, as tasks on
other hosts and in other containers share a run directory and their process numbers say nothing here.
"""

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files import ABANDONED_AFTER, write_json
from ..rundir import read_json

BEAT = 15.0
"""Seconds between two touches."""
SILENT_AFTER = 90.0
"""Seconds without a touch after which a task no longer counts as running."""


class Presence:
    """A task's file. `clip` may fail silently: a status that cannot be written stops no work."""

    def __init__(self, root: Path, clips: int) -> None:
        self.path = root / "tasks" / f"{uuid.uuid4().hex[:12]}.json"
        job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
        self.said: dict[str, Any] = {
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "job": f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job,
            "clips": clips,
            "since": time.time(),
        }

    def clip(self, arm: str, clip_id: str) -> None:
        """A clip begins."""
        self.said |= {"arm": arm, "clip": clip_id, "clip_since": time.time()}
        with suppress(OSError):
            write_json(self.path, self.said, flush=False)

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)


@contextmanager
def present(root: Path, clips: int) -> Iterator[Presence]:
    """Be seen at work in a run directory on so many clips of arms; removes what tasks that were killed long ago left."""
    remove_silent(root)
    presence, ended = Presence(root, clips), threading.Event()
    threading.Thread(target=presence._beat, args=(ended,), daemon=True).start()
    try:
        yield presence
    finally:
        ended.set()
        with suppress(OSError):
            presence.path.unlink(missing_ok=True)


def running(root: Path, now: float | None = None) -> list[dict[str, Any]]:
    """What each live task said last: host, pid, job, clips, since, arm, clip, clip_since."""
    now = time.time() if now is None else now
    found = []
    for path in sorted((root / "tasks").glob("[0-9a-f]*.json")):
        with suppress(OSError):
            if now - path.stat().st_mtime <= SILENT_AFTER and (said := read_json(path)):
                found.append(said)
    return found


def remove_silent(root: Path) -> None:
    for path in (root / "tasks").glob("[0-9a-f]*.json"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                path.unlink()
