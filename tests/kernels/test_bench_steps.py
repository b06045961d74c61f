"""The rows of the steps' bench at small shapes, and what it does when a row fails."""

import json
from pathlib import Path

import pytest
import torch
from vidtta.bench import step_rows, suite
from vidtta.bench.step_scene import small_scene

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are for the interpreter")
NAMES = [
    "attention", "sample3 eager", "sample3 fused", "sample3 fused, reused", "sample3 compiled", "lora eager", "lora fused",
    "delta steps mid eager", "delta steps mid fast", "full eager", "full fused, not compiled",
]  # fmt: skip
FLOAT8 = ["sample3 fused, float8", "float8 weights"]


@on_cpu
@pytest.mark.usefixtures("float8_cast")
def test_rows_run_and_agree_with_the_eager_path():
    scene = small_scene(torch.device("cpu"))
    scene.watch.runs, scene.training_steps = 1, 2
    rows = {row["row"]: row for row in suite.run(step_rows.ROWS, [*NAMES, *FLOAT8], scene, 600)}
    assert list(rows) == [*NAMES, *FLOAT8] and not [row for row in rows.values() if "error" in row]
    compared = [name for name, row in rows.items() if row.get("distance_from_eager", 1) < 1e-5]
    assert compared == [
        "sample3 fused", "sample3 fused, reused", "sample3 compiled", "lora fused", "delta steps mid fast", "full fused, not compiled",
    ]  # fmt: skip
    for name in ("sample3 fused", "lora fused", "full eager", "delta steps mid fast"):
        assert rows[name]["gb_per_s"] > 0 and rows[name]["share_of_copy"] > 0 and rows[name]["path"]
    assert (
        rows["sample3 fused"]["flops"] == rows["sample3 eager"]["flops"] > 0 < rows["sample3 fused"]["share_of_product"]
    )
    assert rows["sample3 compiled"]["graphs_more"] == 0 and rows["sample3 compiled"]["breaks_more"] == 0
    for name in FLOAT8[:1]:
        assert 1e-5 < rows[name]["distance_from_eager"] < 0.05 and rows[name]["path"].endswith(
            "frozen linears in float8"
        )
    assert rows["float8 weights"]["weights"] == 8 and rows["float8 weights"]["gb_per_s"] > 0
    assert scene.experiment.dit.float8 is None


@on_cpu
def test_a_failing_row_says_why_and_the_rest_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    scene, seen = small_scene(torch.device("cpu")), []
    monkeypatch.setitem(step_rows.ROWS, "raises", lambda scene: {}[0])
    monkeypatch.setitem(step_rows.ROWS, "works", lambda scene: {"ms": 1.0})
    rows = suite.run(step_rows.ROWS, ["raises", "works"], scene, 600, lambda rows: seen.append(json.dumps(rows)))
    assert rows[0]["error"].startswith("KeyError") and rows[1]["ms"] == 1.0 and len(seen) == 2
    assert "skipped" in suite.run(step_rows.ROWS, ["works"], scene, -1)[0]


@on_cpu
def test_a_result_far_from_eager_has_no_time():
    scene = small_scene(torch.device("cpu"))
    assert step_rows.compared(scene, "kind", torch.ones(3)) == {}
    with pytest.raises(ArithmeticError, match="allowed"):
        step_rows.compared(scene, "kind", 1.1 * torch.ones(3))
    with pytest.raises(ArithmeticError, match="finite"):
        step_rows.compared(scene, "kind", torch.full((3,), torch.nan))
