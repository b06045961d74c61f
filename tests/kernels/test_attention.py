"""The choice of an attention implementation by measurement."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from vidtta.engine.models.attention import attend as plain
from vidtta.kernels import attention
from vidtta.kernels.attention import Choice, Shape, attend, choose, measure, self_attention_shapes
from vidtta.kernels.windows import Grid

from tests.kernels.accuracy import DEVICE, rand

CPU = torch.device("cpu")
SMALL = Shape(2, 17, 17, 2, 8)


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_back_ends_compute_the_models_attention(backend):
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    q, k, v = rand(2, 17, 3, 8, dtype=dtype), *(rand(2, 9, 3, 8, dtype=dtype, seed=s) for s in (1, 2))
    assert torch.allclose(attend(q, k, v, backend), plain(q, k, v), rtol=1e-2, atol=1e-2 if DEVICE == "cuda" else 1e-6)


def test_an_unknown_back_end_is_named():
    with pytest.raises(ValueError, match="'fast'"):
        attend(*(rand(1, 2, 1, 8) for _ in range(3)), backend="fast")
    with pytest.raises(ValueError, match="'fast'"):
        Choice(pinned="fast")


def test_real_shapes():
    shapes = self_attention_shapes(3, Grid(15, 30, 40), 16, 72)
    assert shapes == [Shape(45, 1200, 1200, 16, 72), Shape(45, 960, 960, 16, 72), Shape(15, 720, 720, 16, 72)]
    assert sum(s.batch * s.queries for s in shapes[1:]) == 3 * 18000


@pytest.mark.parametrize("training", [False, True])
def test_measuring_on_a_cpu_takes_what_runs_and_says_why_the_rest_does_not(training):
    rows = measure([SMALL], CPU, torch.float32, training=training, backends=("fa4", "cudnn", "flash", "math"), runs=3)
    by_name = {row["backend"]: row for row in rows}
    for name in ("flash", "math"):
        assert by_name[name]["milliseconds"] > 0 and by_name[name]["error"] < 1e-5
    for name in ("fa4", "cudnn"):
        assert "milliseconds" not in by_name[name] and by_name[name]["refused"]
    choice = choose(json.loads(json.dumps(rows)))
    assert choice.backend(SMALL, training) == min(("flash", "math"), key=lambda name: by_name[name]["milliseconds"])


def test_what_is_inaccurate_is_not_chosen(monkeypatch):
    def noisy(q, k, v, backend):
        out = plain(q, k, v)
        return out * (1.1 if backend == "flash" else 1)

    monkeypatch.setattr(attention, "attend", noisy)
    rows = measure([SMALL], CPU, torch.float32, training=False, backends=("flash", "efficient"), runs=3)
    assert "allowed" in rows[0]["refused"]
    assert choose(rows).forward == {SMALL.key: "efficient"}


def test_the_fastest_wins_for_each_shape_and_a_pin_wins_over_it():
    def row(backend: str, shape: str, training: bool, ms: float) -> dict:
        return {"backend": backend, "shape": shape, "training": training, "milliseconds": ms}

    rows = [
        row("fa4", "a", False, 2.0),
        row("cudnn", "a", False, 1.0),
        row("fa4", "b", False, 1.0),
        row("fa4", "a", True, 3.0),
    ]
    choice = choose([*rows, {"backend": "flash", "shape": "a", "training": False, "refused": "not here"}])
    assert choice == Choice({"a": "cudnn", "b": "fa4"}, {"a": "fa4"})
    assert Choice.from_json(choice.to_json()) == choice
    assert choose(rows, "flash").backend(SMALL, True) == "flash"


def test_a_shape_that_was_not_measured_is_an_error():
    with pytest.raises(KeyError, match="2x17x17x2x8 was not measured"):
        Choice({"a": "cudnn"}).backend(SMALL, training=False)


@pytest.mark.filterwarnings("ignore:Error detected")
@pytest.mark.parametrize("name", attention.PACKAGES)
def test_a_packages_attention_is_one_operation_of_a_graph_and_has_no_compiled_backward(name, monkeypatch):
    monkeypatch.setitem(attention._FROM_PACKAGE, name, plain)
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    q, k, v = (rand(2, 17, 3, 8, dtype=dtype, seed=s) for s in range(3))
    assert torch.equal(attend(q, k, v, name), plain(q, k, v))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v, name), plain(q, k, v))
    with pytest.raises(RuntimeError, match="autograd"):
        compiled(q.requires_grad_(), k, v, name).sum().backward()
    torch._dynamo.reset()


def test_a_package_that_is_not_there_is_a_reason():
    present = [
        n for n in attention.PACKAGES if importlib.util.find_spec("xformers" if n == "xformers" else "flash_attn")
    ]
    rows = measure([SMALL], CPU, torch.float32, training=False, backends=attention.PACKAGES, runs=1)
    assert all("refused" in row for row in rows if row["backend"] not in present)


def test_with_deterministic_algorithms_training_takes_none_whose_backward_is_not_repeatable():
    assert torch.are_deterministic_algorithms_enabled()  # of the tests' conftest, as of a recipe's default
    rows = measure([SMALL], CPU, torch.float32, training=True, backends=("cudnn", "xformers", "flash"), runs=1)
    assert ["deterministic" in row.get("refused", "") for row in rows] == [True, True, False]
    torch.use_deterministic_algorithms(False)
    (row,) = measure([SMALL], CPU, torch.float32, training=True, backends=("cudnn",), runs=1)
    assert "deterministic" not in row["refused"]


@pytest.mark.parametrize("training", [False, True])
def test_with_deterministic_algorithms_none_is_taken_that_gives_other_bits_the_second_time(training, monkeypatch):
    calls = []

    def drifting(q, k, v, backend):
        calls.append(backend)
        return plain(q, k, v) * (1 + 1e-5 * len(calls) * (backend == "flash"))

    monkeypatch.setattr(attention, "attend", drifting)
    rows = measure([SMALL], CPU, torch.float32, training=training, backends=("flash", "efficient"), runs=1)
    assert "other bits" in rows[0]["refused"] and "milliseconds" in rows[1]


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_4_repeats_its_bits_where_that_is_asked_for(deterministic, monkeypatch):
    asked = []

    def stand_in(q, k, v, **settings):
        asked.append(settings)
        return plain(q, k, v), None

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", SimpleNamespace(flash_attn_func=stand_in))
    q, k, v = (rand(2, 17, 3, 8, seed=s) for s in range(3))
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert torch.equal(attend(q, k, v, "fa4"), plain(q, k, v))
    finally:
        torch.use_deterministic_algorithms(True)
    assert asked == [{"deterministic": True} if deterministic else {}]
