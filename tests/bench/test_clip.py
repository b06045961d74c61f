"""Whole-clip rows on a small network, and the quality of the trained small model beside them."""

import pytest
import torch
from vidtta.bench import caching, clip, suite
from vidtta.bench.clip_quality import Quality
from vidtta.bench.step_scene import small_scene
from vidtta.engine.methods.lora import LoRAAdapter
from vidtta.engine.sampler import SamplerSettings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are for the CPU")
CPU = torch.device("cpu")


def row_of(name: str, **changes) -> suite.Row:
    clips = clip.Clips(small_scene(CPU), **({"quality": "not asked for", "small": True} | changes))
    (row,) = suite.run(clip.ROWS, [name], clips, 600)
    return row


def test_a_row_has_phases_memory_path_and_what_is_kept():
    row = row_of("clip lora_last_14 plain", twice=True)
    assert "error" not in row, row
    assert list(row["seconds"]) == ["encode", "adapt", "sample", "decode", "restore"]
    assert row["ms"] == pytest.approx(1e3 * sum(row["seconds"].values())) and row["steps"] == 2
    assert (
        row["same_bits_twice"] and row["path"].startswith("plain PyTorch") and row["quality_absent"] == "not asked for"
    )
    assert set(row["saved_s"]) == {"captions, sampling", "captions, adapting", "layers before the first adapted"}
    taken = row["seconds"]["adapt"] + row["seconds"]["sample"]
    faster = 1 + sum(row["saved_s"].values()) / taken
    assert row["inference_speedup_from_cached_activations"] == pytest.approx(faster) and faster > 1


def test_a_cached_row_says_what_was_reused_and_how_far_it_lies_from_the_exact_path():
    quality = Quality(CPU, torch.float32, clips=1, steps=2, short=True)
    row = row_of("clip none fast, cached every 2", quality=quality)
    assert "error" not in row, row
    # Two layers; at steps 0, 1 and 2 three branches, at step 3 the prompt: of 20 evaluations those of the second layer at 1 and 3.
    assert row["layers"] == {"computed": 16, "reused": 4} and row["layers_reused"] == pytest.approx(0.2)
    assert row["quality_layers_reused"] == pytest.approx(0.25)  # one branch, two steps
    assert 15 < row["psnr_to_exact"] < 60 and row["psnr"] != quality.measure("none", "plain")["psnr"]


def test_the_table_of_the_feature_cache(capsys: pytest.CaptureFixture[str]):
    caching.main(["--check", "--samplers", "demo"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2:5] for row in rows] == [
        ["1", "-", "0%"], ["2", "0", "33%"], ["2", "1", "17%"], ["3", "0", "67%"], ["3", "1", "33%"],
    ]  # fmt: skip
    assert rows[0][5] == "same bits" and all(15 < float(row[5]) < 60 for row in rows[1:])
    assert caching.SAMPLERS["demo"] == SamplerSettings(steps=10, text_guidance=1.0, image_guidance=1.0)


def test_a_row_in_float8_tells_what_quantising_anew_costs():
    row = row_of("clip none float8")
    assert "error" not in row, row
    assert row["seconds"]["quantise"] > 0 and "frozen linears in float8" in row["path"]


def test_a_row_that_leaves_weights_changed_has_no_time(monkeypatch: pytest.MonkeyPatch):
    detach = LoRAAdapter.detach

    def careless(self: LoRAAdapter) -> None:
        self.model.final_layer.linear.bias.data.add_(1.0)
        detach(self)

    monkeypatch.setattr(LoRAAdapter, "detach", careless)
    row = row_of("clip lora plain")
    assert "not bit for bit" in row["error"] and "ms" not in row


def test_quality_stands_beside_cost_and_an_option_that_changes_the_result_is_seen():
    quality = Quality(CPU, torch.float32, clips=1, steps=1, short=True)
    plain = quality.measure("none", "plain")
    assert (
        5 < plain["psnr"] < 40
        and 0 < plain["ssim"] < 1
        and plain["temporal_error"] > 0
        and "psnr_to_exact" not in plain
    )
    same = quality.measure("none", "fast")
    assert same["psnr_to_exact"] > 60 and same["psnr"] == pytest.approx(plain["psnr"], abs=0.01)
    rounded = quality.measure("none", "float8 alone")
    assert 25 < rounded["psnr_to_exact"] < 80 and quality.scene.experiment.dit.float8 is None
    with torch.no_grad():
        quality.scene.experiment.dit.final_layer.linear.weight.mul_(1.05)
    assert quality.measure("none", "fast")["psnr_to_exact"] < 60


def test_quality_that_cannot_be_measured_leaves_the_cost():
    class Broken:
        def measure(self, name: str, path: str) -> None:
            raise OSError("no weights")

    assert clip.quality_of(clip.Clips(small_scene(CPU), Broken()), "none", "plain") == {  # type: ignore[arg-type]
        "quality_absent": "OSError: no weights"
    }
