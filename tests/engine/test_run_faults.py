"""What goes wrong costs one clip or is said in one sentence before the first; what is finished stays."""

import csv
import errno
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from vidtta.engine import cli, records
from vidtta.engine import clip as clip_module
from vidtta.engine import run as run_module
from vidtta.engine.files import write_tensors
from vidtta.engine.methods.full import FullAdapter

from .tiny_run import CLIPS, DELTA, FULL, HEIGHT, NO_HUB, WIDTH, make_clip, one_sentence, tiny_lab

ARMS = {"full": FULL, "delta": DELTA}
BAD = ("broken", "empty", "short", "text")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def undisturbed(lab):
    assert lab.run("undisturbed", arms=ARMS) == 0
    return lab.results("undisturbed")


def failures(lab, output):
    folder = lab.root / output / "arms"
    found = [path.relative_to(folder).parts for path in folder.glob("*/clips/*/failure.json")]
    return {f"{arm}/{clip}": lab.read(output, "arms", arm, "clips", clip, "failure.json") for arm, _, clip, _ in found}


def rows(lab, output):
    with (lab.root / output / "summary.csv").open() as handle:
        return {(row["arm"], row["clip"]): row for row in csv.DictReader(handle)}


def test_bad_clips_fail_alone_and_are_tried_again(lab, capsys):
    folder = lab.root / "bad clips"
    make_clip(folder / "good.mp4", seed=0)
    make_clip(folder / "short.mp4", seed=1, frames=14)
    whole = make_clip(folder / "broken.mp4", seed=2, frames=60).read_bytes()
    (folder / "broken.mp4").write_bytes(whole[: whole.find(b"mdat") + 400])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 50)
    data = {"clips": str(folder), "height": HEIGHT, "width": WIDTH}
    assert lab.run("bad", data=data) == 1
    where = lab.root / "bad/arms/*/clips/*/failure.json"
    assert one_sentence(capsys) == f"results missing: 8; the reasons are in {where}"

    found = failures(lab, "bad")
    assert sorted(found) == [f"{arm}/{clip}" for arm in ("baseline", "delta") for clip in BAD]
    assert all((found[name]["arm"], found[name]["clip"]) == tuple(name.split("/")) for name in found)
    assert {failure["traceback"] for failure in found.values()} == {None}
    reasons = {clip: found[f"delta/{clip}"]["reason"] for clip in BAD}
    assert reasons["empty"] == f"{folder}/empty.mp4: the file is empty; fetch it again or leave it out"
    assert reasons["short"] == (
        f"{folder}/short.mp4: too short: it yields 14 frames at 24 fps from 0 s, and 15 are needed; "
        "take a longer clip or an earlier start"
    )
    assert reasons["text"].startswith(f"{folder}/text.mp4: not a readable video (")
    assert reasons["broken"].startswith(f"{folder}/broken.mp4: damaged after ")
    assert not any("\n" in reason for reason in reasons.values())

    table = rows(lab, "bad")
    assert {key for key in table if table[key]["status"] == "done"} == {
        (arm, "good") for arm in ("copy last frame", "VAE ceiling", "baseline", "delta")
    }
    for clip in BAD:
        assert (table["delta", clip]["status"], table["delta", clip]["reason"]) == ("failed", reasons[clip])
        assert table["VAE ceiling", clip]["status"] == "missing"
    assert [path.name for path in (lab.root / "bad/comparisons").iterdir()] == ["good.mp4"]

    finished = (lab.root / "bad/arms/delta/clips/good/result.json").stat().st_mtime_ns
    make_clip(folder / "short.mp4", seed=1, frames=15)
    assert lab.run("bad", data=data) == 1
    assert capsys.readouterr().err.startswith("results missing: 6; ")
    assert "delta/short" not in failures(lab, "bad")
    assert rows(lab, "bad")["delta", "short"]["status"] == "done"
    assert (lab.root / "bad/arms/delta/clips/good/result.json").stat().st_mtime_ns == finished


def refused(lab, capsys, *words, **sections):
    """The sentence with which a run is refused; nothing may have been written."""
    assert lab.run("refused", *words, **sections) == 2
    assert not (lab.root / "refused").exists()
    return one_sentence(capsys).removeprefix("error: ")


def test_what_concerns_the_whole_run_is_said_before_the_first_clip(lab, capsys):
    (lab.root / "nothing").mkdir(exist_ok=True)
    data, model = lab.settings["data"], {**lab.settings["model"], "allow_untrained": False}
    assert refused(lab, capsys, data={**data, "clips": str(lab.root / "nothing")}).startswith(
        f"data.clips: no video lies below {lab.root}/nothing; "
    )
    assert refused(lab, capsys, "--batch-start", "2") == (
        "--batch-start 2 lies behind the last of 2 clips; take a smaller one"
    )
    assert refused(lab, capsys, sampler={"step": 2}).startswith(
        f"{lab.root}/recipe.yaml: sampler.step: unknown key (perhaps steps); sampler takes "
    )
    assert refused(lab, capsys, scores={"lpips": "required"}) == (
        f"scores.lpips is required, but LPIPS needs AlexNet's weights: {NO_HUB}/hub/checkpoints/"
        "alexnet-owt-7be5be79.pth is missing; run `vidtta fetch lpips`; "
        "or set scores.lpips=allow_missing to leave it empty"
    )
    assert refused(lab, capsys, "model.device=cuda:9") == (
        "model.device was 'cuda:9', which is not here; use auto or one of "
        f"{['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]}"
    )
    lora = {"kind": "lora", "rank": 49, "steps": 2}
    assert refused(lab, capsys, arms={"low_rank": lora}) == (
        "arm low_rank: rank must be at most 48 for attn.qkv, was 49"
    )
    assert refused(lab, capsys, arms={"delta": DELTA, "late": {**lora, "rank": 4, "last_layers": 3}}) == (
        "arm late: last_layers must be at most 2 for this network, was 3"
    )
    assert refused(lab, capsys, model={**model, "allow_untrained": False}).startswith(
        "model.text is embedded, whose table of words was trained for 64 channels and this transformer takes 16; set "
    )
    assert refused(lab, capsys, "data.limit=1", placebos=["delta"]) == (
        "placebos needs a second clip to adapt on, and data.clips has 1; leave placebos out"
    )


def test_a_network_worse_than_predicting_zero_is_refused(lab, capsys):
    """The weights of these tests are one; elsewhere they have leave to be."""
    make_clip(lab.root / "one bad/b.mp4", seed=0)
    (lab.root / "one bad/a.mp4").touch()
    data = {"clips": str(lab.root / "one bad"), "height": HEIGHT, "width": WIDTH}
    write_tensors(lab.root / "table.safetensors", {"table": torch.ones(1025, 16)})
    overrides = ("model.allow_untrained=false", f"model.text=embedded:{lab.root}/table.safetensors")
    assert lab.run("worse", *overrides, data=data) == 2
    levels = lab.read("worse", "preflight.json")["levels"]
    assert [level["t"] for level in levels] == pytest.approx([1000 * k / 11 for k in range(1, 11)])
    loss, zero = (sum(level[key] for level in levels) / 10 for key in ("loss", "zero_loss"))
    assert loss > 2 * zero > 2
    assert one_sentence(capsys).startswith(
        f"error: model.dit predicts worse than zero on clip b before adapting (loss {loss:.4f}, of zero {zero:.4f}): "
    )
    assert lab.results("worse") == {}
    arms = {"baseline": {"kind": "none"}}
    assert lab.run("nothing to learn", *overrides, arms=arms, adaptation=None) == 0


def test_an_output_folder_that_cannot_be(lab, capsys):
    (lab.root / "file").write_text("in the way")
    assert lab.run("file/below") == 2
    assert one_sentence(capsys) == (
        f"error: output_dir {lab.root}/file/below: cannot be written (Not a directory); choose another"
    )
    assert lab.run("clips/runs") == 2
    assert one_sentence(capsys) == (
        f"error: output_dir {lab.root}/clips/runs lies inside data.clips, {lab.root}/clips, "
        "so its videos would be taken for clips; choose another"
    )
    assert not (lab.root / "clips/runs").exists()


def test_an_exception_costs_one_clip_and_the_weights_come_back(lab, undisturbed, monkeypatch, capsys):
    sample = clip_module.sample_continuation

    def fails_after_adapting(experiment, known, adapter, progress):
        if adapter.steps and known.clip_id == "ball":
            raise RuntimeError("boom")
        return sample(experiment, known, adapter, progress)

    monkeypatch.setattr(clip_module, "sample_continuation", fails_after_adapting)
    assert lab.run("boom", arms=ARMS) == 1
    assert one_sentence(capsys).startswith("results missing: 2; ")
    failed = failures(lab, "boom")
    assert sorted(failed) == ["delta/ball", "full/ball"]
    failure = failed["full/ball"]
    assert failure["reason"] == "RuntimeError: boom"
    assert "in fails_after_adapting" in failure["traceback"]
    results = lab.results("boom")
    assert sorted(results) == ["baseline/ball", "baseline/wave", "delta/wave", "full/wave"]
    assert all(results[name] == undisturbed[name] for name in results)
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", NO_HUB)
    assert lab.run("boom", arms=ARMS) == 0
    assert lab.results("boom") == undisturbed
    assert failures(lab, "boom") == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("writer", "overlap"), [("write_video", False), ("write_tensors", False), ("write_video", True)]
)
def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(
    lab, undisturbed, monkeypatch, capsys, writer, overlap, number
):
    monkeypatch.setattr(run_module, "pays", lambda device: overlap)
    output = f"full disk {writer} {overlap} {number}"
    write = getattr(records, writer)

    def full(path, *args):
        if "wave" in path.parts:
            raise OSError(number, os.strerror(number), str(path))
        write(path, *args)

    monkeypatch.setattr(records, writer, full)
    assert lab.run(output, arms={"full": FULL}) == 2
    assert one_sentence(capsys) == (
        f"error: {lab.root / output}: {os.strerror(number)}; free some space and give the same command again"
    )
    assert lab.results(output) == {"baseline/ball": undisturbed["baseline/ball"]}
    assert failures(lab, output) == {}


def test_safetensors_tells_of_a_full_disk_as_the_system_does(tmp_path, monkeypatch):
    message = "Error while serializing: I/O error: No space left on device (os error 28)"

    def full(*args):
        raise SafetensorError(message)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert error.value.errno == errno.ENOSPC
    message = "Error while serializing: something else"
    with pytest.raises(SafetensorError, match="something else"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_step_too_small_for_the_weights_dtype_is_the_clips_failure(lab, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    arms = {"full": {"kind": "full", "steps": 1, "lr": 1e-12}}
    assert lab.run("too small", "model.dtype=bfloat16", "data.limit=1", "keep=[]", arms=arms) == 1
    (failure,) = failures(lab, "too small").values()
    assert (failure["arm"], failure["clip"], failure["traceback"]) == ("full", "ball", None)
    assert failure["reason"].startswith("adapting changed no weight that computes (1 steps moved the masters by ")
    assert failure["reason"].endswith("the learning rate is too small for the weights' dtype; raise lr")
    assert list(lab.results("too small")) == ["baseline/ball"]


def test_diverged_weights_are_the_clips_failure(lab, undisturbed):
    arms = {"full": {"kind": "full", "steps": 3, "lr": 1e30}}
    assert lab.run("diverged", "data.limit=1", arms=arms) == 1
    (failure,) = failures(lab, "diverged").values()
    assert "is not finite at step " in failure["reason"]
    assert lab.results("diverged")["baseline/ball"] == undisturbed["baseline/ball"]


def test_a_method_that_does_not_restore_is_found_out(lab, undisturbed, monkeypatch):
    monkeypatch.setattr(FullAdapter, "restore", lambda self: None)
    with pytest.raises(RuntimeError, match="arm full did not restore the network's weights; its results"):
        lab.run("not restored", arms=ARMS)
    assert sorted(lab.results("not restored")) == ["baseline/ball", "baseline/wave"]
    reasons = {name: failure["reason"] for name, failure in failures(lab, "not restored").items()}
    assert sorted(reasons) == ["full/ball", "full/wave"]
    assert all(reason.startswith("RuntimeError: restoring left ") for reason in reasons.values())


def test_results_of_an_arm_that_changed_more_than_it_trained_are_removed(lab, undisturbed, monkeypatch):
    adapt = FullAdapter.adapt

    def and_more(self, task, on_step):
        self.model.rope.freqs.data[0] += 1  # not trained, so neither `change` nor `restore` knows of it
        return adapt(self, task, on_step)

    monkeypatch.setattr(FullAdapter, "adapt", and_more)
    with pytest.raises(RuntimeError, match="arm full did not restore the network's weights; its results"):
        lab.run("changed more", arms=ARMS)
    assert sorted(lab.results("changed more")) == ["baseline/ball", "baseline/wave"]
    assert failures(lab, "changed more") == {}


def test_a_comparison_that_cannot_be_made_costs_nothing_else(lab, undisturbed, capsys):
    shutil.copytree(lab.root / "undisturbed", lab.root / "no comparison")
    folder = lab.root / "no comparison"
    (folder / "comparisons/ball.mp4").unlink()
    (folder / "arms/full/clips/ball/video.mp4").write_bytes(b"damaged")
    (folder / "summary.csv").unlink()
    argv = [word for word in lab.argv("no comparison", arms=ARMS) if word != "--quiet"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert f"no comparison of ball: {folder}/arms/full/clips/ball/video.mp4: not a readable video" in said
    assert {row["status"] for row in rows(lab, "no comparison").values()} == {"done"}
    assert len(rows(lab, "no comparison")) == 5 * len(CLIPS)
