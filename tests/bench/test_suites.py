"""What every suite keeps to: its rows are named, it imports without the optional packages, and no row ends it."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vidtta.bench import report, suite
from vidtta.bench.command import SUITES
from vidtta.bench.timing import Ceilings

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    *(name for name in SUITES if name != "peers"),
    "peers.opensora",
    "peers.peft",
    "clip_quality",
    "peers.opensora_rows",
]


@pytest.mark.parametrize("name", [*(name for name in SUITES if name != "peers"), "peers.opensora", "peers.peft"])
def test_rows_are_named(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", [name, "--list"])
    importlib.import_module(f"vidtta.bench.{name}").main()
    rows = capsys.readouterr().out.split("\n")[:-1]
    assert len(rows) > 2 and len(set(rows)) == len(rows)


def test_suites_import_with_torch_triton_numpy_and_yaml_alone():
    absent = ("pydantic", "av", "lpips", "cv2", "rich", "torchvision", "transformers", "ftfy", "bs4", "jinja2", "peft")
    program = f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
    program += f"for name in {MODULES}: __import__('vidtta.bench.' + name)\n"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_row_ends_a_suite(capsys: pytest.CaptureFixture):
    def absent(scene: None) -> suite.Row:
        raise suite.Absent("x is not installed; pip install x")

    rows = {"raises": lambda scene: {}[0], "absent": absent, "works": lambda scene: {"ms": 2.0, "path": "plain"}}
    seen: list[int] = []
    done = suite.run(rows, list(rows), None, 60, lambda found: seen.append(len(found)))
    assert done[0]["error"] == "KeyError: 0" and done[1]["absent"] == "x is not installed; pip install x"
    assert done[2]["ms"] == 2.0 and seen == [1, 2, 3]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == suite.HEADER and "KeyError" in out[1] and "pip install x" in out[2] and "path plain" in out[3]
    assert "no time left" in suite.run(rows, ["works"], None, -1)[0]["skipped"]
    with pytest.raises(SystemExit, match="1 of 3 rows failed"):
        suite.finish(done)


def test_a_row_is_chosen_by_its_name_or_a_beginning():
    names = ["sample fused", "sample fused, not compiled", "lora"]
    assert suite.chosen(names, ["sample fused"]) == ["sample fused"]
    assert suite.chosen(names, ["sample"]) == names[:2] and suite.chosen(names, None) == names


def test_no_figure_from_a_row_that_failed():
    assert "2" not in suite.line({"row": "x", "ms": 2.0, "error": "far"}).replace("x", "")


def test_rates_are_shares_of_the_ceilings():
    found = Ceilings(2e12, 4e14).figures(1.0, 10**9, 10**11)
    assert (found["gb_per_s"], found["tflop_per_s"]) == pytest.approx((1000, 100))
    assert (found["share_of_copy"], found["share_of_product"]) == pytest.approx((0.5, 0.25))


def test_a_report_that_grows_too_large_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "LARGEST", 1000)
    report.write_synthetic_run(tmp_path / "run", 3)
    (row,) = suite.run(report.ROWS, ["report make"], report.Page(tmp_path / "run"), 60)
    assert "MB, allowed are" in row["error"]
