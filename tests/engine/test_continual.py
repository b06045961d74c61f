"""Weights that carry over from clip to clip, and several samples of one clip."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vidtta.engine.cluster.place import Place
from vidtta.engine.continual import share_stretches
from vidtta.engine.data.clips import Clip
from vidtta.engine.recipe import load_recipe

from .tiny_run import CLIPS, FULL, make_clip, one_sentence, tiny_lab

NEVER = {"context_latents": 2, "draws": 2, "timesteps": "sampler", "reset": "never"}
ONE = {"full": FULL}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        make_clip(lab.root / "clips" / "zebra.mp4", seed=9)
        lab.settings["keep"] = ["latents", "adapter"]
        assert lab.run("episodic", arms=ONE) == 0
        assert lab.run("never", arms=ONE, adaptation=NEVER) == 0
        yield lab


def latents(lab, run, clip):
    return load_file(lab.root / run / f"arms/full/clips/{clip}/latents.safetensors")["latents"]


def test_with_never_the_second_clip_differs_only_through_the_first(lab):
    """The first clip's is the episodic result; the second starts where the first ended."""
    first, second = CLIPS
    assert torch.equal(latents(lab, "never", first), latents(lab, "episodic", first))
    assert not torch.equal(latents(lab, "never", second), latents(lab, "episodic", second))
    result = lab.result("never", "full", second)
    assert list(result["adapted_on"]) == [first, second]
    assert any("continual adaptation" in mark for mark in result["marks"])
    assert not any("continual" in mark for mark in lab.result("never", "baseline", second)["marks"])
    # Alone in the list it is the episodic result: nothing but the first clip made the difference.
    manifest = lab.root / "wave.csv"
    manifest.write_text(f"path,id\nclips/{second}.mp4,{second}\n")
    data = {**lab.settings["data"], "clips": str(manifest)}
    assert lab.run("alone", arms=ONE, adaptation=NEVER, data=data) == 0
    assert torch.equal(latents(lab, "alone", second), latents(lab, "episodic", second))


def test_a_resumed_run_makes_the_state_again_to_the_bit(lab):
    before = latents(lab, "never", "zebra")
    (lab.root / "never/arms/full/clips/zebra/result.json").unlink()
    assert lab.run("never", arms=ONE, adaptation=NEVER) == 0
    assert torch.equal(latents(lab, "never", "zebra"), before)


def test_a_split_that_cuts_through_what_is_carried_is_refused(lab, capsys, monkeypatch):
    capsys.readouterr()

    def refused(*words, reset: str | int = "never", **sections):
        assert lab.run("split", *words, **{"arms": ONE, "adaptation": {**NEVER, "reset": reset}, **sections}) == 2
        assert not (lab.root / "split").exists()
        return one_sentence(capsys)

    said = refused("--batch-start", "2")
    assert (
        "adaptation.reset is never" in said
        and "--batch-start 2 would cut through that; run it as one task from the first" in said
    )
    assert (
        "adaptation.reset is 2" in (said := refused("--batch-start", "1", reset=2))
        and "begin at a multiple of 2" in said
    )
    # At a reset it may be split; each part then has the bits of the whole.
    two = {**NEVER, "reset": 2}
    assert lab.run("parts", "--batch-start", "2", arms=ONE, adaptation=two) == 0
    assert lab.run("parts", "--batch-end", "2", arms=ONE, adaptation=two) == 0
    assert torch.equal(latents(lab, "parts", "wave"), latents(lab, "never", "wave"))
    assert torch.equal(latents(lab, "parts", "zebra"), latents(lab, "episodic", "zebra"))
    assert lab.run("baselines", "--batch-start", "2", arms={"baseline": {"kind": "none"}}, adaptation=None) == 0
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert "and 2 tasks would cut through that; run it as one task" in refused()


def test_tasks_take_whole_stretches(lab):
    recipe = load_recipe(lab.argv("x", arms=ONE, adaptation={**NEVER, "reset": 2})[1])
    clips = [Clip(f"c{k}", Path(f"{k}.mp4"), "") for k in range(7)]
    shares = [[clip.id for clip in share_stretches(recipe, clips, None, None, Place(rank, 2))] for rank in (0, 1)]
    assert shares == [["c0", "c1", "c4", "c5"], ["c2", "c3", "c6"]]
    assert [clip.id for clip in share_stretches(recipe, clips, 2, 5, Place(1, 2))] == ["c4"]
    episodic = load_recipe(lab.argv("x", arms=ONE)[1])
    assert [clip.id for clip in share_stretches(episodic, clips, 1, None, Place(0, 2))] == ["c1", "c3", "c5"]


def test_a_number_resets_after_so_many_clips(lab):
    assert lab.run("two", arms=ONE, adaptation={**NEVER, "reset": 2}) == 0
    assert torch.equal(latents(lab, "two", "wave"), latents(lab, "never", "wave"))
    assert torch.equal(latents(lab, "two", "zebra"), latents(lab, "episodic", "zebra"))
    assert list(lab.result("two", "full", "zebra")["adapted_on"]) == ["zebra"]


def test_placebos_and_closed_forms_need_episodes(lab, capsys):
    assert lab.run("x", arms=ONE, adaptation=NEVER, placebos=["full"]) == 2
    assert "placebos: need adaptation.reset to be clip, was never" in one_sentence(capsys)
    assert lab.run("x", arms={"d": {"kind": "delta_closed_form"}}, adaptation=NEVER) == 2
    assert "so adaptation.reset must be clip, was never" in one_sentence(capsys)


def test_samples_start_from_different_noise_and_the_first_is_what_one_sample_gives(lab):
    assert lab.run("samples", "samples=3", "data.limit=1", arms=ONE) == 0
    result, single = lab.result("samples", "full", "ball"), lab.result("episodic", "full", "ball")
    assert result["generated"] == single["generated"] and result["scores"] == single["scores"]
    values = [sample["psnr"] for sample in result["samples"]]
    assert values[0] == single["scores"]["psnr"]["mean"] and len(set(values)) == 3
    assert "samples" not in single


def test_more_sampling_steps_share_the_protocol_and_give_another_video(lab):
    arms = {"longer": {"kind": "more_sampling", "sampling_steps": 5}}
    assert lab.run("longer", "data.limit=1", arms=arms, adaptation=None) == 0
    longer, plain = lab.result("longer", "longer", "ball"), lab.result("longer", "baseline", "ball")
    assert longer["made_from"] == plain["made_from"] and longer["generated"] != plain["generated"]
    assert longer["adaptation"]["change"]["changed"] == longer["adaptation"]["steps"] == 0
