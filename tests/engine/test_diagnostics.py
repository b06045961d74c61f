"""Diagnostics: they change no bit of a result, and say what they say they measure."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vidtta.engine import clip as clip_module
from vidtta.engine.clip import continue_clip
from vidtta.engine.diagnostics import Curves, DiagnosticSettings, HeldOut, at_levels
from vidtta.engine.evaluation import TIMESTEPS, evaluate
from vidtta.engine.methods import Delta, FullFineTuning, LoRA
from vidtta.engine.methods.parts import EarlyStopping
from vidtta.engine.window import Window

from .tiny import FIXED_DRAWS, tiny_dit, tiny_experiment, tiny_known, tiny_pixels, tiny_task
from .tiny_run import FULL, make_clip, one_sentence, tiny_lab

SHORT = Window(total_frames=17, known_frames=13, model_frames=17)
METHODS = {
    "full": FullFineTuning(steps=3, lr=1e-2),
    "lora": LoRA(steps=3, lr=1e-1, rank=2, targets=("attn.qkv", "cross_attn.kv_linear")),
    "delta": Delta(steps=3, lr=1e-1, ranges=2),
}
each_method = pytest.mark.parametrize("kind", METHODS)


def watched(kind, **settings):
    experiment = tiny_experiment(torch.bfloat16, FIXED_DRAWS, window=SHORT)
    known = tiny_known(experiment)
    other = HeldOut(tiny_known(experiment, "other"), tiny_pixels())
    curves = Curves(DiagnosticSettings(**settings), experiment, lambda a, b: {"psnr": {"mean": 1.0}}, [other])
    adapter = METHODS[kind].attach(experiment.dit, 0)
    plain = continue_clip(experiment, known, adapter)
    seen = continue_clip(experiment, known, adapter, observer=curves)
    adapter.detach()
    return plain, seen, curves.found


@each_method
def test_watching_changes_no_bit_and_the_curves_tell_of_every_step(kind):
    plain, seen, found = watched(kind, every=1, held_out="x")
    assert torch.equal(plain.latents, seen.latents) and (plain.trace, plain.change) == (seen.trace, seen.change)
    assert found["steps"] == [0, 1, 2, 3] and found["timesteps"] == list(TIMESTEPS)
    assert found["losses"][0] == found["residual_variance"] and len(found["losses"]) == 4
    assert found["kl"][0] == [0.0] * 10 and all(value > 0 for value in found["kl"][-1])
    assert found["distances"][0] == {"master": 0.0, "effective": 0.0, "changed": 0}
    assert found["distances"][-1] == {name: getattr(seen.change, name) for name in ("master", "effective", "changed")}
    squares = [sum(pair[i] ** 2 for pair in found["layers"].values()) for i in (0, 1)]
    assert squares[0] == pytest.approx(seen.change.master**2, rel=1e-4)
    assert squares[1] == pytest.approx(seen.change.effective**2, rel=1e-4)
    forgetting = found["forgetting"]["other"]
    assert forgetting["before"]["losses"] != forgetting["after"]["losses"]
    assert "observe" in seen.seconds and "observe" not in plain.seconds


def test_the_levels_are_those_of_the_evaluation():
    task = tiny_task(tiny_dit(depth=1))
    assert at_levels(task).losses == pytest.approx([level.loss for level in evaluate(task)])


def test_kl_is_that_of_two_gaussians():
    """Against torch's own, over the predicted numbers of one level."""
    model = tiny_dit(depth=1)
    task = tiny_task(model)
    base = at_levels(task)
    adapter = METHODS["full"].attach(model, 0)
    curves = Curves(DiagnosticSettings(every=3), tiny_experiment(), lambda a, b: {})
    curves.begin(task, adapter)
    adapter.adapt(task, lambda step, loss: curves.step(step + 1))
    adapted = at_levels(task)
    for level in (0, 9):
        spread = base.losses[level] ** 0.5
        p, q = (torch.distributions.Normal(one.velocities[level], spread) for one in (adapted, base))
        expected = torch.distributions.kl_divergence(p, q).mean().item()
        assert curves.found["kl"][-1][level] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("every", "looks"), [(1, [0, 1, 2]), (5, [0])])
def test_early_stopping_is_told_apart(every, looks):
    """It stops after two steps and goes back to the start: no look says of the start that it is the end."""
    method = FullFineTuning(steps=6, lr=0.3, early_stopping=EarlyStopping(patience=2))
    model = tiny_dit(depth=1)
    adapter = method.attach(model, 0)
    curves = Curves(DiagnosticSettings(every=every), tiny_experiment(), lambda a, b: {})
    curves.begin(tiny_task(model), adapter)
    adapter.adapt(tiny_task(model), lambda step, loss: curves.step(step + 1))
    curves.adapted()
    assert curves.found["steps"] == looks and adapter.trace.steps == 2 and adapter.trace.kept_step == 0
    assert all(pair == [0.0, 0.0] for pair in curves.found["layers"].values())


def test_a_run_writes_them_and_adds_them_when_asked_later(tmp_path, capsys):
    with tiny_lab(tmp_path) as lab:
        make_clip(lab.root / "held" / "other.mp4", seed=7)
        one = ("data.limit=1", "keep=[]")
        assert lab.run("plain", *one, arms={"full": FULL}) == 0
        folder = Path(lab.root, "plain/arms/full/clips/ball")
        assert not (folder / "curves.json").exists()
        before = lab.results("plain")
        held = {"every": 1, "held_out": str(lab.root / "held"), "held_out_scores": True}
        assert lab.run("plain", *one, arms={"full": FULL}, diagnostics=held) == 0
        assert lab.results("plain") == before
        found = lab.read("plain", "arms/full/clips/ball/curves.json")
        scores = found["forgetting"]["other"]
        assert scores["before"]["scores"]["psnr"] != scores["after"]["scores"]["psnr"]
        assert found["steps"] == [0, 1, 2]
        assert not Path(lab.root, "plain/arms/baseline/clips/ball/curves.json").exists()
        shared = {"held_out": str(lab.root / "clips")}
        assert lab.run("other", *one, arms={"full": FULL}, diagnostics=shared) == 2
        assert "diagnostics.held_out shares the clip ball with data.clips" in one_sentence(capsys)


def test_the_time_of_watching_is_apart_from_that_of_adapting(monkeypatch):
    """On a clock that a look puts forward by 1000 s."""
    real, ahead = time.perf_counter, [0.0]
    monkeypatch.setattr(clip_module, "time", SimpleNamespace(perf_counter=lambda: real() + ahead[0]))

    class Slow(Curves):
        def step(self, steps):
            ahead[0] += 1000

    experiment = tiny_experiment(window=SHORT)
    adapter = METHODS["delta"].attach(experiment.dit, 0)
    slow = Slow(DiagnosticSettings(every=1), experiment, lambda a, b: {})
    seconds = continue_clip(experiment, tiny_known(experiment), adapter, observer=slow).seconds
    assert seconds["observe"] > 3 * 1000 and 0 < seconds["adapt"] < 1000
