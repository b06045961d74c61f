"""Planted mistakes: a run refuses them, or fails the clip with the reason; the same run without a plant passes.

Those in the code are in sabotage.py; those of a recipe, a file or a run directory are here.
"""

import csv
import shutil
from functools import partial

import lpips
import pytest
from vidtta.engine import fetch
from vidtta.engine.files import sha256_file
from vidtta.engine.metrics import lpips as lpips_module
from vidtta.engine.prepare.output import clip_path
from vidtta.engine.prepare.run import prepare
from vidtta.engine.prepare.settings import Settings
from vidtta.engine.prepare.storage import write_clip

from . import sabotage
from .sabotage import KNOWN, TOTAL, trained_lab
from .test_gate import predictor
from .tiny import save_alexnet
from .tiny_run import CLIPS, DELTA, FULL, HEIGHT, WIDTH, one_sentence

WORSE = "model.dit predicts worse than zero on clip ball before adapting"
SHOWN = "adapting shows the network the frames that it is to predict"
LEAK = f"the known latents depend on frames after the {KNOWN} known ones"
UNPAIRED = "this result cannot be compared with that of arm baseline (made_from."
SAME_VIDEO = "adapting changed weights, but the video is that of arm baseline to the bit"

# Plants in sabotage.py, with what the run says before the first clip, and with what it says of each clip that adapts.
REFUSED = {
    "flipped_target": WORSE,
    "flipped_output": WORSE,
    "target_in_the_condition": SHOWN,
    "target_under_the_noise": SHOWN,
    "no_condition": "adapting does not show the network the frames that condition",
    "scored_frames_encoded": LEAK,
    "sliced_from_the_whole_clip": LEAK,
    "whole_chunks_only": f"the last 4 of {KNOWN} known frames do not count",
}
FAILED = {
    "no_step_taken": "RuntimeError: adapting took no step of 2",
    "not_in_force_while_sampling": SAME_VIDEO,
    "another_clips_frames": UNPAIRED + "scored frames: was ",
    "another_clips_latents": UNPAIRED + "known latents: was ",
    "noise_of_the_process": UNPAIRED + "noise: was ",
    "another_sampler_in_the_baseline": UNPAIRED + "sampler: was ",
}
RANDOM_LPIPS = {
    "another file": "is not the published file: its SHA-256 begins with ",
    "features left random": "LPIPS was built with other features than AlexNet's verified file holds",
    "linear weights left random": "LPIPS was built with other linear weights than those published",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with trained_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def control(lab):
    """What the run gives without a plant."""
    assert lab.run("control") == 0
    results = lab.results("control")
    assert sorted(results) == [f"{arm}/{clip}" for arm in ("baseline", "delta", "full") for clip in CLIPS]
    assert all(result["marks"] == [] for result in results.values())
    return results


@pytest.fixture
def output(lab, control, request, capsys):
    """The name of a run directory of the test's own."""
    capsys.readouterr()
    return request.node.name.replace("/", " ")


def refused(lab, output, capsys, *words, **sections):
    """The sentence that a run ends with before the first clip."""
    assert lab.run(output, *words, **sections) == 2
    return one_sentence(capsys).removeprefix("error: ")


def reasons(lab, output):
    """Why clips have no result, by arm/clip."""
    found = (lab.root / output / "arms").glob("*/clips/*/failure.json")
    return {f"{path.parts[-4]}/{path.parts[-2]}": lab.read(output, *path.parts[-5:])["reason"] for path in found}


@pytest.mark.parametrize("plant", REFUSED)
def test_the_run_is_refused_before_the_first_clip(lab, output, monkeypatch, capsys, plant):
    getattr(sabotage, plant)(monkeypatch)
    assert refused(lab, output, capsys).startswith(REFUSED[plant])
    assert lab.results(output) == {}


@pytest.mark.parametrize("plant", FAILED)
def test_the_clips_fail_with_the_reason(lab, output, monkeypatch, capsys, plant):
    getattr(sabotage, plant)(monkeypatch)
    assert lab.run(output, arms={"full": FULL}) == 1
    assert one_sentence(capsys).startswith("results missing: 2; ")
    found = reasons(lab, output)
    assert sorted(found) == ["full/ball", "full/wave"]
    assert all(reason.startswith(FAILED[plant]) for reason in found.values()), found
    with (lab.root / output / "summary.csv").open() as handle:
        rows = {(row["arm"], row["clip"]): row for row in csv.DictReader(handle)}
    assert {rows["full", clip]["status"] for clip in CLIPS} == {"failed"}
    assert {rows["baseline", clip]["status"] for clip in CLIPS} == {"done"}


@pytest.mark.parametrize(
    ("plant", "failed"),
    [
        ("not_restored", ["full/ball", "full/wave"]),
        ("restored_off_by_a_bit", ["full/ball", "full/wave"]),
        ("more_changed_than_trained", []),
    ],
)
def test_results_of_an_arm_that_left_the_network_changed_are_removed(lab, output, monkeypatch, plant, failed):
    getattr(sabotage, plant)(monkeypatch)
    with pytest.raises(RuntimeError, match="arm full did not restore the network's weights; its results of this run"):
        lab.run(output, arms={"full": FULL})
    assert sorted(lab.results(output)) == ["baseline/ball", "baseline/wave"]
    assert sorted(reasons(lab, output)) == failed


def test_a_clip_that_the_gate_left_alone_and_was_adapted_to(lab, output, monkeypatch):
    """The same gate without the plant leaves the baseline's bits (test_gate.py)."""
    gate = {"full": {"predictor": predictor(lab, "no", lab.result("control", "full", "ball"), -1.0)}}
    sabotage.adapted_against_the_gate(monkeypatch)
    assert lab.run(output, arms={"full": FULL}, gate=gate) == 1
    assert set(reasons(lab, output).values()) == {
        "the gate left this clip unadapted, but its video is not that of arm baseline to the bit"
    }


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({**FULL, "lr": 1e-30}, "adapting changed no weight that computes (2 steps moved the masters by "),
        ({**DELTA, "lr": 1e-12}, SAME_VIDEO),
    ],
    ids=["weights", "output"],
)
def test_a_learning_rate_that_rounding_swallows(lab, output, monkeypatch, method, message):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert lab.run(output, "model.dtype=bfloat16", "data.limit=1", arms={"slow": method}) == 1
    assert reasons(lab, output)["slow/ball"].startswith(message)


def test_masters_that_are_rounded_as_the_weights(lab, output, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    sabotage.masters_in_bfloat16(monkeypatch)
    assert lab.run(output, "model.dtype=bfloat16", "data.limit=1", arms={"full": FULL}) == 1
    assert reasons(lab, output)["full/ball"] == "AssertionError: steps on rounded weights would be lost"


def test_a_loss_that_is_not_a_number(lab, output):
    assert lab.run(output, "data.limit=1", arms={"full": {**FULL, "lr": 1e30}}) == 1
    assert reasons(lab, output)["full/ball"].startswith("the loss or its gradient is not finite at step 1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["window.scored_from=20"], "a known frame may not be scored"),
        (["arms.full.steps=0"], "steps must be at least 1, was 0"),
        (["window.known_frames=26"], "known_frames must be at least 1 and below total_frames"),
        (["adaptation.context_latents=7"], "at least one must be left to predict"),
    ],
    ids=["scored frames in conditioning", "zero steps", "nothing to score", "nothing to predict"],
)
def test_the_recipe_is_refused(lab, output, capsys, words, message):
    assert message in refused(lab, output, capsys, *words)
    assert not (lab.root / output).exists()


def test_a_baseline_of_another_sampler(lab, output, capsys):
    """The baseline's folder comes from a run with more steps."""
    assert lab.run(f"more steps {output}", "sampler.steps=3", arms={"baseline": {"kind": "none"}}, adaptation=None) == 0
    shutil.copytree(lab.root / f"more steps {output}" / "arms", lab.root / output / "arms")
    sentence = refused(lab, output, capsys)
    assert "the result of clip ball in arm baseline was made under other settings" in sentence
    assert "(protocol.sampler.steps: was 3, now 2)" in sentence


def test_a_stale_result_under_new_settings(lab, output, capsys):
    shutil.copytree(lab.root / "control", lab.root / output)
    assert "(method.lr: was 0.1, now 0.2)" in refused(lab, output, capsys, "arms.delta.lr=0.2")


def test_results_swapped_between_clips(lab, output, capsys):
    shutil.copytree(lab.root / "control", lab.root / output)
    clips = lab.root / output / "arms/full/clips"
    for was, now in (("ball", "spare"), ("wave", "ball"), ("spare", "wave")):
        (clips / was).rename(clips / now)
    sentence = refused(lab, output, capsys)
    assert 'the result of clip ball in arm full was made under other settings (caption: was "Wave.", ' in sentence


def test_stored_latents_of_another_clip(lab, output, capsys):
    shutil.copytree(lab.root / "control", lab.root / output)
    shutil.rmtree(lab.root / output / "arms/full")
    ball, wave = sorted((lab.root / output / "shared/latents").iterdir())
    shutil.copy(wave, ball)
    assert refused(lab, output, capsys).startswith("the stored known latents are not those of the clip's known frames")


@pytest.mark.parametrize("plant", ["none", *RANDOM_LPIPS])
def test_lpips_of_a_random_network(lab, output, monkeypatch, capsys, tmp_path, plant):
    """No published weights are at hand: a random file stands for them, under the name that its own hash makes."""
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = save_alexnet(folder / fetch.HUB_FILES["lpips"])
    if plant != "another file":
        file = file.rename(folder / f"alexnet-{sha256_file(file)[:8]}.pth")
        monkeypatch.setitem(fetch.HUB_FILES, "lpips", file.name)
    if plant == "features left random":
        monkeypatch.setattr(lpips_module, "load_strict", lambda *inputs: None)
    if plant == "linear weights left random":
        monkeypatch.setattr(lpips, "LPIPS", partial(lpips.LPIPS, pretrained=False))
    words = ("data.limit=1", "data.height=32", "data.width=32", "model.allow_untrained=true")
    if plant == "none":
        assert lab.run(output, *words, scores={"lpips": "required"}) == 0
        assert lab.result(output, "full", "ball")["scores"]["lpips"]["mean"] > 0
    else:
        assert RANDOM_LPIPS[plant] in refused(lab, output, capsys, *words, scores={"lpips": "required"})


def test_a_prepared_clip_that_was_replaced(lab, output):
    """Its manifest has the hash of the frames, so even a first run notices; a run at another rate has nothing to compare."""
    out = lab.root / f"prepared {output}"
    settings = Settings(count=None, height=HEIGHT, width=WIDTH, frames=TOTAL, conditioning_frames=KNOWN)
    assert prepare("folder", lab.root / "clips", out, settings, workers=1, quiet=True) == 0
    data = {**lab.settings["data"], "clips": str(out / "manifest.csv")}
    sections = {"data": data, "arms": {"baseline": {"kind": "none"}}, "adaptation": None}
    assert lab.run(f"control {output}", **sections) == 0
    write_clip(clip_path(out, "wave"), lab.frames("ball", TOTAL), 24)
    assert lab.run(output, **sections) == 1
    (reason,) = reasons(lab, output).values()
    assert reason.startswith(f"{clip_path(out, 'wave')}: its frames are not those of its manifest (frames_sha256)")
    assert lab.run(f"shorter {output}", **sections, window={**lab.settings["window"], "total_frames": 25}) == 0
