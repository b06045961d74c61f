"""The same command again: what is finished stays, what is missing is made, and other settings are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from vidtta.engine.data.video import read_window

from .tiny_run import CLIPS, DELTA, FULL, HEIGHT, TOTAL, WIDTH, make_clip, one_sentence, tiny_lab

ARMS = {"full": FULL, "delta": DELTA}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = ARMS
        yield lab


@pytest.fixture(scope="module")
def undisturbed(lab):
    assert lab.run("undisturbed") == 0
    return lab.results("undisturbed")


@pytest.fixture
def finished(lab, undisturbed, tmp_path):
    """A finished run in a folder of the test's own; its name."""
    name = tmp_path.name
    shutil.copytree(lab.root / "undisturbed", lab.root / name)
    return name


def written(folder):
    """When each file was written, but for those that any run writes again."""
    again = ("recipe.yaml", "environment.json", "preflight.json", "summary.csv")
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name not in again}


def test_a_finished_run_is_left_alone(lab, finished):
    before = written(lab.root / finished)
    assert len([path for path in before if path.name == "result.json"]) == 6
    summary = (lab.root / finished / "summary.csv").read_text()
    (lab.root / finished / "summary.csv").unlink()
    assert lab.run(finished) == 0
    assert written(lab.root / finished) == before
    assert (lab.root / finished / "summary.csv").read_text() == summary


@pytest.mark.parametrize("damage", [None, "", '{"clip": "wave", "arm"', "[]"], ids=["gone", "empty", "cut", "list"])
def test_a_result_that_is_missing_or_damaged_is_made_again(lab, undisturbed, finished, damage):
    before = written(lab.root / finished)
    result = lab.root / finished / "arms/delta/clips/wave/result.json"
    if damage is None:
        result.unlink()
    else:
        result.write_text(damage)
    left = [
        folder / ".tmp-0123456789ab-result.json" for folder in (result.parent, lab.root / finished / "shared/latents")
    ]
    for path in left:  # as a kill leaves them
        path.write_text('{"clip":')
        os.utime(path, (path.stat().st_mtime - 3700,) * 2)
    live = result.parent / ".tmp-ba9876543210-video.mp4"
    live.write_bytes(b"another task writes this")
    (result.parent / "video.mp4").write_bytes(b"half a video")
    assert lab.run(finished) == 0
    assert lab.results(finished) == undisturbed
    after = written(lab.root / finished)
    changed = {path.relative_to(lab.root / finished).as_posix() for path in before if before[path] != after[path]}
    folder = "arms/delta/clips/wave"
    made = [f"{folder}/{name}" for name in ("adapter.safetensors", "latents.safetensors", "result.json", "video.mp4")]
    assert changed == {*made, "comparisons/wave.mp4"}
    assert live.exists() and not any(path.exists() for path in left)
    read_window(result.parent / "video.mp4", frames=TOTAL, fps=24, height=HEIGHT, width=WIDTH)


@pytest.mark.parametrize("shared", ["captions", "latents", "references"])
def test_damaged_shared_files_are_made_again(lab, undisturbed, finished, shared):
    for path in (lab.root / finished / "shared" / shared).iterdir():
        path.write_bytes(path.read_bytes()[:40])
    (lab.root / finished / "arms/full/clips/ball/result.json").unlink()
    assert lab.run(finished) == 0
    assert lab.results(finished) == undisturbed
    if shared == "references":
        before = lab.read("undisturbed", "shared", "references", "ball.json")
        assert lab.read(finished, "shared", "references", "ball.json") == before


@pytest.mark.parametrize(
    ("override", "clip", "arm", "difference"),
    [
        ("arms.delta.lr=0.2", "ball", "delta", "method.lr: was 0.1, now 0.2"),
        ("arms.full.kind=lora", "ball", "full", 'method.kind: was "full", now "lora"'),
        ("sampler.steps=3", "ball", "baseline", "protocol.sampler.steps: was 2, now 3"),
        ("seed=1", "ball", "baseline", "protocol.seed: was 0, now 1"),
        ("window.scored_from=12", "ball", "baseline", "protocol.window.scored_from: was null, now 12"),
        ("data.height=24", "ball", "baseline", "protocol.size: was [16, 24], now [24, 24]"),
        ("model.dtype=bfloat16", "ball", "baseline", 'protocol.dtype: was "float32", now "bfloat16"'),
        ("adaptation.draws=3", "ball", "full", "adaptation.draws: was 2, now 3"),
        ("prompt.aesthetic=null", "ball", "baseline", "protocol.prompt.aesthetic: was 7.0, now null"),
    ],
)
def test_other_settings_are_refused_by_name(lab, undisturbed, capsys, monkeypatch, override, clip, arm, difference):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    folder = lab.root / "undisturbed"
    before, recipe = written(folder), (folder / "recipe.yaml").read_text()
    assert lab.run("undisturbed", override) == 2
    sentence = one_sentence(capsys)
    assert sentence == (
        f"error: {folder}: the result of clip {clip} in arm {arm} was made under other settings ({difference}); "
        "choose another output_dir, or remove that arm's folder to make it again"
    )
    assert written(folder) == before
    assert (folder / "recipe.yaml").read_text() == recipe


def test_another_caption_is_refused(lab, undisturbed, capsys):
    captions = lab.root / "captions.txt"
    captions.write_text("wave: Water.\n")
    assert lab.run("undisturbed", f"data.captions={captions}") == 2
    assert '(caption: was "Wave.", now "Water.")' in one_sentence(capsys)


def test_another_start_is_refused(lab, undisturbed, capsys):
    manifest = lab.root / "list.csv"
    manifest.write_text(f"path,start\n{lab.root}/clips/ball.mp4,0.1\n")
    settings = {**lab.settings["data"], "clips": str(manifest)}
    make_clip(lab.root / "clips" / "ball.mp4", seed=0)
    ball = lab.result("undisturbed", "baseline", "ball")
    assert ball["start"] == 0.0
    manifest.write_text(f"id,path,start\nball,{lab.root}/clips/ball.mp4,0.1\n")
    assert lab.run("undisturbed", data=settings) == 2
    assert "(start: was 0.0, now 0.1)" in one_sentence(capsys)


def test_other_paths_are_a_warning_that_names_them(lab, finished, capsys):
    folder = lab.root / finished
    (folder / "choices.json").write_text(json.dumps(lab.read(finished, "choices.json") | {"torch": "2.0"}))
    assert lab.run(finished) == 0
    assert one_sentence(capsys) == (
        f"warning: earlier results in {folder} took other paths, so bits may differ "
        f'(torch: was "2.0", now "{torch.__version__}")'
    )


def test_other_weights_are_refused(lab, finished, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(lab.root / "vae", lab.root / "other vae", dirs_exist_ok=True)
    state = load_file(lab.root / "vae/model.safetensors")
    state["decoder.conv_out.bias"][0] += 1
    save_file(state, lab.root / "other vae/model.safetensors")
    assert lab.run(finished, f"model.vae={lab.root / 'other vae'}") == 2
    assert "(protocol.weights.vae: was " in one_sentence(capsys)


def test_an_arm_under_a_new_name_shares_the_baseline(lab, undisturbed, finished):
    before = {path: path.stat().st_mtime_ns for path in (lab.root / finished).rglob("result.json")}
    arms = {"delta_many_draws": DELTA}
    assert lab.run(finished, "adaptation.draws=4", arms=arms) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    other = lab.result(finished, "delta_many_draws", "ball")
    assert other["keys"]["protocol"] == undisturbed["baseline/ball"]["keys"]["protocol"]
    assert other["adaptation"]["losses"] != undisturbed["delta/ball"]["adaptation"]["losses"]
    rows = Path(lab.root, finished, "summary.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows[5:]] == [
        [arm, clip, "done"] for arm in ("baseline", "delta_many_draws") for clip in CLIPS
    ]
