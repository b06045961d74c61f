"""Cold and warm starts: what is shared between the two processes, what fails, and one real start on the CPU."""

import sys
from pathlib import Path

import pytest
import torch
from vidtta.bench import start, suite

PROGRAM = """
import json, os, pathlib, sys
def after(name): return sys.argv[sys.argv.index(name) + 1]
file = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
warm = file.exists()
file.touch()
if {dies} and warm: sys.exit("no memory")
print("something else")
print(json.dumps({{"ms": 1.0 if warm else 9.0, "value": 2.0 + {drift} * warm, "work": after("--child")}}))
"""


def rows(tmp_path: Path, dies: bool = False, drift: float = 0.0, only: list[str] | None = None) -> list[suite.Row]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(dies=dies, drift=drift))
    starts = start.Starts(tmp_path, "fused", True, 60, [sys.executable, str(program)])
    return suite.run(start.ROWS, suite.chosen(list(start.ROWS), only), starts, 60)


def test_the_second_process_finds_what_the_first_left(tmp_path: Path):
    assert [row.get("ms") for row in rows(tmp_path)] == [9.0, 1.0, 9.0, 1.0]


def test_a_warm_start_that_computes_otherwise_or_dies_has_no_time(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    drifted = rows(tmp_path / "a", drift=0.1)
    assert "relative distance 0.05 from the cold" in drifted[1]["error"] and "ms" not in drifted[1]
    dead = rows(tmp_path / "b", dies=True)
    assert "ended with status 1: no memory" in dead[1]["error"] and dead[2]["ms"] == 9.0


def test_a_warm_start_needs_a_cold_one(tmp_path: Path):
    (row,) = rows(tmp_path, only=["start training warm"])
    assert "no cold start before it" in row["absent"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are for the CPU")
def test_a_real_start_on_the_cpu(tmp_path: Path):
    starts = start.Starts(tmp_path, "eager", True, 120)
    row, again = suite.run(start.ROWS, ["start sampling cold", "start sampling warm"], starts, 120)
    assert "error" not in row and "error" not in again
    assert row["ms"] / 1e3 == pytest.approx(sum(row["seconds"].values()), rel=0.01)
    assert again["against"]["distance"] == 0 and (tmp_path / "sampling/attention.json").exists()
