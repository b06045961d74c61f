"""What tells on a machine whether its paths agree."""

import json
from pathlib import Path

import pytest
import torch
from vidtta.engine import choices, measure_paths, try_paths
from vidtta.engine.methods import LoRA


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are traced, and the autoencoder stays plain."""
    monkeypatch.setattr(choices, "COMPILER", "eager")
    for module in (choices, measure_paths):
        monkeypatch.setattr(module, "use_vae_way", lambda vae, way: None)
    torch._dynamo.reset()


def test_methods_agree_with_the_plain_path_and_what_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = tmp_path / "paths.json"
    broken = LoRA(steps=2, rank=65)
    monkeypatch.setitem(
        try_paths.METHODS, "full", (broken, try_paths.FIXED)
    )  # a rank that the small network does not take
    with pytest.raises(SystemExit, match="failed: full"):
        try_paths.main(["--small", "--kernels", "compile", "--methods", "none", "lora", "full", "--out", str(out)])
    torch.use_deterministic_algorithms(deterministic)
    found = json.loads(out.read_text())
    assert found["choices"]["sampling"] == "compile" and found["asked"]["kernels"] == "compile"
    none, lora, full = found["methods"]
    for row in (none, lora):
        assert row["distance_from_plain"] < 1e-4 and row["same_bits_twice"] and row["restored"]
        assert row["graphs"][1:] == [0, 0] and row["graph_breaks"] == [0, 0, 0]
    assert lora["ways"]["lora"] == "one product" and len(lora["losses"][1]) == 4
    assert "rank must be at most" in full["error"] and full["restored"]


def test_float8_is_tried_on_the_chosen_path(tmp_path: Path):
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = tmp_path / "paths.json"
    try_paths.main(["--small", "--float8", "all", "--methods", "lora", "full", "--out", str(out)])
    torch.use_deterministic_algorithms(deterministic)
    found = json.loads(out.read_text())
    assert found["asked"]["float8"] == "all"
    for row in found["methods"]:
        assert row["same_bits_twice"] and row["restored"] and 1e-4 < row["latents_from_plain"] < 0.3
