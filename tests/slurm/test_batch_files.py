"""The batch files: accepted by sbatch, by the shell, and alike where they must be."""

import subprocess
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).resolve().parents[2] / "slurm").glob("*.sbatch"))
LONG = ("run", "search", "prepare")
"""Those that may meet their time limit."""


def test_every_file_is_known():
    assert [path.stem for path in FILES] == ["compare", "prepare", "report", "run", "search"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_slurm_accepts_it(slurm, path, tmp_path):
    done = subprocess.run(
        ["sbatch", "--test-only", path, "recipe", "1"], capture_output=True, text=True, cwd=tmp_path, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_shell_accepts_it_and_it_holds_one_srun(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = path.read_text().splitlines()
    assert sum(line.startswith("srun ") for line in lines) == 1
    assert all(line.startswith("# ") for line in lines[1:4])


def test_what_follows_the_command_is_the_same_everywhere():
    """Only a run can end with some clips failed."""
    tails = {path.stem: path.read_text().partition("code=$? ")[2] for path in FILES}
    failed = [line for line in tails["run"].splitlines() if line.startswith("1) ")]
    assert len(failed) == 1
    assert tails["search"] == tails["run"]
    assert tails["prepare"] == tails["run"].replace(failed[0] + "\n", "")
    assert tails["compare"] == tails["report"] == ""


def test_the_data_are_prepared_with_what_they_need():
    text = (FILES[0].parent / "prepare.sbatch").read_text()
    assert all(f"#SBATCH {words}\n" in text for words in ("--cpus-per-task=16", "--mem=64G", "--time=8:00:00"))


@pytest.mark.parametrize("name", LONG)
def test_the_warning_comes_twice_as_far_ahead_as_a_clip_may_still_take(name):
    from vidtta.engine.cluster.ranges import LEAD
    from vidtta.engine.stop import GRACE

    text = (FILES[0].parent / f"{name}.sbatch").read_text()
    assert f"#SBATCH --signal=USR1@{LEAD:.0f}\n" in text
    assert LEAD >= 2 * GRACE
