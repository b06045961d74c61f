"""A run from end to end: what it writes, that its numbers are right, and that nothing but the recipe decides them."""

import csv
import hashlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vidtta.engine import session as session_module
from vidtta.engine import start as start_module
from vidtta.engine.data.video import read_window, to_model
from vidtta.engine.environment import describe_code
from vidtta.engine.metrics.complexity import compute_complexity
from vidtta.engine.metrics.score import score_frames, score_motion
from vidtta.engine.models.checkpoint import state_hash
from vidtta.engine.models.load import load_dit, load_vae
from vidtta.engine.recipe import load_recipe
from vidtta.engine.rundir import RunDirectory
from vidtta.engine.text import cache

from .tiny_run import CLIPS, DELTA, FULL, HEIGHT, KNOWN, TOTAL, WIDTH, tiny_lab

ARMS = {"full": FULL, "delta": DELTA}
UNTRAINED_TEXT = "untrained text: captions are looked up in a table filled by a fixed rule"
WORSE_THAN_ZERO = "the network predicts worse than zero before adapting (preflight.json)"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def first(lab):
    """A run of three arms on two clips; the fixture's value is its folder."""
    weights = sorted(lab.root.glob("*/model.safetensors"))
    before = [path.read_bytes() for path in weights]
    assert lab.run("first", arms=ARMS) == 0
    assert len(before) == 2
    assert [path.read_bytes() for path in weights] == before
    return lab.root / "first"


def vae_of(lab):
    return load_vae(str(lab.root / "vae"), CPU, torch.float32)


def psnr_by_hand(pred, truth):
    """In dB, a frame; both uint8-like arrays in 0 .. 255 of shape [F, 3, H, W]."""
    error = ((pred.astype(np.float64) / 255 - truth.astype(np.float64) / 255) ** 2).mean(axis=(1, 2, 3))
    return (-10 * np.log10(error)).tolist()


def played(path):
    """Frames and their size, as a player decodes them."""
    with av.open(str(path)) as container:
        return [(frame.height, frame.width) for frame in container.decode(video=0)]


def statuses(lab, output):
    with (lab.root / output / "summary.csv").open() as handle:
        return {(row["arm"], row["clip"]): row["status"] for row in csv.DictReader(handle)}


def test_a_result_says_what_was_done(lab, first):
    result = lab.result("first", "full", "ball")
    assert list(result) == [
        *(
            "clip",
            "arm",
            "caption",
            "start",
            "meta",
            "marks",
            "warnings",
            "retries",
            "keys",
            "settings",
            "seeds",
            "window",
            "paths",
        ),
        *("adapted_on", "made_from", "generated", "adaptation", "scores", "cost", "checksum"),
    ]
    named = {key: result[key] for key in ("clip", "arm", "caption", "start")}
    assert named == {"clip": "ball", "arm": "full", "caption": "Ball.", "start": 0.0}
    assert result["adapted_on"] == {"ball": result["keys"]["clip"]}
    baseline = lab.result("first", "baseline", "ball")
    assert list(result["made_from"]) == ["scored frames", "known latents", "caption", "noise", "sampler"]
    assert result["made_from"] == baseline["made_from"] and result["generated"] != baseline["generated"]
    assert result["made_from"]["scored frames"] == hashlib.sha256(lab.frames("ball")[10:].numpy().tobytes()).hexdigest()
    assert result["marks"] == [UNTRAINED_TEXT, WORSE_THAN_ZERO]
    assert result["warnings"] == ["24x16 lies outside the sizes v1.3 was trained at (360p, 720p)"]
    assert result["window"] == {
        "known_frames": 10,
        "encoded_frames": 9,
        "known_latents": 3,
        "model_frames": 17,
        "latent_frames": 5,
        "scored": [11, 15],
    }
    seeds = {"recipe": 0}
    for purpose in ("adaptation", "sampling", "known frames"):
        digest = hashlib.sha256(f"0\0ball\0{purpose}\x000".encode()).digest()
        seeds[purpose] = int.from_bytes(digest[:8], "big") >> 1
    assert result["seeds"] == seeds
    assert result["paths"] == {
        "device": result["paths"]["device"],
        "dtype": "float32",
        "deterministic": True,
        "threads": 1,
        "vidtta": describe_code(),
        "torch": torch.__version__,
        "training": "plain",
        "features": "plain",
        "sampling": "plain",
        "vae": "plain",
        "attention": "torch scaled_dot_product_attention",
        "why": dict.fromkeys(("training", "features", "sampling", "vae"), "auto on a CPU")
        | {"attention": "auto without measuring"},
        "posterior": "mode",
    }
    assert result["paths"]["device"].startswith("cpu (")
    adaptation = result["adaptation"]
    assert adaptation["steps"] == 2
    assert [len(adaptation[key]) for key in ("losses", "zero_losses", "gradient_norms")] == [2, 2, 2]
    assert adaptation["change"]["changed"] == pytest.approx(adaptation["change"]["trained"], rel=0.1)
    assert adaptation["change"]["master"] == adaptation["change"]["effective"] > 0
    assert list(result["cost"]["seconds"]) == ["read", "encode", "adapt", "sample", "decode", "score"]
    assert all(value >= 0 for value in result["cost"]["seconds"].values())
    assert result["scores"]["lpips"]["mean"] is None
    assert "vidtta fetch lpips" in result["scores"]["lpips"]["reason"]
    baseline = lab.result("first", "baseline", "ball")
    assert baseline["adaptation"] == {
        "steps": 0,
        "losses": [],
        "zero_losses": [],
        "gradient_norms": [],
        "penalties": [],
        "held_out": [],
        "kept_step": None,
        "change": {"master": 0.0, "effective": 0.0, "changed": 0, "trained": 0},
        "ways": {},
    }


def test_keys_tell_what_may_be_compared(lab, first):
    full, baseline = lab.result("first", "full", "ball"), lab.result("first", "baseline", "ball")
    other = lab.result("first", "full", "wave")
    assert full["keys"]["protocol"] == baseline["keys"]["protocol"] == other["keys"]["protocol"]
    assert full["settings"]["protocol"] == baseline["settings"]["protocol"]
    assert full["keys"]["settings"] == other["keys"]["settings"] != baseline["keys"]["settings"]
    assert full["keys"]["clip"] == baseline["keys"]["clip"] != other["keys"]["clip"]
    assert full["settings"]["method"]["lr"] == 1e-3
    assert full["settings"]["adaptation"]["context_latents"] == 2
    assert baseline["settings"]["method"] == {"kind": "none"}
    assert "adaptation" not in baseline["settings"]
    weights = {"dit": load_dit(str(lab.root / "dit"), CPU, torch.float32), "vae": vae_of(lab)}
    assert full["settings"]["protocol"]["weights"] == {name: state_hash(model) for name, model in weights.items()}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("arm", ["baseline", *ARMS])
def test_scores_are_of_the_decoded_tensors_and_not_of_the_file(lab, first, arm, clip):
    folder = first / "arms" / arm / "clips" / clip
    latents = load_file(folder / "latents.safetensors")["latents"]
    assert latents.shape == (1, 16, 5, HEIGHT // 8, WIDTH // 8)
    pixels = vae_of(lab).decode(latents, range(KNOWN, TOTAL))[0].float()
    truth = to_model(lab.frames(clip))[:, KNOWN:]
    scores = lab.result("first", arm, clip)["scores"]
    assert scores | score_frames(pixels, truth, lpips=None, lpips_reason=scores["lpips"]["reason"]) == scores
    last = to_model(lab.frames(clip))[:, KNOWN - 1 : KNOWN]
    moving = score_motion(torch.cat([last, pixels], 1), torch.cat([last, truth], 1), chunk_seams=[], flow="none")
    assert scores | moving == scores and "seam_error" in moving
    unit = (pixels.clamp(-1, 1).transpose(0, 1).numpy() + 1) / 2 * 255
    by_hand = psnr_by_hand(unit, lab.frames(clip)[KNOWN:].numpy())
    assert scores["psnr"]["frames"] == pytest.approx(by_hand, abs=1e-4)
    assert scores["psnr"]["mean"] == pytest.approx(np.mean(by_hand), abs=1e-4)
    assert len(scores["ssim"]["frames"]) == len(scores["mse"]["frames"]) == TOTAL - KNOWN
    video = read_window(folder / "video.mp4", frames=TOTAL, fps=24, height=HEIGHT, width=WIDTH)
    of_file = psnr_by_hand(video[KNOWN:].numpy(), lab.frames(clip)[KNOWN:].numpy())
    assert np.abs(np.subtract(of_file, by_hand)).max() > 1e-3  # so the comparison above tells the two apart


def test_arms_differ_and_baseline_and_adapted_start_from_the_same_noise(lab, first):
    latents = [load_file(first / f"arms/{a}/clips/ball/latents.safetensors")["latents"] for a in ("baseline", *ARMS)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        difference = (latents[a] - latents[b]).std() / latents[a].std()
        assert 0 < difference < 0.9  # of independent noise it would be 1.4


def test_known_latents_have_seen_no_later_frame(lab, first):
    (path,) = (first / "shared/latents").glob("ball-*.safetensors")
    expected = vae_of(lab).encode(to_model(lab.frames("ball"))[None, :, :9])
    assert torch.equal(load_file(path)["latents"], expected)


@pytest.mark.parametrize("clip", CLIPS)
def test_references(lab, first, clip):
    scores = lab.read("first", "shared", "references", f"{clip}.json")["scores"]
    frames = lab.frames(clip).numpy()
    held = np.broadcast_to(frames[KNOWN - 1], frames[KNOWN:].shape)
    assert scores["copy_last_frame"]["psnr"]["frames"] == pytest.approx(psnr_by_hand(held, frames[KNOWN:]), abs=1e-4)
    vae, pixels = vae_of(lab), to_model(lab.frames(clip))
    held_to_17 = torch.cat([pixels, pixels[:, -1:], pixels[:, -1:]], dim=1)
    rebuilt = vae.decode(vae.encode(held_to_17[None]), range(KNOWN, TOTAL))[0]
    unit = (rebuilt.clamp(-1, 1).transpose(0, 1).numpy() + 1) / 2 * 255
    assert scores["vae_ceiling"]["psnr"]["frames"] == pytest.approx(psnr_by_hand(unit, frames[KNOWN:]), abs=1e-4)


def test_the_summary_has_every_clip_of_every_arm_and_reference(lab, first):
    with (first / "summary.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    arms = ("copy last frame", "VAE ceiling", "baseline", "full", "delta")
    assert [(row["arm"], row["clip"]) for row in rows] == [(arm, clip) for arm in arms for clip in CLIPS]
    assert {row["status"] for row in rows} == {"done"}
    row, result = rows[6], lab.result("first", "full", "ball")
    assert float(row["psnr"]) == result["scores"]["psnr"]["mean"]
    assert float(row["adapt_seconds"]) == round(result["cost"]["seconds"]["adapt"], 4)
    assert (row["steps"], row["lpips"], row["reason"]) == ("2", "", "")
    reference = lab.read("first", "shared", "references", "wave.json")["scores"]["copy_last_frame"]
    assert float(rows[1]["ssim"]) == reference["ssim"]["mean"]


def test_videos_play(lab, first):
    for clip in CLIPS:
        # Columns of 24 pixels for three arms and the truth, 2 for a line between, labels of 40 above.
        assert played(first / "comparisons" / f"{clip}.mp4") == [(HEIGHT + 40, 4 * WIDTH + 3 * 2)] * TOTAL
    for arm in ("baseline", *ARMS):
        path = first / "arms" / arm / "clips" / "ball" / "video.mp4"
        assert played(path) == [(HEIGHT, WIDTH)] * TOTAL
        given = read_window(path, frames=KNOWN, fps=24, height=HEIGHT, width=WIDTH)
        assert (given.float() - lab.frames("ball")[:KNOWN].float()).abs().mean() < 12


def test_the_real_clip_is_kept_once_beside_the_arms_videos(lab, first):
    for clip in CLIPS:
        content = lab.result("first", "full", clip)["keys"]["clip"]
        (path,) = (first / "shared/truth").glob(f"{clip}-*.mp4")
        assert path == RunDirectory(first).truth(clip, content)
        assert played(path) == [(HEIGHT, WIDTH)] * TOTAL
        shown = read_window(path, frames=TOTAL, fps=24, height=HEIGHT, width=WIDTH)
        assert (shown.float() - lab.frames(clip).float()).abs().mean() < 12
        kind = lab.read("first", "shared", "references", f"{clip}.json")["kind"]
        assert kind == compute_complexity(to_model(lab.frames(clip)))


def test_what_keep_names_and_nothing_more(lab, first):
    def files(folder):
        return sorted(path.name for path in folder.iterdir())

    assert files(first / "arms/full/clips/ball") == [
        *("adapter.safetensors", "latents.safetensors", "result.json", "video.mp4")
    ]
    assert files(first / "arms/baseline/clips/ball") == ["latents.safetensors", "result.json", "video.mp4"]
    adapter = load_file(first / "arms/delta/clips/ball/adapter.safetensors")
    assert adapter["d"].norm().item() == pytest.approx(
        lab.result("first", "delta", "ball")["adaptation"]["change"]["master"]
    )
    assert lab.run("keep nothing", keep=[], arms={"baseline": {"kind": "none"}}, adaptation=None) == 0
    assert files(lab.root / "keep nothing/arms/baseline/clips/ball") == ["result.json"]
    assert not (lab.root / "keep nothing/comparisons").exists()


def test_optical_flow_asked_for_later_is_added_and_raft_without_weights_refused(lab, tmp_path, monkeypatch, capsys):
    def scores(*words):
        assert lab.run("flow", "data.limit=1", *words, arms={"baseline": {"kind": "none"}}, adaptation=None) == 0
        references = lab.read("flow", "shared", "references", "ball.json")["scores"]
        return [lab.result("flow", "baseline", "ball")["scores"], *references.values()]

    assert not any("flow_error_farneback" in found for found in scores())
    for found in scores("scores.flow=farneback"):
        assert found["flow_error_farneback"]["mean"] > 0 and found["warping_error_farneback"]["mean"] > 0
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert lab.run("raft", "scores.flow=raft") == 2
    assert "is missing; run `vidtta fetch raft`" in capsys.readouterr().err


def test_files_may_be_read_by_others(first):
    """As any new file here; safetensors of its own accord writes for the owner alone."""
    plain = first / "plain.txt"
    plain.touch()
    modes = {path.stat().st_mode for path in first.rglob("*") if path.is_file()}
    plain.unlink()
    assert len(modes) == 1


def test_the_run_describes_itself(lab, first):
    recipe = load_recipe(str(first / "recipe.yaml"))
    assert list(recipe.arms) == ["baseline", "full", "delta"]
    assert recipe.output_dir == str(first)
    assert lab.read("first", "choices.json") == lab.result("first", "full", "ball")["paths"]
    environment = lab.read("first", "environment.json")
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()


def test_scores_begin_where_the_window_says(lab):
    """Two chunks of the VAE, the scored frames not the first generated ones, and frames beyond the clip dropped."""
    window = {"total_frames": 18, "known_frames": 10, "model_frames": 33, "scored_from": 16}
    only = {"baseline": {"kind": "none"}}
    assert lab.run("window", "data.limit=1", arms=only, window=window, adaptation=None) == 0
    latents = load_file(lab.root / "window/arms/baseline/clips/ball/latents.safetensors")["latents"]
    assert latents.shape[2] == 10
    pixels = vae_of(lab).decode(latents)[0, :, 15:18].float()
    scores = lab.result("window", "baseline", "ball")["scores"]
    truth = to_model(lab.frames("ball", 18))[:, 15:]
    assert scores | score_frames(pixels, truth, lpips=None, lpips_reason=scores["lpips"]["reason"]) == scores
    held = lab.read("window", "shared", "references", "ball.json")["scores"]["copy_last_frame"]
    frames = lab.frames("ball", 18).numpy()
    assert held["psnr"]["frames"] == pytest.approx(
        psnr_by_hand(np.broadcast_to(frames[9], (3, 3, HEIGHT, WIDTH)), frames[15:]), abs=1e-4
    )
    assert played(lab.root / "window/arms/baseline/clips/ball/video.mp4") == [(HEIGHT, WIDTH)] * 18


def test_neither_shards_nor_order_nor_random_numbers_before_change_a_bit(lab, first, monkeypatch):
    loaded = []
    load = start_module.load_models
    monkeypatch.setattr(start_module, "load_models", lambda settings: loaded.append(load(settings)) or loaded[-1])
    reversed_arms = dict(reversed(ARMS.items()))
    torch.manual_seed(1)
    assert lab.run("shards", "--batch-start", "1", arms=reversed_arms) == 0
    assert statuses(lab, "shards")["full", "wave"] == "done"
    assert statuses(lab, "shards")["full", "ball"] == "missing"
    torch.manual_seed(2)
    Path(lab.root, "shards/arms/full/clips/wave/result.json").unlink()
    assert lab.run("shards", "--batch-end", "1", arms=reversed_arms) == 0
    assert statuses(lab, "shards")["full", "wave"] == "missing"
    assert lab.run("shards", "--batch-start", "1", "--batch-end", "2", arms=reversed_arms) == 0
    assert lab.results("shards") == lab.results("first")
    for path in first.rglob("*.safetensors"):
        ours, theirs = load_file(path), load_file(lab.root / "shards" / path.relative_to(first))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set(statuses(lab, "shards").values()) == {"done"}
    for models in loaded:
        assert state_hash(models.dit) == models.hashes["dit"]
        assert state_hash(models.vae) == models.hashes["vae"]
        assert not any(p.requires_grad or p.grad is not None for p in models.dit.parameters())


def test_placebos(lab, first):
    """One adapts on the next clip of the whole list, whatever the shard; one moves at random as far as the method did."""
    one = {"arms": {"delta": DELTA}, "placebos": ["delta"]}
    assert lab.run("placebos", "--batch-start", "1", **one) == 0
    assert lab.run("placebos", "--batch-end", "1", **one) == 0
    results, without = lab.results("placebos"), lab.results("first")
    arms = ("baseline", "delta", "delta-other_clip", "delta-random")
    assert list(results) == [f"{arm}/{clip}" for arm in arms for clip in CLIPS]
    assert results["delta/ball"] == without["delta/ball"]
    for clip, other in (CLIPS, CLIPS[::-1]):
        on_other, moved = results[f"delta-other_clip/{clip}"], results[f"delta-random/{clip}"]
        assert list(on_other["adapted_on"]) == [other]
        assert on_other["adaptation"] == results[f"delta/{other}"]["adaptation"]
        assert list(moved["adapted_on"]) == [clip]
        adaptation, method = moved["adaptation"], results[f"delta/{clip}"]["adaptation"]
        assert adaptation["losses"] == method["losses"]
        assert adaptation["change"]["master"] == pytest.approx(method["change"]["master"], rel=1e-5)
        assert len({results[f"{arm}/{clip}"]["scores"]["psnr"]["mean"] for arm in arms}) == 4
        assert len({results[f"{arm}/{clip}"]["keys"]["settings"] for arm in arms}) == 4
        assert [results[f"{arm}/{clip}"]["settings"].get("placebo") for arm in arms] == [
            *(None, None, "other_clip", "random")
        ]
    assert set(statuses(lab, "placebos").values()) == {"done"}
    assert len(statuses(lab, "placebos")) == (2 + 4) * 2
    assert played(lab.root / "placebos/comparisons/ball.mp4")[0] == (HEIGHT + 40, 3 * WIDTH + 2 * 2)


def test_equal_prompts_are_encoded_once_and_never_again(lab, monkeypatch):
    encoded = []
    load = session_module.load_text_encoder

    def counted(*args, **settings):
        encoder = load(*args, **settings)
        encode = encoder.encode
        encoder.encode = lambda prompts: encoded.extend(prompts) or encode(prompts)
        return encoder

    def no_t5(source):
        raise AssertionError("T5 is not needed")

    monkeypatch.setattr(session_module, "load_text_encoder", counted)
    monkeypatch.setattr(cache, "find_t5_files", no_t5)
    (lab.root / "captions.txt").write_text("ball: A round thing.\nwave: A round thing.\n")
    settings = {"data": {**lab.settings["data"], "captions": str(lab.root / "captions.txt")}}
    assert lab.run("captions", **settings) == 0
    assert encoded == ["a round thing. the aesthetic score is excellent."]
    assert lab.result("captions", "delta", "ball")["caption"] == "A round thing."
    (stored,) = (lab.root / "captions/shared/captions").iterdir()
    assert load_file(stored)["embedding"].shape == (9, 16)  # eight words and the end

    Path(lab.root, "captions/arms/delta/clips/ball/result.json").unlink()
    assert lab.run("captions", **settings) == 0
    assert len(encoded) == 1
