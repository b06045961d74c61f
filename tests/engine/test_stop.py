"""Which signal stops what, and when."""

import os
import signal
import subprocess
import sys
import time

import pytest
from vidtta.engine import stop
from vidtta.engine.errors import Interrupted, OutOfTime


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """What was heard of SIGUSR1, empty again after each test."""
    monkeypatch.setattr(stop, "_heard", [])
    return stop._heard


def test_out_of_time_lets_the_clip_in_hand_end_and_no_longer(heard, monkeypatch):
    with stop.stop_flag() as flag:
        flag.check()
        heard.append(time.monotonic())
        flag.check(in_clip=True)
        with pytest.raises(OutOfTime, match="SIGUSR1"):
            flag.check()
        heard[0] -= stop.GRACE + 1
        with pytest.raises(OutOfTime):
            flag.check(in_clip=True)


def test_a_termination_after_the_warning_stops_at_once_and_still_asks_for_a_requeue(heard):
    with stop.stop_flag() as flag:
        heard.append(time.monotonic())
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(OutOfTime):
            flag.check(in_clip=True)


def test_a_termination_alone_does_not_ask_for_a_requeue():
    with stop.stop_flag() as flag:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as error:
            flag.check(in_clip=True)
        assert not isinstance(error.value, OutOfTime)
        assert error.value.exit_status == 130


def test_the_warning_ends_neither_the_process_nor_its_children():
    """Slurm sends it to all processes of a step, at any moment: while loading, twice, and to compilers and decoders."""
    program = """
import os, signal, subprocess, sys, time
from vidtta.engine import stop
stop.listen_for_out_of_time()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
time.sleep(0.3)
for _ in range(2):
    for pid in (child.pid, os.getpid()):
        os.kill(pid, signal.SIGUSR1)
with stop.stop_flag() as flag:
    while True:
        flag.check(in_clip=True)
        try:
            flag.check()
        except stop.OutOfTime:
            break
sys.exit(10 + child.wait())
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, env=os.environ)
    assert done.returncode == 10
