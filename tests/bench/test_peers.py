"""Peers: against stand-ins of the official package's names and signatures, which say `stand-in` in every row.

The official code itself is tried where it is on PYTHONPATH (`python -m tests.bench.against_official` says how to put it there).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vidtta.bench import record, suite
from vidtta.bench.peers import attention, official, plumbing, sdpa
from vidtta.bench.peers.opensora_rows import Pair

STANDINS = Path(__file__).parent / "standins"
CPU = torch.device("cpu")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are for the CPU")


def peers(out: Path, *words: str, path: Path | str = STANDINS, **environment: str) -> dict[str, dict]:
    """Rows of a peer's program, run with other packages in front of the installed ones."""
    command = [sys.executable, "-m", "vidtta.bench.peers.opensora", "--check", "--out", str(out), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(path)} | environment
    )
    assert out.exists(), done.stdout + done.stderr
    return {row["row"]: row for row in json.loads(out.read_text())["rows"]}


@on_cpu
def test_model_sampler_vae_and_training_are_held_against_the_official_ones_and_timed(tmp_path: Path):
    kinds = ["branches", "sampler", "full", "vae encode"]
    rows = peers(
        tmp_path / "a.json", "--only", *(f"opensora {kind} official" for kind in kinds), "opensora branches eager"
    )
    for kind in kinds:
        row = rows[f"opensora {kind} official"]
        assert row["peer"] == "opensora 1.3.0+stand.in" and row["ms"] > 0, row
        assert row["against"]["distance"] <= 1e-6 < row["against"]["allowed"] and "official code" in row["path"]
    assert "SDPA in its place" in rows["opensora branches official"]["path"]
    ours = rows["opensora branches eager"]
    assert ours["ratio"] == pytest.approx(rows["opensora branches official"]["ms"] / ours["ms"])
    timed = record.read(tmp_path / "a.json").times
    assert {f"peers::opensora {kind} official" for kind in kinds} <= set(timed)


@on_cpu
def test_an_official_code_that_computes_otherwise_gets_no_time(tmp_path: Path):
    names = ["opensora branches official", "opensora branches eager"]
    rows = peers(tmp_path / "a.json", "--only", *names, STANDIN_IS_WRONG="1")
    assert "relative distance" in rows[names[0]]["error"] and "ms" not in rows[names[0]]
    assert rows[names[1]]["absent"] == "there is no official result to hold it against"
    assert record.read(tmp_path / "a.json").times == {}


@pytest.mark.parametrize(
    "wrong",
    [lambda x: 1.3 * x, lambda x: -x, torch.zeros_like, torch.randn_like],
    ids=["larger", "negated", "zero", "noise"],
)
def test_in_bfloat16_a_wrong_result_does_not_widen_what_it_is_allowed(wrong):
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    pair: Any = SimpleNamespace(dtype=torch.bfloat16, limits={}, truth={}, official=SimpleNamespace(label="theirs"))

    def ours() -> torch.Tensor:
        return exact * 1.02

    Pair.yardstick(pair, "vae", ours, lambda: exact)
    assert Pair.judge(pair, "vae", "official", exact * 0.99, ours)["against"]["allowed"] == pytest.approx(0.04)
    with pytest.raises(ArithmeticError, match="relative distance"):
        Pair.judge(pair, "vae", "official", wrong(exact), ours)


@on_cpu
@pytest.mark.skipif(importlib.util.find_spec("opensora") is None, reason="the official code is not on PYTHONPATH")
def test_the_official_code_itself_computes_what_ours_does(tmp_path: Path):
    names = [
        f"opensora {kind}"
        for kind in ("branches official", "sampler official", "full official", "vae encode", "vae decode")
    ]
    rows = peers(tmp_path / "a.json", "--only", *names, path=os.environ["PYTHONPATH"])
    assert len(rows) == 3 + 2 * 4
    assert all(row["against"]["distance"] <= 5e-6 and "stand" not in row["peer"] for row in rows.values())
    wide = [sys.executable, "-m", "tests.bench.against_official"]
    done = subprocess.run(wide, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_cannot_be_imported_says_why(tmp_path: Path):
    if importlib.util.find_spec("opensora") is None:
        with pytest.raises(suite.Absent, match="opensora is not installed; pip install --no-deps git"):
            official.load(CPU)
    broken = tmp_path / "opensora/models/stdit"
    broken.mkdir(parents=True)
    (tmp_path / "opensora/__init__.py").touch()
    (broken / "stdit3.py").write_text("import einops_of_another_world\n")
    (row,) = peers(tmp_path / "a.json", path=f"{tmp_path}:{STANDINS}").values()
    assert "cannot be imported: No module named 'einops_of_another_world'" in row["absent"]
    if importlib.util.find_spec("timm") is None:
        (row,) = peers(tmp_path / "b.json", path=tmp_path).values()
        assert "cannot be imported: No module named 'timm.layers.mlp'" in row["absent"]


def test_a_registry_builds_what_was_named_to_it():
    registry = plumbing.Registry("model", locations=["opensora.models"])

    @registry.register_module()
    def twice(number: int) -> int:
        return 2 * number

    registry.register_module("STDiT3-XL/2")(dict)
    assert registry.build({"type": "twice", "number": 4}) == 8 == twice(4)
    assert registry.build({"type": "STDiT3-XL/2", "depth": 28}) == {"depth": 28}
    with pytest.raises(KeyError, match="VideoEncoder"):
        registry.build({"type": "VideoEncoder"})


def test_attention_in_the_place_of_missing_packages():
    q, k, v = torch.randn(3, 1, 12, 2, 8).double()
    together = sdpa.memory_efficient_attention(
        q, k[:, :9], v[:, :9], attn_bias=sdpa.BlockDiagonalMask.from_seqlens([5, 7], [3, 6])
    )
    for rows, keys in ((slice(0, 5), slice(0, 3)), (slice(5, 12), slice(3, 9))):
        logits = torch.einsum("bnhd,blhd->bhnl", q[:, rows], k[:, keys]) / 8**0.5
        apart = torch.einsum("bhnl,blhd->bnhd", logits.softmax(-1), v[:, keys])
        torch.testing.assert_close(together[:, rows], apart)
    causal = sdpa.flash_attn_func(q, k, v, softmax_scale=0.1, causal=True)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    other = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1)
    torch.testing.assert_close(causal, other.transpose(1, 2))


def test_an_attention_package_is_checked_at_every_shape():
    rows = attention.rows_of("xformers", small=True)
    right = attention.Bench("xformers", lambda q, k, v: sdpa.attention(q, k, v), CPU, None, None)
    wrong = attention.Bench("xformers", lambda q, k, v: sdpa.attention(q, k, v, scale=0.3), CPU, None, None)
    assert {name.split()[-1] for name in rows} == {"training", "forward"}
    for row in suite.run(rows, list(rows), right, 60):
        assert "error" not in row and row["against"]["error"] < 1e-5
    assert all("relative error" in row["error"] for row in suite.run(rows, list(rows), wrong, 60))


def test_packages_that_are_not_here_are_rows_with_a_reason():
    with pytest.raises(suite.Absent, match=r"flash_attn is not installed; pip install|cannot be imported"):
        attention.load("flash-attn")
