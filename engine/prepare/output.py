"""What lies in the folder of prepared clips, and the rule that one folder holds clips of one making.

OUT/prepare.json         source and settings; another one is refused
OUT/captions.txt         a sentence a class (or a clip); written once, then the user's
OUT/clips/<id>.mp4
OUT/state/<id>.json      what was done with a video; its presence means done
OUT/manifest.csv         for data.clips
OUT/rejects.csv          videos that did not become clips, and why
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import TEMPORARY, write_json, write_text

SUFFIX = ".mp4"
STORAGE = "FFV1 level 3, bgr0, MP4"
OURS = {"prepare.json", "captions.txt", "clips", "state", "manifest.csv", "rejects.csv", "downloads"}


def clip_path(out: Path, clip_id: str) -> Path:
    return out / "clips" / f"{clip_id}{SUFFIX}"


def state_path(out: Path, clip_id: str) -> Path:
    return out / "state" / f"{clip_id}.json"


def read_state(out: Path, clip_id: str) -> dict[str, Any] | None:
    """What was done with a video; None when nothing was, or when its clip is gone."""
    try:
        state = json.loads(state_path(out, clip_id).read_text(encoding="utf-8"))
        if "rejected" not in state and clip_path(out, clip_id).stat().st_size != state["bytes"]:
            return None
    except (FileNotFoundError, ValueError):
        return None
    return state


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder for one command alone. The lock is the system's and ends with the process, however that ends.

    Raises UserError when another holds it, or when the folder holds files of another making.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in out.iterdir() if path.name not in OURS)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{out}: cannot be written to ({error.strerror}); give another folder as --out") from error
    try:
        if strange := [name for name in others if not TEMPORARY.fullmatch(name)]:
            raise UserError(f"{out} holds other files ({', '.join(strange[:3])}); give a new folder as --out")
        with suppress(OSError):  # some network file systems do not lock folders
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another vidtta prepare is at work in {out}; wait for it to end") from error
        _remove_temporaries(out)
        try:
            yield
        finally:
            _remove_temporaries(out)
    finally:
        os.close(handle)


def begin(out: Path, identity: dict[str, Any], versions: dict[str, str]) -> dict[str, str]:
    """Write prepare.json, or compare `identity` with it; return the versions of the libraries that it was begun with.

    Raises UserError naming the first thing that differs. Versions may differ: whether that matters is the reader's to say.
    """
    path = out / "prepare.json"
    if not path.exists():
        write_json(path, {**identity, "versions": versions})
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        begun_with = earlier.pop("versions")
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not as vidtta prepare wrote it ({error}); give another folder as --out") from error
    for name in {**earlier, **identity}:
        was, now = earlier.get(name), identity.get(name)
        if was != now:
            raise UserError(
                f"{out} was prepared with {name} {was}, not {now}; give that again or another folder as --out"
            )
    return begun_with


def write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file, unless it holds the same already. Bytes of file names that are no text are written as \\udcXX."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")
    if not path.exists() or path.read_bytes() != content.encode("utf-8"):
        write_text(path, content)


def _remove_temporaries(out: Path) -> None:
    """What a command left behind that was killed, or ended its workers."""
    for folder in (out, out / "clips", out / "state"):
        for path in folder.iterdir() if folder.is_dir() else ():
            if TEMPORARY.fullmatch(path.name):
                path.unlink()
