"""A file is whole or as it was, whatever happens while it is written."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from vidtta.engine.files import (
    ABANDONED_AFTER,
    atomic_path,
    remove_abandoned,
    sha256_file,
    sha256_json,
    sha256_tensor,
    write_json,
    write_json_once,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "new" / "deeper" / "video.mp4"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"frames")
        assert not path.exists()
        assert temporary.parent == path.parent and temporary.suffix == ".mp4" and temporary.name.startswith(".tmp-")
    assert path.read_bytes() == b"frames"
    assert names(path.parent) == ["video.mp4"]


def stop_halfway(path: Path, error: type[BaseException]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_content(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(error):
        stop_halfway(path, error)
    assert path.read_text() == "old" and names(tmp_path) == ["result.json"]


def test_an_exception_leaves_no_new_file(tmp_path: Path):
    with pytest.raises(RuntimeError):
        stop_halfway(tmp_path / "result.json", RuntimeError)
    assert names(tmp_path) == []


def test_content_is_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A crash of the machine may otherwise leave an empty file under the final name."""
    path, events = tmp_path / "result.json", []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(f"sync, exists {path.exists()}"), sync(handle)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("replace"), replace(self, target)))
    write_text(path, "text")
    assert events == ["sync, exists False", "replace", "sync, exists True"]


def test_what_may_be_lost_is_not_flushed_and_still_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fsync", lambda handle: pytest.fail("flushed"))
    write_json(tmp_path / "task.json", {"clip": "ball"}, flush=False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "task.json", {"clip": float("nan")}, flush=False)
    assert json.loads((tmp_path / "task.json").read_text()) == {"clip": "ball"} and names(tmp_path) == ["task.json"]


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path):
    path = tmp_path / "result.json"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and names(tmp_path) == ["result.json"]


def test_of_many_writers_at_once_the_first_one_stays(tmp_path: Path):
    path, gate, first = tmp_path / "deep" / "one.json", Barrier(8), []

    def write(number: int) -> None:
        gate.wait()
        if write_json_once(path, {"by": number}):
            first.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(first) == 1 and json.loads(path.read_text()) == {"by": first[0]}
    assert os.listdir(path.parent) == ["one.json"]


def test_text_is_utf8(tmp_path: Path):
    write_text(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"


def test_json_comes_back(tmp_path: Path):
    value = {"psnr": 21.5, "frames": [22, 23], "note": None}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value and text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_json_is_refused(tmp_path: Path, value: float):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"psnr": value})
    assert path.read_text() == "old" and names(tmp_path) == ["result.json"]


def test_checksums(tmp_path: Path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    canonical = hashlib.sha256(b'{"a":[1,2],"b":null}').hexdigest()
    assert sha256_json({"b": None, "a": [1, 2]}) == sha256_json({"a": [1, 2], "b": None}) == canonical
    assert sha256_json({"a": [2, 1], "b": None}) != canonical


def test_only_abandoned_temporary_files_are_removed(tmp_path: Path):
    """A live writer's file is younger; whatever is not named as ours stays, however old."""
    deep = tmp_path / "arms/full/clips/ball"
    deep.mkdir(parents=True)
    name = ".tmp-0123456789ab-result.json"
    old, young, others = deep / name, tmp_path / name, [deep / "result.json", deep / ".tmp-result.json"]
    for path in (old, young, *others):
        path.write_text("half")
    now = young.stat().st_mtime
    for path in (old, *others):
        os.utime(path, (now - ABANDONED_AFTER - 1, now - ABANDONED_AFTER - 1))
    os.utime(young, (now - ABANDONED_AFTER + 60, now - ABANDONED_AFTER + 60))
    remove_abandoned(tmp_path, now)
    assert not old.exists()
    assert young.exists() and all(path.exists() for path in others)
    remove_abandoned(tmp_path, now + 120)
    assert not young.exists()


def test_what_a_killed_process_left_is_removed_at_once_and_what_a_live_one_writes_stays(tmp_path: Path):
    halfway = "import sys, time; from pathlib import Path; from vidtta.engine.files import atomic_path\n"
    halfway += "with atomic_path(Path(sys.argv[1])) as path: path.write_text('half'); print('half', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", halfway, tmp_path / "video.mp4"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout and child.stdout.readline() == "half\n"
        (left,) = tmp_path.iterdir()
        remove_abandoned(tmp_path)
        assert left.exists()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its number is still taken
        elsewhere = left.with_name(re.sub(r"-[0-9a-f]{8}\.", "-00000000.", left.name))
        again = left.with_name(re.sub(r"\.\d+\.\d+-", f".{os.getpid()}.1-", left.name))  # its number is ours by now
        for path in (elsewhere, again):
            path.write_text("half")
        remove_abandoned(tmp_path)
        assert list(tmp_path.iterdir()) == [elsewhere]
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_tensor_counts_by_its_bytes(dtype: torch.dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    data = {
        torch.float32: struct.pack("<6f", *range(6)),
        torch.bfloat16: b"".join(struct.pack("<f", k)[2:] for k in range(6)),
        torch.uint8: bytes(range(6)),
    }[dtype]
    assert sha256_tensor(tensor) == hashlib.sha256(data).hexdigest()
    assert sha256_tensor(tensor.T) != sha256_tensor(tensor)
