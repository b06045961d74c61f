"""A run that is killed or asked to stop keeps what it finished, and the same command makes the rest."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from vidtta.engine import run as run_module
from vidtta.engine.data.video import read_window

from .tiny_run import CLIPS, FULL, HEIGHT, TOTAL, WIDTH, one_sentence, run_in_child, tiny_lab

# Children of a process that has imported everything: a kill then falls into the run and not into the imports.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.engine.tiny_run", "vidtta.engine.run", "vidtta.engine.recipe", "av", "cv2"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = {"full": FULL}
        yield lab


@pytest.fixture(scope="module")
def undisturbed(lab):
    assert lab.run("undisturbed") == 0
    return lab.results("undisturbed")


def test_ten_kills_lose_nothing(lab, undisturbed):
    """One child after another, each killed at a random moment, on what the earlier ones left."""
    chance, outputs, kills = random.Random(0), ["killed 0"], 0
    while kills < 10:
        child = FORKS.Process(target=run_in_child, args=(lab.argv(outputs[-1]),))
        child.start()
        child.join(chance.uniform(0.1, 1.0) + (1.5 if kills == 0 else 0))  # the first waits for the imports
        if child.exitcode is None:
            kills += 1
            child.kill()
            child.join()
        else:
            assert child.exitcode == 0
            outputs.append(f"killed {len(outputs)}")
        child.close()
    for output in outputs:
        assert lab.run(output) == 0
        assert lab.results(output) == undisturbed
        for clip in CLIPS:
            video = lab.root / output / "comparisons" / f"{clip}.mp4"
            read_window(video, frames=TOTAL, fps=24, height=HEIGHT + 40, width=3 * WIDTH + 4)


def wait_for_the_first_result(folder, alive):
    deadline = time.monotonic() + 60
    while not list(folder.glob("arms/*/clips/*/result.json")) and alive() and time.monotonic() < deadline:
        time.sleep(0.01)


def as_a_command(argv, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vidtta.engine", *argv]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_the_first_result(folder, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    return process.returncode, message


def as_a_child(argv, folder):
    log = folder.with_suffix(".log")
    child = FORKS.Process(target=run_in_child, args=(argv, str(log)))
    child.start()
    wait_for_the_first_result(folder, child.is_alive)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    return child.exitcode, log.read_text()


@pytest.mark.parametrize(("stopped", "name"), [(as_a_command, "SIGINT"), (as_a_child, "SIGTERM")])
def test_a_signal_stops_between_steps_and_the_same_command_goes_on(lab, undisturbed, stopped, name):
    output = f"stopped by {name}"
    status, message = stopped(lab.argv(output), lab.root / output)
    assert status == 130
    assert message == f"stopped by {name}; finished clips are kept, and the same command goes on from here\n"
    kept = lab.results(output)
    assert 1 <= len(kept) < 4
    assert all(kept[name] == undisturbed[name] for name in kept)
    rows = (lab.root / output / "summary.csv").read_text().splitlines()
    assert sum(",done," in row for row in rows[5:]) == len(kept)  # after the head and two clips of two references
    before = {path: path.stat().st_mtime_ns for path in (lab.root / output).rglob("result.json")}
    assert lab.run(output) == 0
    assert lab.results(output) == undisturbed
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_signal_leaves_the_handlers_as_they_were(lab, undisturbed, monkeypatch, capsys):
    shutil.copytree(lab.root / "undisturbed", lab.root / "handlers")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    go_on = run_module.continue_clip

    def interrupted(*args, **settings):
        signal.raise_signal(signal.SIGINT)
        return go_on(*args, **settings)

    monkeypatch.setattr(run_module, "continue_clip", interrupted)
    result = lab.root / "handlers/arms/full/clips/ball/result.json"
    result.unlink()
    assert lab.run("handlers") == 130
    assert one_sentence(capsys).startswith("stopped by SIGINT; ")
    assert not result.exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
