"""Stopped, killed or failed, `vidtta prepare` goes on and ends in the same bytes."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from vidtta.engine.errors import Interrupted
from vidtta.engine.prepare import run as module
from vidtta.engine.prepare.workers import work

from .prepare_sources import contents, make_source, refusal, run, tree, write_archive

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "UCF-101")


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    """What an undisturbed run makes; not to be written to."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert run(source, out)[0] == 0
    return out


def test_a_second_run_changes_nothing_and_reads_no_video(source, prepared, monkeypatch, capsys):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in prepared.rglob("*")}
    monkeypatch.setattr(module, "executor", None)
    assert run(source, prepared)[0] == 0
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in prepared.rglob("*")} == before
    assert capsys.readouterr().out == f"prepared 4, rejected 3 (see {prepared}/rejects.csv)\n"


def kill_at(step, source, out):
    """Run in a process of its own, which ends at once, with nothing cleaned up, at its `step`-th rename, before or after."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        rename, left = Path.replace, [step]

        def replace(path, target):
            left[0] -= 1
            if left[0] == 0 and step % 2:
                os._exit(9)
            rename(path, target)
            if left[0] == 0:
                os._exit(9)

        pytest.MonkeyPatch().setattr(Path, "replace", replace)
        os._exit(run(source, out)[0])
    finally:
        os._exit(70)


def test_killed_at_any_step_it_ends_in_the_same_bytes(source, prepared, tmp_path):
    archive = write_archive(tmp_path / "a.zip", contents(source))
    _, whole = run(archive, tmp_path / "whole")
    for step in range(1, 20):
        status = kill_at(step, archive, tmp_path / "out")
        if status == 0:
            break
        assert status == 9
    assert step > 3
    assert run(archive, tmp_path / "out") == (0, whole)
    # Every kill at one folder after the other got further; each alone, from a fresh folder, does too.
    for step in (1, 2, 5, 8, 13):
        out = tmp_path / f"out{step}"
        assert kill_at(step, archive, out) == 9
        assert step in (2, 8) or any(path.name.startswith(".tmp-") for path in out.rglob("*"))
        assert run(archive, out) == (0, whole)


def test_workers_give_the_same_and_end_when_their_parent_is_killed(source, prepared, tmp_path):
    archive = write_archive(tmp_path / "a.zip", contents(source))
    _, whole = run(archive, tmp_path / "whole")
    code = (
        "import sys\nfrom vidtta.engine.cli import main\nif __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "program.py").write_text(code)
    sizes = ["--height", "24", "--width", "32", "--frames", "6", "--conditioning-frames", "3", "--count", "9"]
    command = [sys.executable, str(tmp_path / "program.py"), "prepare", "ucf101", "--source", str(archive), *sizes]
    out = tmp_path / "out"
    with subprocess.Popen([*command, "--out", str(out), "--workers", "2"], stdout=subprocess.PIPE) as process:
        children: list[str] = []
        # Until the workers are there, and a video that waits for them.
        while len(children) < 2 or not list(out.glob(".tmp-*-unpacked.avi")):
            assert process.poll() is None, "it ended before both were seen"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            time.sleep(0.02)
        process.kill()
    done = subprocess.run([*command, "--out", str(out), "--workers", "2"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == [
        f"{archive} has 6 clips to choose from, not the 9 asked for",
        f"prepared 4, rejected 3 (see {out}/rejects.csv)",
    ]
    found = tree(out)
    assert found.pop("prepare.json").replace(b'"count": 9', b'"count": null') == whole.pop("prepare.json")
    assert found == whole
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}/exe").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_ends_between_clips_and_the_same_command_goes_on(source, prepared, tmp_path, monkeypatch):
    finished = module.Progress.finished

    def interrupt(progress, more=1):
        finished(progress, more)
        if progress.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module.Progress, "finished", interrupt)
    with pytest.raises(Interrupted) as caught:
        run(source, tmp_path / "out")
    assert str(caught.value) == "after 2 of 6 clips; the same command goes on from there"
    assert not (tmp_path / "out" / "manifest.csv").exists()
    monkeypatch.undo()
    assert run(source, tmp_path / "out") == (0, tree(prepared))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device", "a.mp4"),
            "[Errno 28] No space left on device: 'a.mp4'; make room or mend the folder, and run the same command again",
        ),
        (
            BrokenProcessPool(),
            "a worker process was killed, often for want of memory; run the same command again, with fewer --workers",
        ),
    ],
    ids=["disk full", "worker killed"],
)
def test_what_ends_a_run_is_told_and_is_no_reject(error, message, source, prepared, tmp_path, monkeypatch):
    def fail(job):
        if "Biking" in job.id:
            raise error
        return work(job)

    archive = write_archive(tmp_path / "a.tar", contents(source))
    monkeypatch.setattr(module, "work", fail)
    assert refusal(archive, tmp_path / "out") == message
    assert not [name for name in tree(tmp_path / "out") if "Biking" in name or ".tmp-" in name]
    monkeypatch.undo()
    assert tree(prepared).items() - run(archive, tmp_path / "out")[1].items() <= {
        (name, tree(prepared)[name]) for name in ("prepare.json", "manifest.csv", "rejects.csv")
    }


@pytest.mark.parametrize("name", ["prepare.json", "captions.txt", "manifest.csv", "rejects.csv"])
def test_a_disk_that_is_full_for_a_list_is_told_too(name, source, prepared, tmp_path, monkeypatch):
    replace = Path.replace

    def full(path, target):
        if target.name == name:
            raise OSError(28, "No space left on device", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    assert refusal(source, tmp_path / "out") == (
        f"[Errno 28] No space left on device: '{tmp_path}/out/{name}'; make room or mend the folder, and run the same command again"
    )
    monkeypatch.undo()
    assert run(source, tmp_path / "out") == (0, tree(prepared))


def test_what_a_killed_run_left_is_removed(source, prepared, tmp_path):
    run(source, tmp_path / "out")
    for folder in ("", "clips", "state"):
        (tmp_path / "out" / folder / ".tmp-0123456789ab-v.avi").write_text("half")
    assert run(source, tmp_path / "out") == (0, tree(prepared))
