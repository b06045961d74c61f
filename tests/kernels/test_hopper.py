"""Every kernel compiles to Hopper's machine code at the model's widths, and traces as one graph; it is not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.accuracy import DEVICE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(DEVICE == "cuda", reason="with a GPU the kernels are compiled and run by the other tests")
def test_every_kernel_compiles_for_hopper_and_traces_as_one_graph(tmp_path):
    torch.use_deterministic_algorithms(False)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.hopper"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if "error" in row]
    traced = [row for row in rows if "traced" in row]
    assert traced and all(row["operations"] for row in traced)
    rows = [row for row in rows if "traced" not in row]
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__", "common", "windows", "attention"}
    assert {row["kernel"].split(".")[0] for row in rows} == files
    for row in rows:
        assert row["shared"] <= 227 * 1024 and row["spilled"] == 0 and row["registers"] > 0, row
    assert all(row["wgmma"] for row in rows if row["kernel"] == "lora_linear._product_kernel")
