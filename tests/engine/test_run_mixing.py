"""What one table must never mix: settings between shards, videos that were replaced, scores that are missing."""

import shutil

import pytest
import torch
from vidtta.engine import cli

from .tiny_run import CLIPS, make_clip, one_sentence, tiny_lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def test_a_shard_with_other_settings_is_refused(lab, capsys):
    assert lab.run("shards", "--batch-start", "0", "--batch-end", "1") == 0
    assert lab.run("shards", "seed=7", "--batch-start", "1", "--batch-end", "2") == 2
    assert "was made under other settings (protocol.seed: was 0, now 7)" in one_sentence(capsys)
    assert len(lab.results("shards")) == 2  # the baseline and the arm of the first clip alone


def test_a_replaced_video_is_refused(lab, capsys):
    shutil.copytree(lab.root / "clips", lab.root / "changing")
    data = {**lab.settings["data"], "clips": str(lab.root / "changing")}
    assert lab.run("replaced", data=data) == 0
    make_clip(lab.root / "changing" / f"{sorted(CLIPS)[0]}.mp4", seed=99)
    assert lab.run("replaced", data=data) == 2
    assert "was made under other settings (clip: was " in one_sentence(capsys)


def test_lost_files_of_keep_are_made_again(lab):
    assert lab.run("keeps", keep=["video"]) == 0
    before = lab.results("keeps")
    folder = lab.root / "keeps" / "arms" / "delta" / "clips" / sorted(CLIPS)[0]
    assert not (folder / "latents.safetensors").exists()
    assert lab.run("keeps", keep=["video", "latents"]) == 0
    assert (folder / "latents.safetensors").exists()
    assert lab.results("keeps") == before


def test_known_latents_may_be_a_sample_of_the_posterior(lab):
    sample = {**lab.settings["window"], "posterior": "sample"}
    assert lab.run("mode") == lab.run("sample", window=sample) == lab.run("sample again", window=sample) == 0
    assert lab.results("sample") == lab.results("sample again")
    for key, result in lab.results("mode").items():
        assert result["scores"]["psnr"] != lab.results("sample")[key]["scores"]["psnr"]
        assert lab.results("sample")[key]["paths"]["posterior"] == "sample"


def test_the_random_state_of_the_process_does_not_matter(lab):
    torch.manual_seed(1)
    assert lab.run("state") == 0
    torch.manual_seed(2)
    assert lab.run("other state") == 0
    assert lab.results("state") == lab.results("other state")


def test_a_finished_run_still_prints_its_marks(lab, capsys):
    """The second call makes no result and evaluates nothing; what the results are marked with is said all the same."""
    arguments = [word for word in lab.argv("marks") if word != "--quiet"]
    mark = "NOTE: the network predicts worse than zero before adapting (preflight.json)"
    for _ in range(2):
        assert cli.main(arguments) == 0
        assert mark in capsys.readouterr().out
