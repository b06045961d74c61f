"""Download UCF-101 from its home, over any number of broken connections."""

import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_json
from .ucf101 import SPLITS_ZIP

HOME = "https://www.crcv.ucf.edu/data/UCF101/"
ARCHIVE = "UCF101.rar"
BLOCK = 2**20
TIMEOUT = 60  # seconds without a byte
TRIES = 5  # in a row, none of which brought a byte


def download_ucf101(folder: Path, quiet: bool = False) -> Path:
    """Fetch the lists and the archive into `folder` unless they are there; return the archive."""
    for name in (SPLITS_ZIP, ARCHIVE):
        download(HOME + name, folder / name, quiet=quiet)
    return folder / ARCHIVE


def download(url: str, path: Path, *, quiet: bool = False, pause: float = 2.0) -> None:
    """Fetch `url` to `path` unless it is there; an interrupted download goes on where it stopped, also in a later run.

    What has come lies in `path`.part, and `path`.part.json says of which version of the file it is; of another version
    nothing is kept. Raises UserError when it cannot be had: why, from where, and where to put it by hand.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    tries = 0
    while True:
        before = _size(part)
        try:
            _attempt(url, part, quiet)
            break
        except (OSError, http.client.HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError)
            tries = 0 if _size(part) > before else tries + 1
            # Without a byte so far the machine is likely offline, and waiting would not help.
            if refused or tries == TRIES or not _size(part):
                raise UserError(
                    f"{url} could not be fetched ({_reason(error)}); connect and run the same command again, or fetch it "
                    f"in another way and put it at {path}"
                ) from error
        time.sleep(pause)
    part.replace(path)
    _note(part).unlink(missing_ok=True)


def _attempt(url: str, part: Path, quiet: bool) -> None:
    """Fetch what is missing of `part`. Raises OSError or HTTPException when the connection breaks off before the end."""
    have, note = _size(part), _read_note(part)
    if have and have == note.get("total"):
        return
    headers = {"User-Agent": "vidtta", "Accept-Encoding": "identity"}
    if have and note.get("version") and note.get("total"):
        headers |= {"Range": f"bytes={have}-", "If-Range": note["version"]}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        goes_on = response.status == 206
        if goes_on and response.headers["Content-Range"] != f"bytes {have}-{note['total'] - 1}/{note['total']}":
            part.unlink()
            raise OSError(f"the server answered with {response.headers['Content-Range']}, not from byte {have} on")
        if not goes_on:
            have, length = 0, response.headers["Content-Length"]
            # A weak ETag does not promise equal bytes.
            tag = response.headers["ETag"] or ""
            version = tag if tag.startswith('"') else response.headers["Last-Modified"]
            part.unlink(missing_ok=True)
            note = {"total": int(length) if length else None, "version": version}
            write_json(_note(part), note)
        total = note["total"]
        free = shutil.disk_usage(part.parent).free
        if total and total - have > free:
            raise UserError(f"{url}: {total:,} bytes, but {part.parent} has room for {free:,}; make room")
        _receive(response, part, have, total, quiet)


def _receive(response: Any, part: Path, have: int, total: int | None, quiet: bool) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(part.stem), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    shown = sys.stdout.isatty() and not quiet
    with part.open("ab" if have else "wb") as handle, Progress(*columns, disable=not shown, transient=True) as bars:
        task = bars.add_task("", total=total, completed=have)
        while block := response.read(BLOCK):
            handle.write(block)
            bars.advance(task, len(block))
        handle.flush()
        os.fsync(handle.fileno())
    if total is not None and part.stat().st_size != total:
        raise http.client.IncompleteRead(b"", total - part.stat().st_size)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path) -> dict[str, Any]:
    try:
        return json.loads(_note(part).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error).splitlines()[0].rstrip(".")
