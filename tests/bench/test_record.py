"""Files of measurements: pytest-benchmark reads them, old ones are read, and comparing two says what got slower."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vidtta.bench import command, record
from vidtta.bench.compare import compare
from vidtta.engine import cli
from vidtta.engine.errors import UserError

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
ABOUT = {"device": "card", "driver": "1", "packages": {"torch": "2.11.0", "triton": "3.6.0"}, "commit": "abc"}
ROWS = [
    {"row": "sample", "ms": 2.0, "times": [1.0, 2.0, 6.0], "gb_per_s": 5.0, "peak_gib": float("nan")},
    {"row": "wrong", "ms": 1.0, "error": "ArithmeticError: far"},
    {"row": "later", "skipped": "no time left after 1 s"},
    {"op": "norm", "shape": "8400", "impl": "triton", "forward": {"milliseconds": 0.5, "times": (0.5, 0.5)}},
    {"row": "attention", "backends": [{"shape": "1x2", "backend": "flash", "training": True, "milliseconds": 3.0}]},
]


def written(path: Path, rows=ROWS, **about) -> Path:
    record.write(path, "steps", ABOUT | about, rows)
    return path


def test_pytest_benchmark_reads_the_file(tmp_path: Path):
    path = written(tmp_path / "a.json")
    program = "from pytest_benchmark.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "compare", str(path), "--columns=min,median,max"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sample" in done.stdout and "norm 8400 triton forward" in done.stdout and "wrong" not in done.stdout


def test_a_file_holds_versions_statistics_and_what_has_no_time(tmp_path: Path):
    held = json.loads(written(tmp_path / "a.json").read_text())
    machine = held["machine_info"]
    assert (machine["card"], machine["driver"], machine["torch"], machine["triton"]) == ("card", "1", "2.11.0", "3.6.0")
    assert (
        held["commit_info"]["id"] == "abc" and [row.get("error") for row in held["rows"]][1] == "ArithmeticError: far"
    )
    first = held["benchmarks"][0]
    assert first["fullname"] == "steps::sample" and first["extra_info"]["gb_per_s"] == 5.0
    assert first["extra_info"]["peak_gib"] is None  # a NaN is no JSON
    stats = first["stats"]
    assert [stats[k] for k in ("min", "median", "max", "mean")] == pytest.approx([0.001, 0.002, 0.006, 0.003])
    assert stats["rounds"] == 3 and stats["data"] == pytest.approx([0.001, 0.002, 0.006])
    assert [b["name"] for b in held["benchmarks"]] == [
        "sample",
        "norm 8400 triton forward",
        "attention 1x2 flash training",
    ]


def test_compare_fails_for_slower_and_for_lost_rows_alone(tmp_path: Path, capsys: pytest.CaptureFixture):
    before = [{"row": name, "ms": 100.0} for name in ("same", "slow", "fast", "lost", "gone", "late")]
    after = [
        {"row": "same", "ms": 104.0}, {"row": "slow", "ms": 107.0}, {"row": "fast", "ms": 50.0}, {"row": "more", "ms": 1.0},
        {"row": "lost", "error": "ArithmeticError: far"}, {"row": "late", "skipped": "no time left after 1 s"},
    ]  # fmt: skip
    a, b = written(tmp_path / "a.json", before), written(tmp_path / "b.json", after)
    assert compare(a, b, 5.0) == 1
    lines = capsys.readouterr().out.splitlines()[:-1]
    verdicts = {line.split("steps::")[1].split()[0]: line.split("steps::")[0].strip() for line in lines}
    assert verdicts == {
        "same": "same", "slow": "SLOWER", "fast": "faster", "lost": "LOST", "gone": "not run", "late": "not run", "more": "new",
    }  # fmt: skip
    assert compare(a, written(tmp_path / "c.json", [*before[:1], {"row": "slow", "ms": 107.0}]), 8.0) == 0


def test_other_cards_and_other_files_are_refused(tmp_path: Path):
    a, b = written(tmp_path / "a.json"), written(tmp_path / "b.json", device="another card")
    with pytest.raises(UserError, match=r"is of card and .* of another card.*--other-card"):
        compare(a, b, 5.0)
    assert compare(a, b, 5.0, other_card=True) == 0
    (tmp_path / "c.json").write_text('{"rows": 3}')
    with pytest.raises(UserError, match=r"c\.json: is no file of measurements"):
        compare(a, tmp_path / "c.json", 5.0)
    with pytest.raises(UserError, match=r"d\.json: is no file of measurements"):
        compare(a, tmp_path / "d.json", 5.0)


def test_files_of_before_are_read():
    steps, kernels = (record.read(RESULTS / f"{name}-h100.json") for name in ("steps", "kernels"))
    assert steps.times["steps::sample3 eager"] == pytest.approx(560.237366)
    assert "steps::attention 7x1200x1200x16x72 cudnn training" in steps.times
    assert kernels.times["kernels::norm_modulate 8400 triton forward"] == pytest.approx(0.027152)
    assert "kernels::norm_modulate 8400 compiled" in kernels.without


def test_the_command_runs_suites_as_programs_and_joins_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran = []

    def module(name: str, words: list[str]) -> int:
        ran.append((name, words[:-1]))
        if name == "clip":
            return 1  # died without a file
        record.write(Path(words[-1]), name, ABOUT, [{"row": "one", "ms": 1.0}])
        return 0

    monkeypatch.setattr(command, "_module", module)
    monkeypatch.setattr(command, "SUITES", {"steps": "", "clip": "", "start": ""})
    out = tmp_path / "out.json"
    assert command.main(["--minutes", "2", "--out", str(out)]) == 1
    assert ran == [(name, ["--minutes", "2", "--out"]) for name in ("steps", "clip", "start")]
    assert list(record.read(out).times) == ["steps::one", "start::one"]
    assert command.main(["steps", "--only", "x", "--out", str(out)]) == 0
    assert list(record.read(out).times) == ["steps::one"]
    assert command.main(["compare", str(out), str(out), "--threshold", "5%"]) == 0


def test_vidtta_bench_is_a_door_to_the_same_program(tmp_path: Path, capfd: pytest.CaptureFixture):
    a, b = written(tmp_path / "a.json"), written(tmp_path / "b.json", [{"row": "sample", "ms": 9.0}])
    assert cli.main(["bench", "compare", str(a), str(b)]) == 1
    assert "SLOWER  steps::sample" in capfd.readouterr().out
    assert cli.main(["bench", "compare", str(a), str(tmp_path / "none.json")]) == 2
    assert "error: " in capfd.readouterr().err
