"""A search by Optuna: pruned over the clips, the same trials and bits after a stop, never the best where it was pruned or failed."""

import json
import shutil
import sys

import pytest
from vidtta.engine import cli
from vidtta.engine import run as run_module
from vidtta.engine.errors import Interrupted

from .tiny_run import FULL, make_clip, one_sentence, tiny_lab

SEARCH = {
    "arm": "full",
    "sampler": "optuna",
    "trials": 5,
    "startup_trials": 3,
    "grid": {"lr": {"low": 1e-3, "high": 1.0, "log": True}, "steps": [1, 2]},
    "prune_p": 0.3,  # two clips that are both worse have p 0.25
    "prune_after": 2,
}
CLIPS = ["ball", "more0", "more1", "wave"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        for k in range(2):
            make_clip(lab.root / "clips" / f"more{k}.mp4", seed=20 + k)
        make_clip(lab.root / "others" / "other.mp4", seed=7)
        lab.settings |= {"arms": {"full": FULL}, "keep": ["latents"]}
        yield lab


@pytest.fixture(scope="module")
def whole(lab):
    """A study that nothing stopped."""
    assert lab.run("whole", search=SEARCH) == 0
    return lab.read("whole", "study.json")


def test_trials_are_pruned_and_their_other_clips_are_not_run(lab, whole):
    trials = {trial["arm"]: trial for trial in whole["trials"]}
    assert len(whole["trials"]) == 5 and {trial["state"] for trial in trials.values()} == {"complete", "pruned"}
    results = lab.results("whole")
    for arm, trial in trials.items():
        made = [clip for clip in CLIPS if f"{arm}/{clip}" in results]
        assert made == CLIPS[: len(trial["gains"])] and [int(place) for place in trial["gains"]] == list(
            range(len(made))
        )
        assert len(made) == 4 if trial["state"] == "complete" else 2 <= len(made) <= 4
        for place, clip in enumerate(CLIPS[: len(made)]):
            ours, base = (results[f"{name}/{clip}"]["scores"]["psnr"]["mean"] for name in (arm, "baseline"))
            assert trial["gains"][str(place)] == pytest.approx(ours - base)
        assert results[f"{arm}/ball"]["settings"]["method"]["lr"] == trial["values"]["lr"]
    assert any(len(trial["gains"]) < 4 for trial in trials.values())
    found = lab.read("whole", "search.json")
    complete = [trial for trial in whole["trials"] if trial["state"] == "complete"]
    assert found["best"] == max(complete, key=lambda trial: trial["value"])["arm"] and found["axes"] == {}
    counts = {
        state: sum(trial["state"] == state for trial in whole["trials"]) for state in ("complete", "pruned", "failed")
    }
    left_out = sum(4 - len(trial["gains"]) for trial in trials.values())
    assert found["trials"] == {**counts, "clips_not_run": left_out}
    for trial in whole["trials"]:  # what a pruned one is worth lies below the best
        assert trial["state"] == "complete" or trial["value"] < max(one["value"] for one in complete)


@pytest.mark.parametrize(("clips_before", "overlap"), [(6, False), (9, True)])
def test_a_study_that_was_stopped_has_the_same_trials_and_bits(lab, whole, monkeypatch, capsys, clips_before, overlap):
    monkeypatch.setattr(run_module, "pays", lambda device: overlap)
    output, begun, real = f"stopped {clips_before}", [], run_module.run_clip

    def stop(*arguments):
        begun.append(arguments[2].id)
        if len(begun) > clips_before:
            raise Interrupted("stopped by SIGINT")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "run_clip", stop)
        assert lab.run(output, search=SEARCH) == 130
    assert len(lab.results(output)) == clips_before
    assert cli.main(["status", str(lab.root / output)]) == 3 and " trials to come" in capsys.readouterr().out
    assert lab.run(output, search=SEARCH) == 0
    assert cli.main(["status", str(lab.root / output)]) == 0 and "to come" not in capsys.readouterr().out
    assert lab.read(output, "study.json") == whole and lab.results(output) == lab.results("whole")
    assert lab.read(output, "search.json")["best"] == lab.read("whole", "search.json")["best"]


def test_a_pruned_trial_is_never_the_best(lab, whole):
    shutil.copytree(lab.root / "whole", lab.root / "marked")
    best = lab.read("whole", "search.json")["best"]
    states = {True: "pruned", False: "complete"}
    trials = [{**trial, "state": states[trial["arm"] == best]} for trial in whole["trials"]]
    (lab.root / "marked/study.json").write_text(json.dumps({**whole, "trials": trials}))
    assert lab.run("marked", search=SEARCH) == 0
    found = lab.read("marked", "search.json")
    assert found["best"] != best and {row["arm"]: row["state"] for row in found["cells"]}[best] == "pruned"


def test_more_trials_go_on_from_those_that_are_there(lab, whole):
    assert lab.run("grown", search={**SEARCH, "trials": 2}) == 0
    assert lab.read("grown", "study.json")["trials"] == whole["trials"][:2]
    assert lab.run("grown", search=SEARCH) == 0
    assert lab.read("grown", "study.json") == whole


def test_another_seed_proposes_others(lab, whole):
    assert lab.run("seed", "data.limit=1", seed=1, search={**SEARCH, "trials": 2}) == 0
    others = lab.read("seed", "study.json")["trials"]
    assert [trial["params"] for trial in others] != [trial["params"] for trial in whole["trials"][:2]]


def test_a_trial_that_fails_ends_there_and_is_never_the_best(lab):
    choices = {**SEARCH, "grid": {"lr": [1e-3, 1e30]}, "trials": 4, "confirm": str(lab.root / "others")}
    assert lab.run("failing", search=choices) == 0
    trials = lab.read("failing", "study.json")["trials"]
    assert {trial["state"] for trial in trials if trial["values"]["lr"] == 1e30} == {"failed"}
    results = lab.results("failing")
    assert not any("1e_30" in name for name in results)
    assert not (lab.root / "failing/arms/full-lr1e_30/clips/wave").exists()
    best = lab.read("failing", "search.json")["best"]
    assert best == "full-lr0_001" and set(lab.results("failing/confirm")) == {"baseline/other", f"{best}/other"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "grid"}, "grid gives lr a range, of which only sampler: optuna takes values; list them"),
        ({"grid": {"lr": {"low": 1.0, "high": 1.0}}}, "low must be below high, was 1 to 1"),
        (
            {"grid": {"lr": {"low": 0.0, "high": 1.0, "log": True}}},
            "low must be positive on a logarithmic scale, was 0",
        ),
        ({"grid": {"rank": {"low": 1.0, "high": 2.0}}}, "grid names 'rank', which the method lacks"),
        ({"grid": {"steps": {"low": 1.0, "high": 2.0}}}, "grid gives steps the value 1.0, of another type than 2"),
        ({"grid": {"lr": [0.0, 1.0]}}, "lr must be positive, was 0.0"),
        ({"trials": 0}, "trials must be at least 1, was 0"),
        ({"snapshots": True}, "search.snapshots: nothing reads it: Optuna's trials run one by one; leave it out"),
    ],
)
def test_a_search_that_cannot_be_is_refused(lab, capsys, changes, message):
    assert lab.run("x", search={**SEARCH, **changes}) == 2
    assert message in one_sentence(capsys)


def test_what_only_optuna_reads_is_refused_in_a_grid(lab, capsys):
    assert lab.run("x", search={"arm": "full", "grid": {"lr": [1e-3]}, "trials": 3}) == 2
    assert "search.trials: nothing reads it: with search.sampler: grid every combination" in one_sentence(capsys)


def test_several_tasks_another_search_and_a_missing_optuna_are_refused(lab, whole, capsys, monkeypatch):
    capsys.readouterr()
    assert lab.run("whole", "--batch-end", "2", search=SEARCH) == 2
    assert "run it as one task, without --batch-start and --batch-end" in one_sentence(capsys)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert lab.run("whole", search=SEARCH) == 2
    assert "run it as one task" in one_sentence(capsys)
    monkeypatch.undo()
    assert lab.run("whole", search={**SEARCH, "prune_p": 0.2}) == 2
    assert "its trials are of another search (prune_p: was 0.3, now 0.2); choose another output_dir" in one_sentence(
        capsys
    )
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert lab.run("whole", search=SEARCH) == 2
    assert "needs Optuna; pip install 'vidtta[search]'" in one_sentence(capsys)
    assert json.loads((lab.root / "whole" / "study.json").read_text()) == whole
