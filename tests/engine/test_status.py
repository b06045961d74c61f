"""What `vidtta status` says of a run, and of who works on it."""

import os
import shutil
import time

import pytest
from vidtta.engine import cli
from vidtta.engine import run as run_module
from vidtta.engine.cluster import presence
from vidtta.engine.cluster.status import ArmStatus, RunStatus, duration, status_of

from .tiny_run import DELTA, HEIGHT, WIDTH, one_sentence, tiny_lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def test_counts_of_a_run_with_a_bad_clip(lab, capsys):
    folder = lab.root / "one bad"
    shutil.copytree(lab.root / "clips", folder)
    (folder / "empty.mp4").touch()
    data = {"clips": str(folder), "height": HEIGHT, "width": WIDTH}
    assert lab.run("counted", data=data) == 1
    shutil.rmtree(lab.root / "counted/arms/delta/clips/wave")
    status = status_of(lab.root / "counted")
    assert status.clips == 3
    found = {name: (arm.done, list(arm.failed), arm.left) for name, arm in status.arms.items()}
    assert found == {"baseline": (2, ["empty"], 0), "delta": (1, ["empty"], 1)}
    capsys.readouterr()
    assert cli.main(["status", str(lab.root / "counted")]) == 3
    said = capsys.readouterr().out
    assert "failed: delta/empty: " in said and "the file is empty" in said
    assert "running: 0 tasks" in said and "once one task works on it" in said
    assert lab.run("counted", data=data) == 1
    assert cli.main(["status", str(lab.root / "counted")]) == 1
    (folder / "empty.mp4").unlink()
    assert cli.main(["status", str(lab.root / "counted")]) == 0
    shutil.rmtree(folder)
    assert cli.main(["status", str(lab.root / "counted")]) == 1
    assert "the list of clips cannot be read" in capsys.readouterr().out


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert one_sentence(capsys) == (
        f"error: {tmp_path}: no run directory (it holds no recipe.yaml); name the output_dir of a run"
    )


def test_a_task_is_seen_while_it_works_and_not_after(lab, monkeypatch):
    seen = []

    def look(*args, **settings):
        seen.append(presence.running(lab.root / "seen"))
        return go_on(*args, **settings)

    go_on = run_module.continue_clip
    monkeypatch.setattr(run_module, "continue_clip", look)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert lab.run("seen", arms={"delta": DELTA}) == 0
    assert [[(t["arm"], t["clip"], t["pid"], t["job"]) for t in tasks] for tasks in seen] == [
        [(arm, clip, os.getpid(), "7_3")] for arm in ("baseline", "delta") for clip in ("ball", "wave")
    ]
    assert presence.running(lab.root / "seen") == []


def test_a_killed_task_is_forgotten_and_its_file_removed_later(tmp_path):
    with presence.present(tmp_path, 1) as ours:
        ours.clip("delta", "ball")
        left = tmp_path / "tasks" / "0123456789ab.json"
        left.write_bytes(ours.path.read_bytes())
        os.utime(left, (time.time() - presence.SILENT_AFTER - 1,) * 2)
        assert [task["clip"] for task in presence.running(tmp_path)] == ["ball"]
    os.utime(left, (time.time() - presence.ABANDONED_AFTER - 1,) * 2)
    with presence.present(tmp_path, 1):
        assert not left.exists()


def test_a_live_task_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "BEAT", 0.01)
    with presence.present(tmp_path, 1) as ours:
        ours.clip("delta", "ball")
        os.utime(ours.path, (0, 0))
        until = time.monotonic() + 10
        while not presence.running(tmp_path):
            assert time.monotonic() < until
            time.sleep(0.01)


def test_expected_end_is_by_each_arms_own_time(tmp_path):
    """Two tasks, baseline at 10 s and an arm at 40 s a clip: 5 * 10 + 10 * 40 over 2; 10 results since 300 s ago."""
    now = 10_000.0
    arms = {
        "baseline": ArmStatus(5, {}, 5, [10.0] * 5, [now - 290 + 10 * k for k in range(5)]),
        "full": ArmStatus(5, {}, 10, [40.0] * 5, [now - 200 + 40 * k for k in range(5)]),
    }
    task = {"arm": "full", "clip": "x"}
    status = RunStatus(tmp_path, 15, arms, [task, task], now)
    assert status.seconds_left == (5 * 10 + 10 * 40) / 2
    assert status.clips_an_hour == pytest.approx(10 / 300 * 3600)
    unknown = RunStatus(tmp_path, 4, {"baseline": arms["baseline"], "late": ArmStatus(left=4)}, [], now)
    assert unknown.seconds_left == 5 * 10 + 4 * 10


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (180, "3 min"), (7500, "2 h 05 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
