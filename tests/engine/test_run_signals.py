"""A run that is asked to stop does so between steps, keeps what it finished, and goes on with the same command."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from vidtta.engine import run as run_module
from vidtta.engine import stop

from .tiny_run import FORKS, FULL, one_sentence, run_in_child, tiny_lab, wait_for


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = {"full": FULL}
        yield lab


@pytest.fixture(scope="module")
def undisturbed(lab):
    assert lab.run("undisturbed") == 0
    return lab.results("undisturbed")


def as_a_command(argv, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vidtta.engine", *argv]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for("arms/*/clips/*/result.json", folder, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    return process.returncode, message


def as_a_child(argv, folder):
    log = folder.with_suffix(".log")
    child = FORKS.Process(target=run_in_child, args=(argv, str(log)))
    child.start()
    wait_for("arms/*/clips/*/result.json", folder, child.is_alive)
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


def test_the_warning_of_a_time_limit_asks_for_a_requeue_after_the_clip_in_hand(lab, undisturbed, monkeypatch):
    """The signal comes while the first clip is adapted: that clip is finished, and no other begun."""
    output = "out of time"
    go_on = run_module.continue_clip

    def told(*args, **settings):
        os.kill(os.getpid(), signal.SIGUSR1)
        while not stop._heard:
            time.sleep(0.001)
        return go_on(*args, **settings)

    monkeypatch.setattr(run_module, "continue_clip", told)
    assert lab.run(output) == 75
    assert list(lab.results(output)) == ["baseline/ball"]
    monkeypatch.setattr(run_module, "continue_clip", go_on)
    assert lab.run(output) == 0
    assert lab.results(output) == undisturbed


@pytest.fixture
def hears_interrupts():
    """A shell starts what runs in its background deaf to SIGINT, and a deaf process would go on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times", [1, 2])
def test_a_second_signal_does_not_wait_and_handlers_are_put_back(
    lab, undisturbed, hears_interrupts, monkeypatch, capsys, times
):
    output = f"{times} signals"
    shutil.copytree(lab.root / "undisturbed", lab.root / output)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    go_on, went_on = run_module.continue_clip, []

    def interrupted(*args, **settings):
        for _ in range(times):
            before = signal.getsignal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            while (
                signal.getsignal(signal.SIGINT) is before
            ):  # two signals before Python's handler runs would count as one
                time.sleep(0.001)
        went_on.append("to the clip's first step")
        return go_on(*args, **settings)

    monkeypatch.setattr(run_module, "continue_clip", interrupted)
    result = lab.root / output / "arms/full/clips/ball/result.json"
    result.unlink()
    assert lab.run(output) == 130
    assert one_sentence(capsys).startswith("stopped by SIGINT; " if times == 1 else "interrupted")
    assert len(went_on) == (1 if times == 1 else 0)
    assert not result.exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
