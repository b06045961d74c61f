"""Parts of a layer computed again in the backward pass: the same bits, and what is then kept, compiled or not."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vidtta.engine.methods.full import FullFineTuning
from vidtta.engine.methods.lora import LoRA
from vidtta.engine.models import fused
from vidtta.engine.models.paths import Paths, use_paths
from vidtta.kernels.common import INTERPRETED

from .tiny import tiny_dit, tiny_task

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = [FullFineTuning(), LoRA(rank=4), LoRA(rank=4, targets=("attn.qkv", "mlp.fc1"))]


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="Triton needs a GPU or its interpreter")
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned back"])
@pytest.mark.parametrize("method", METHODS, ids=["full", "lora", "lora fc1"])
def test_the_bits_are_those_of_keeping_and_queries_are_not_kept(method, turned, monkeypatch):
    """But where the backward turns them back: then it is their projection that is not, whatever is asked for."""
    alive: list[Any] = []
    rope = fused.qk_norm_rope

    def watched(*inputs: Any) -> tuple[Tensor, ...]:
        out = rope(*inputs)
        alive.extend(weakref.ref(t) for t in out[:2])
        return out

    monkeypatch.setattr(fused, "qk_norm_rope", watched)
    made_again: list[Any] = []
    again = fused.again
    monkeypatch.setattr(fused, "again", lambda function, *rest: made_again.append(function) or again(function, *rest))
    found = []
    for remade in ((), ("rotation",), ("rotation", "half_hidden"), ("rotation", "hidden")):
        model = tiny_dit(depth=1).to(DEVICE)
        use_paths(model, Paths(kernels="triton", remade=remade))
        for layer in model.layers:
            layer.attn.turns_back = turned
        task, parameters = tiny_task(model), method.attach(model, 0).masters.parameters
        alive.clear()
        made_again.clear()
        loss = task.loss(task.draw(0))
        gc.collect()
        kept = not remade or (turned and method.kind == "lora")
        assert sum(reference() is not None for reference in alive) == kept * 2 * len(model.layers)
        assert made_again.count(fused._self_attention) == (not kept) * len(model.layers)
        hidden = {"hidden": 2, "half_hidden": 1}.get(remade[-1], 0) if remade and method.kind == "lora" else 0
        assert made_again.count(fused._hidden) == hidden * len(model.layers) // 2
        found.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for other in found[1:]:
        assert len(other) > 1 and all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="Triton needs a GPU or its interpreter")
@pytest.mark.parametrize("grad", [False, True], ids=["sampling", "adapting"])
def test_the_terms_of_the_sum_before_the_mlp_are_let_go(grad, monkeypatch):
    """When the MLP is done, in the layers before too: neither the backward nor the layer's own names hold them."""
    terms: list[Any] = []
    alive: list[int] = []
    add, gate = fused.add_norm_modulate, fused.gate_residual

    def watched(x: Tensor, h: Tensor | None, *rest: Any) -> Any:
        if h is not None:
            terms.extend(weakref.ref(t) for t in (x, h))
        return add(x, h, *rest)

    def counted(*inputs: Any) -> Tensor:
        alive.append(sum(term() is not None for term in terms))
        return gate(*inputs)

    monkeypatch.setattr(fused, "add_norm_modulate", watched)
    monkeypatch.setattr(fused, "gate_residual", counted)
    model = tiny_dit(depth=1).to(DEVICE)
    use_paths(model, Paths(kernels="triton"))
    task, _ = tiny_task(model), LoRA(rank=4).attach(model, 0)
    with torch.set_grad_enabled(grad):
        assert task.loss(task.draw(0)).requires_grad == grad
    assert len(terms) == 2 * len(model.layers) and alive == [0] * len(model.layers)


@pytest.mark.skipif(DEVICE == "cuda", reason="traced with a stand-in for a GPU")
def test_what_a_compiled_layer_keeps(tmp_path):
    """In widths of the network a token: full fine-tuning 20 and LoRA 16 with the low-rank columns (16 of 48 here) apart; where queries,
    keys and values are made again four fewer, as attention's result then counts once (three with LoRA: its projection joins the parts
    of it again, which the compiler sees to be what the forward had); a frozen MLP's hidden layer is four more. Where
    frozen norms let the backward turn queries and keys back the projection's three are none, and those two count twice, as views."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.engine.kept"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [row for row in found if "kept" in row]
    assert len(rows) == 6
    assert [row["traced"] for row in found if "traced" in row] == [True] * 8
    low_rank = 2 / 3
    for row in rows:
        remade, full = row["remade"], row["method"] == "full"
        expected = 20 if full else 16 + low_rank
        expected -= (4 if full else 3) * ("rotation" in remade) + (4 * ("hidden" in remade) if not full else 0)
        turned = row["turned"] and not full
        expected -= turned
        assert list(row["kept"].values()).count(3.0) == (0 if turned else 1)
        assert sum(row["kept"].values()) == pytest.approx(expected, abs=0.2), row
        assert list(row["kept"].values()).count(4.0) == (1 if full or "hidden" not in remade else 0)
