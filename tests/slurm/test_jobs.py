"""Runs as jobs of a real Slurm: whatever stops one, it is as if nothing had happened."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vidtta.engine import cli

from ..engine.tiny_run import HEIGHT, WIDTH, make_clip
from .conftest import CLIPS
from .local import ENDED

RUN = Path(__file__).resolve().parents[2] / "slurm" / "run.sbatch"


def submit(lab, output, *options, **sections):
    """`vidtta submit` of the lab's recipe into a folder; what it printed."""
    recipe = lab.argv(output, **sections)[1]
    done = subprocess.run(["vidtta", "submit", recipe, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def jobs_of(said):
    """Numbers of the array, the comparison and the report."""
    found = re.search(r"submitted: (?:array (\d+) )?compare (\d+) report (\d+)", said)
    assert found, said
    return found.groups()


def sbatch(lab, output, *options, clips=CLIPS):
    """The batch file by hand, as one task; its job's number."""
    log = lab.root / f"{output}.log"
    recipe = lab.argv(output)[1]
    keep = Path(recipe).replace(lab.root / f"{output}.yaml")  # the lab writes its next recipe over this one
    command = [
        "sbatch",
        "--parsable",
        f"--output={log}",
        "--cpus-per-task=2",
        *options,
        str(RUN),
        str(keep),
        str(clips),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip(), log


def made(lab, output):
    """Each result's identity: a result that is made again has another."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (lab.root / output).glob("arms/*/clips/*/result.json")}


def wait_for_results(lab, output, count):
    until = time.monotonic() + 60
    while len(made(lab, output)) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_an_array_then_its_comparison(slurm, lab, undisturbed):
    said = submit(lab, "array", "--hours", "1", "--seconds-a-clip", "900")
    assert f"{CLIPS} clips, {CLIPS} unfinished, 900.0 s a clip (as given)" in said and "2 tasks of 4 clips" in said
    array, compare, report = jobs_of(said)
    assert slurm.show(compare)["Dependency"].startswith(f"afterok:{array}")
    assert [slurm.wait(f"{array}_{k}")["JobState"] for k in range(2)] == ["COMPLETED"] * 2
    assert lab.results("array") == undisturbed
    assert slurm.wait(compare)["JobState"] == "COMPLETED"
    log = lab.root / f"array/logs/report-{report}.out"
    assert slurm.wait(report)["JobState"] == "COMPLETED", log.read_text()
    page = (lab.root / "array/analysis_report.html").read_text()
    assert "baseline" in page and "delta" in page
    assert (lab.root / f"array/logs/{array}_1.out").read_text().count("PSNR") >= CLIPS
    assert cli.main(["status", str(lab.root / "array")]) == 0
    before = made(lab, "array")
    said = submit(lab, "array")
    assert "0 unfinished" in said and "nothing left to run" in said and "measured on" in said
    assert jobs_of(said)[0] is None
    assert slurm.wait(jobs_of(said)[1])["JobState"] == "COMPLETED"
    assert made(lab, "array") == before


def test_what_waits_for_a_failed_array_is_cancelled(slurm, lab):
    folder = lab.root / "one bad"
    make_clip(folder / "good.mp4", seed=0)
    (folder / "empty.mp4").touch()
    data = {"clips": str(folder), "height": HEIGHT, "width": WIDTH}
    array, compare, report = jobs_of(submit(lab, "failed", data=data))
    assert slurm.wait(f"{array}_0")["JobState"] == "FAILED"
    assert [slurm.wait(job)["JobState"] for job in (compare, report)] == ["CANCELLED"] * 2
    assert slurm.show(compare)["Reason"] == "DependencyNeverSatisfied"
    said = submit(lab, "failed", "--allow-failed", data=data)
    array, compare, _ = jobs_of(said)
    assert "2 clips, 1 unfinished" in said
    assert slurm.wait(f"{array}_0")["JobState"] == "COMPLETED"
    assert slurm.wait(compare)["JobState"] == "COMPLETED"


def warned(slurm, job):
    subprocess.run(["timeout", "1", "scancel", "--signal=USR1", job], check=False)


def preempted(slurm, job):
    wrap = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap", "true"]
    subprocess.run(wrap, check=True, capture_output=True)


@pytest.mark.parametrize("disturb", [warned, preempted])
def test_a_stopped_job_requeues_itself_and_goes_on(slurm, lab, undisturbed, disturb):
    output = disturb.__name__
    job, log = sbatch(lab, output)
    wait_for_results(lab, output, 2)
    disturb(slurm, job)
    slurm.wait(job, "PENDING")
    before = made(lab, output)
    assert 2 <= len(before) < 2 * CLIPS
    slurm.begin_now(job)
    found = slurm.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert lab.results(output) == undisturbed
    assert made(lab, output).items() >= before.items()
    assert ("stopped by SIGUSR1" if disturb is warned else "stopped by SIGTERM") in log.read_text()


def test_a_cancelled_job_stays_cancelled(slurm, lab):
    job, _ = sbatch(lab, "cancelled")
    wait_for_results(lab, "cancelled", 1)
    subprocess.run(["scancel", job], check=True)
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    time.sleep(1)
    assert slurm.state(job) == "CANCELLED"


SLOW = """\
#!{python}
import os, time
from vidtta.engine import cli, run
quick = run.run_clip
def slow(*inputs):
    time.sleep(3)
    return quick(*inputs)
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    run.run_clip = slow
cli.entry()
"""


def test_a_job_that_meets_its_time_limit_goes_on_until_it_is_done(slurm, lab, undisturbed, monkeypatch):
    """A true limit of a minute. Slurm looks each 30 s for jobs whose signal is due within 30 s, so clips take 3 s more here, until
    it has looked: after the restart they are as quick as ever."""
    program = lab.root / "slow" / "vidtta"
    program.parent.mkdir()
    program.write_text(SLOW.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    job, log = sbatch(lab, "limit", "--time=1", "--signal=USR1@40")
    begun = time.monotonic()
    while slurm.state(job) not in ENDED:
        assert time.monotonic() < begun + 240, log.read_text()
        if slurm.state(job) == "PENDING" and made(lab, "limit"):
            slurm.begin_now(job)
        time.sleep(0.2)
    found = slurm.show(job)
    assert (found["JobState"], found["TimeLimit"]) == ("COMPLETED", "00:01:00"), log.read_text()
    assert int(found["Restarts"]) >= 1
    assert "stopped by SIGUSR1" in log.read_text()
    assert lab.results("limit") == undisturbed


def test_tasks_of_a_step_deal_out_the_clips(slurm, lab, undisturbed):
    job, log = sbatch(lab, "step", "--ntasks=2")
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    assert lab.results("step") == undisturbed
    lines = re.findall(r"^(delta|baseline)  (\w+)  PSNR", log.read_text(), re.MULTILINE)
    assert len(lines) == len(set(lines)) == 2 * CLIPS  # no clip was made by both
    rows = (lab.root / "step/summary.csv").read_text().splitlines()
    assert sum(",done," in row for row in rows) == 4 * CLIPS
