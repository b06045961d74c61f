"""The grid: cells as arms, one trajectory for all numbers of steps, the best one confirmed on other clips."""

import csv

import pytest
from vidtta.engine.errors import UserError
from vidtta.engine.methods import FullFineTuning
from vidtta.engine.recipe import load_recipe
from vidtta.engine.search import Search, cells, trajectories

from .tiny_run import FULL, make_clip, one_sentence, tiny_lab

GROUPS = [("clips/ball", "g"), ("more/more0", "g"), ("clips/wave", "h"), ("more/more1", "h")]
GRID = {"arm": "full", "grid": {"steps": [1, 2, 3], "lr": [1e-3, 3e-3]}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        make_clip(lab.root / "others" / "other.mp4", seed=7)
        for k in range(2):
            make_clip(lab.root / "more" / f"more{k}.mp4", seed=20 + k)
        lab.settings |= {"arms": {"full": FULL}, "keep": ["latents", "adapter"]}
        yield lab


def test_one_trajectory_gives_the_bits_of_separate_runs(lab, monkeypatch):
    from vidtta.engine import clip as clip_module

    taken = []
    adapt = clip_module.task_of
    monkeypatch.setattr(clip_module, "task_of", lambda *a: taken.append(1) or adapt(*a))
    assert lab.run("shared", search=GRID) == 0
    once = len(taken)
    assert lab.run("separate", search={**GRID, "snapshots": False}) == 0
    assert len(taken) - once > once  # separate runs adapt once a cell, shared ones once a rate
    shared, separate = lab.results("shared"), lab.results("separate")
    assert len(shared) == (1 + 6) * 2 and shared == separate
    for path in (lab.root / "shared/arms").rglob("*.safetensors"):
        assert path.read_bytes() == (lab.root / "separate" / path.relative_to(lab.root / "shared")).read_bytes()
    found = lab.read("shared", "search.json")
    assert len(found["cells"]) == 6 and found["axes"] == GRID["grid"]
    assert 0.2 < found["adapt_seconds"]["saved"] < 0.8  # 6 steps of 12, but for noise of the clock
    best = max(found["cells"], key=lambda cell: cell["difference"])
    assert found["best"] == best["arm"]
    with (lab.root / "shared/search.csv").open() as handle:
        assert [row["arm"] for row in csv.DictReader(handle)] == [cell["arm"] for cell in found["cells"]]
    # What is missing is made again, by the trajectory that passes through it.
    lost = lab.root / "shared/arms/full-steps2-lr0_001/clips/ball/result.json"
    before = lost.read_text()
    lost.unlink()
    assert lab.run("shared", search=GRID) == 0
    assert lost.exists() and lab.results("shared") == shared and before


def test_the_best_is_confirmed_on_other_clips(lab, capsys):
    small = {"arm": "full", "grid": {"lr": [1e-3, 3e-3]}, "confirm": str(lab.root / "others")}
    assert lab.run("confirmed", search=small) == 0
    best = lab.read("confirmed", "search.json")["best"]
    assert set(lab.results("confirmed/confirm")) == {"baseline/other", f"{best}/other"}
    # Halved by groups: what confirms was not among what chose.
    rows = [f"{k},{name}.mp4,a{k},cap {k},{group}" for k, (name, group) in enumerate(GROUPS)]
    (lab.root / "all.csv").write_text("\n".join(["number,path,id,caption,group", *rows]))
    data = {**lab.settings["data"], "clips": str(lab.root / "all.csv")}
    half = {**small, "confirm": "split", "confirm_limit": 1}
    assert lab.run("halves", search=half, data=data) == 0
    best = lab.read("halves", "search.json")["best"]
    assert {name for name in lab.results("halves") if name.startswith("baseline")} == {"baseline/a0", "baseline/a1"}
    assert set(lab.results("halves/confirm")) == {"baseline/a2", f"{best}/a2"}
    confirmed = lab.result("halves/confirm", best, "a2")
    assert (confirmed["caption"], confirmed["meta"]) == ("cap 2", {"number": "2", "group": "h"})
    capsys.readouterr()
    assert lab.run("one", search=half, data={**data, "limit": 2}) == 2
    assert "search.confirm: split needs clips of two groups, and data.clips has one" in one_sentence(capsys)
    assert lab.run("same", search={**small, "confirm": str(lab.root / "clips")}) == 2
    assert "search.confirm shares the clip ball with data.clips" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosine"}, "schedule cosine depends on the number of steps; set snapshots: false"),
        ({"early_stopping": {}}, "early_stopping ends a trajectory by itself; set snapshots: false"),
    ],
)
def test_snapshots_that_would_not_be_exact_are_refused(lab, capsys, changes, message):
    assert lab.run("x", search=GRID, arms={"full": {**FULL, **changes}}) == 2
    assert one_sentence(capsys).endswith(f"search: snapshots would not be exact: {message}")


def test_cells_take_any_setting_and_refuse_what_the_method_lacks(tmp_path):
    method = FullFineTuning(steps=2)
    found = cells(Search(arm="a", grid={"lr": (1, 1e-4), "gradient_clip": (0.5,)}), method)
    assert list(found) == ["a-lr1-gradient_clip0_5", "a-lr0_0001-gradient_clip0_5"]
    assert found["a-lr1-gradient_clip0_5"][1] == FullFineTuning(steps=2, lr=1.0, gradient_clip=0.5)
    for grid, message in (({"rank": (1,)}, "which the method lacks"), ({"lr": ("fast",)}, "of another type")):
        with pytest.raises(ValueError, match=message):
            cells(Search(arm="a", grid=grid), method)
    path = tmp_path / "x.yaml"
    path.write_text("output_dir: o\ndata: {clips: D}\narms: {a: {kind: full}}\nsearch: {arm: b, grid: {lr: [1.0]}}")
    with pytest.raises(UserError, match="search: arm names 'b', which is no arm that adapts"):
        load_recipe(str(path))
    path.write_text(
        "output_dir: o\ndata: {clips: D}\narms: {a: {kind: full}}\nsearch: {arm: a, grid: {steps: [4, 2], lr: [1.0]}}"
    )
    recipe = load_recipe(str(path))
    assert trajectories(recipe, ["baseline"]) == [["baseline"], ["a-steps2-lr1", "a-steps4-lr1"]]
