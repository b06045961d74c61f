"""Files that are either whole or absent: written under a temporary name, flushed to disk, then renamed."""

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .writers import PATTERN, is_gone, this_writer

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{12}-(?:(?P<writer>" + PATTERN + r")-)?.*")
ABANDONED_AFTER = 3600.0
"""Seconds without a change after which nobody can be writing a temporary file any more: a write takes seconds."""


@contextmanager
def atomic_path(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same suffix; on success it is flushed to disk and takes the place of `path`.

    On any exception the temporary file is removed and `path` stays as it was. flush: False for what nothing is decided by and
    may be lost with the machine's power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("-".join([f".tmp-{uuid.uuid4().hex[:12]}", *filter(None, [this_writer()]), path.name]))
    try:
        yield temporary
        if flush:
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
        temporary.replace(path)
        if flush:
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path, now: float | None = None) -> None:
    """Remove temporary files, at any depth, that a killed process left; those of live ones stay.

    Told by the process where its name says that it was one of this machine, and else by age: tasks on other hosts and in other
    containers share a run directory. now: the time by the file system's own clock; by default this machine's. A process
    elsewhere that slept for longer than ABANDONED_AFTER in the middle of a write fails at that write and at no other.
    """
    now = time.time() if now is None else now
    for parent, _, names in os.walk(folder):
        for found in filter(None, map(TEMPORARY.fullmatch, names)):
            path, writer = Path(parent, found.string), found["writer"]
            with suppress(FileNotFoundError):  # another task removes the same ones
                if (writer and is_gone(writer)) or now - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()


def write_text(path: Path, text: str, flush: bool = True) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path, flush) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, flush: bool = True) -> None:
    """Write JSON atomically; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", flush)


def write_json_once(path: Path, value: Any) -> bool:
    """Write JSON atomically where no file is yet; False where another process was first, whose file then stays whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{path.name}")
    write_json(own, value)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    finally:
        own.unlink(missing_ok=True)
    return True


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically, from any device; raises OSError where the disk refuses, as the others do."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors puts a file in its place that others cannot read
        try:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # the system's error is inside its text alone
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        temporary.chmod(mode)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_tensor(tensor: "Tensor") -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal, from any device and of any dtype (bfloat16 too, which numpy lacks)."""
    import torch

    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form (sorted keys, no white space), in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
