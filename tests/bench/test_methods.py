"""The bench of every method: its settings are the recipe's, its rows are whole, and one that fails says why."""

import dataclasses
import json

import pytest
import torch
from vidtta.bench import methods
from vidtta.bench.step_scene import small_scene
from vidtta.engine.methods.full import FullAdapter
from vidtta.engine.recipe import load_recipe
from vidtta.engine.window import Window

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are for the CPU")
SMALL = "08_method_comparison.demo"


@pytest.mark.parametrize("name", ["08_method_comparison", SMALL, "04_regularized_ewc"])
def test_settings_are_those_of_the_recipe(name):
    clips = [] if name.endswith(".demo") else ["data.clips=D"]
    recipe = load_recipe(name, [*clips, *(["arms.ewc.ewc.clips=V"] if "ewc" in name else [])])
    cases, sampler, adaptation, window = methods.read_cases(name)
    plain = {arm: case.method for arm, case in cases.items() if case.placebo is None}
    if "ewc" in name:
        plain["ewc"] = dataclasses.replace(plain["ewc"], ewc=dataclasses.replace(plain["ewc"].ewc, clips="V"))
    assert plain == recipe.arms
    assert {arm: case.placebo for arm, case in cases.items() if case.placebo} == {
        f"{arm}-{placebo}": placebo for arm in recipe.placebos for placebo in ("other_clip", "random")
    }
    assert (sampler, adaptation, window) == (recipe.sampler, recipe.adaptation, recipe.window)


@pytest.fixture
def scene():
    scene = small_scene(torch.device("cpu"))
    _, sampler, adaptation, _ = methods.read_cases(SMALL)
    short = Window(total_frames=17, known_frames=13, model_frames=17)
    few = dataclasses.replace(sampler, steps=2)
    scene.experiment = dataclasses.replace(scene.experiment, sampler=few, adaptation=adaptation, window=short)
    return scene


def few_steps(case):
    return dataclasses.replace(case, method=dataclasses.replace(case.method, steps=2))


@on_cpu
def test_rows_are_whole_and_the_rest_is_named(scene, capsys, monkeypatch):
    cases = methods.read_cases(SMALL)[0]
    chosen = {"baseline": cases["baseline"]} | {name: few_steps(cases[name]) for name in ("full", "lora-random")}
    written = []
    rows = {row["arm"]: row for row in methods.run(scene, chosen, 600, lambda rows: written.append(json.dumps(rows)))}
    assert len(written) == len(rows) == len(capsys.readouterr().out.splitlines()) == 3
    for row in rows.values():
        assert row["total"] > row["encode"] + row["adapt"] + row["sample"] + row["decode"] > 0
        assert row["restored_bit_for_bit"] and row["peak_gib"] >= row["adapt_peak_gib"] > 0
    assert rows["baseline"]["steps"] == 0 < rows["full"]["changed"] and rows["lora-random"]["steps"] == 2
    assert "skipped" in methods.run(scene, chosen, -1)[0]
    monkeypatch.setattr(FullAdapter, "adapt", lambda self, task, on_step: {}[0])
    first, second = methods.run(scene, {name: cases[name] for name in ("full", "baseline")}, 600)
    assert first["error"].startswith("KeyError") and "total" in second
    monkeypatch.setattr(FullAdapter, "detach", lambda self: self.model.rope.freqs.data.add_(1))
    assert methods.run(scene, {"full": cases["full"]}, 600)[0]["restored_bit_for_bit"] is False
