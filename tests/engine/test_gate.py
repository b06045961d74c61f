"""The gate inside a run: a perfect predictor gives the oracle's benefit, one that says never the baseline's bits."""

import csv
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from vidtta.engine import cli
from vidtta.engine.adaptive import policies
from vidtta.engine.cluster.place import Place
from vidtta.engine.compare import compare_arms, read_results
from vidtta.engine.data.clips import Data, list_clips
from vidtta.engine.data.read import read_clip
from vidtta.engine.gate import SEEN
from vidtta.engine.predictor import NUMBERS, Fitted, Predictor, fitted_settings, frame_features, save_predictor
from vidtta.engine.recipe import load_recipe
from vidtta.engine.run import known_of, prepare

from .tiny_run import DELTA, FPS, FULL, HEIGHT, KNOWN, TOTAL, WIDTH, WINDOW, make_clip, one_sentence, tiny_lab

LORA = {"kind": "lora", "rank": 2, "steps": 2, "lr": 1e-2, "targets": ["attn.qkv", "cross_attn.kv_linear"]}


def constant(value):
    return Predictor([0.0] * 5, [1.0] * 5, [], [0.0] * 5, value, 1.0, 0.0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["keep"] = ["latents"]
        yield lab


def predictor(lab, name, result, value, **fitted):
    """A file that foresees one gain for all clips, for the settings of a result."""
    path = lab.root / f"{name}.json"
    known = {"arm": "a", "settings": fitted_settings(result["settings"]), "videos": [], "groups": []} | fitted
    save_predictor(path, Fitted(constant(value), **known))
    return str(path)


def bits(lab, output, arm, clip="ball"):
    return Path(lab.root, output, "arms", arm, "clips", clip, "latents.safetensors").read_bytes()


@pytest.mark.parametrize("method", [FULL, LORA, DELTA], ids=lambda method: method["kind"])
def test_never_gives_the_baselines_bits_and_always_the_methods(lab, method):
    output = method["kind"]
    assert lab.run(output, arms={"a": method, "b": deepcopy(method)}) == 0
    result = lab.result(output, "a", "ball")
    gate = {
        "a": {"predictor": predictor(lab, f"{output}-no", result, -1.0)},
        "b": {"predictor": predictor(lab, f"{output}-yes", result, 1.0)},
    }
    gated = f"gated {output}"
    assert lab.run(gated, arms={"a": method, "b": deepcopy(method)}, gate=gate) == 0
    for clip in ("ball", "wave"):
        assert bits(lab, gated, "a", clip) == bits(lab, gated, "baseline", clip) == bits(lab, output, "baseline", clip)
        assert bits(lab, gated, "b", clip) == bits(lab, output, "b", clip) != bits(lab, gated, "baseline", clip)
    no, yes = lab.result(gated, "a", "ball"), lab.result(gated, "b", "ball")
    assert (no["gate"]["adapted"], no["gate"]["predicted"], no["adaptation"]["steps"]) == (False, -1.0, 0)
    assert (yes["gate"]["adapted"], yes["gate"]["predicted"]) == (True, 1.0) and yes["adaptation"]["steps"] == 2
    assert "gate" not in lab.result(gated, "baseline", "ball") and "gate" not in result
    # The loss before the first step is the one that the method begins from, and its time and the other features' is counted.
    assert yes["gate"]["features"]["first_loss"] == pytest.approx(yes["adaptation"]["losses"][0], rel=1e-5)
    for one in (no, yes):
        assert 0 < one["gate"]["seconds"] <= one["cost"]["seconds"]["adapt"]
    before = lab.results(gated)
    assert lab.run(gated, arms={"a": method, "b": deepcopy(method)}, gate=gate) == 0  # finished: nothing is made again
    assert lab.results(gated) == before


def test_features_see_the_known_frames_alone(lab):
    """What is foreseen of a clip does not change when the frames to predict do, and is what `vidtta adaptive` fits on."""
    lab.run("plain", arms={"a": FULL})
    gate = {"a": {"predictor": predictor(lab, "one", lab.result("plain", "a", "ball"), 1.0)}}
    clip = list_clips(Data(clips=str(lab.root / "clips"), height=HEIGHT, width=WIDTH), lab.root)[0]
    frames = read_clip(clip, frames=TOTAL, fps=FPS, height=HEIGHT, width=WIDTH)
    found = []
    for name, late in (("as it is", frames), ("changed", frames.clone())):
        if name == "changed":
            late[KNOWN:] = 255 - late[KNOWN:]
        folder = lab.root / name
        write_lossless(folder / "ball.avi", late)
        data = lab.settings["data"] | {"clips": str(folder)}
        assert lab.run(f"features {name}", arms={"a": FULL}, gate=gate, data=data) == 0
        found.append(lab.result(f"features {name}", "a", "ball"))
    assert found[0]["keys"]["clip"] != found[1]["keys"]["clip"]
    assert found[0]["gate"]["features"] == found[1]["gate"]["features"]
    features = found[0]["gate"]["features"]
    assert {name: features[name] for name in NUMBERS[:4]} == frame_features(frames[:KNOWN].numpy())


def write_lossless(path, frames_F3HW):
    """FFV1, so that a change of late frames does not move the early ones."""
    import av

    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames_F3HW.shape[2:], "bgr0"
        for picture in frames_F3HW.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def test_placebos_go_through_the_gate_of_their_arm(lab):
    lab.run("plain", arms={"a": FULL})
    gate = {"a": {"predictor": predictor(lab, "no", lab.result("plain", "a", "ball"), -1.0)}}
    assert lab.run("placebos", "keep=[latents,adapter]", arms={"a": FULL}, gate=gate, placebos=["a"]) == 0
    for arm in ("a", "a-other_clip", "a-random"):
        assert lab.result("placebos", arm, "ball")["gate"]["adapted"] is False
        assert bits(lab, "placebos", arm) == bits(lab, "placebos", "baseline")
    before = lab.results("placebos")
    assert lab.run("placebos", "keep=[latents,adapter]", arms={"a": FULL}, gate=gate, placebos=["a"]) == 0
    assert lab.results("placebos") == before


def test_a_clip_that_the_predictor_was_fitted_on_is_marked(lab):
    lab.run("plain", arms={"a": FULL})
    result = lab.result("plain", "a", "ball")
    gate = {"a": {"predictor": predictor(lab, "seen", result, 1.0, videos=[result["keys"]["clip"]], groups=["x"])}}
    assert lab.run("seen", arms={"a": FULL}, gate=gate) == 0
    assert SEEN in lab.result("seen", "a", "ball")["marks"] and SEEN not in lab.result("seen", "a", "wave")["marks"]


def test_a_predictor_that_does_not_fit_is_refused_before_the_first_clip(lab, capsys):
    lab.run("plain", arms={"a": FULL})
    result = lab.result("plain", "a", "ball")
    gate = {"a": {"predictor": predictor(lab, "fits", result, 1.0)}}
    capsys.readouterr()

    def refused(arms=None, **sections):
        assert lab.run("refused", arms=arms or {"a": FULL}, **({"gate": gate} | sections)) == 2
        assert not (lab.root / "refused" / "arms").exists()
        return one_sentence(capsys)

    said = refused({"a": {**FULL, "lr": 2e-3}})
    assert (
        "gate.a.predictor: " in said and "foresees the gain of other settings (method.lr: was 0.001, now 0.002)" in said
    )
    assert "(protocol.sampler.steps: was 2, now 3)" in refused(sampler={"steps": 3})
    old = json.loads(Path(gate["a"]["predictor"]).read_text()) | {"schema": 1}
    (lab.root / "old.json").write_text(json.dumps(old))
    assert "old.json: has schema 1" in refused(gate={"a": {"predictor": str(lab.root / "old.json")}})
    assert "names 'x', which is no arm that adapts" in refused(gate={"x": {"predictor": "p"}})
    adaptation = lab.settings["adaptation"] | {"reset": "never"}
    assert "needs adaptation.reset to be clip, was never" in refused(adaptation=adaptation)
    search = {"arm": "a", "grid": {"lr": [1e-3]}}
    assert "which search searches" in refused(search=search)
    assert lab.run("seed", arms={"a": FULL}, gate=gate, seed=5) == 0  # another seed is no other setting
    threshold = {"a": {**gate["a"], "threshold": 2.0}}
    capsys.readouterr()
    assert lab.run("seed", arms={"a": FULL}, gate=threshold, seed=5) == 2
    assert "was made under other settings (gate.threshold: was 0.0, now 2.0)" in one_sentence(capsys)


def test_a_perfect_predictor_reaches_the_oracle_on_the_embedded_model(tmp_path, monkeypatch):
    """Real runs: adapt to every clip, take its gain as what is foreseen of it, and let the gate choose."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    names = [make_clip(tmp_path / "clips" / f"c{k}.mp4", seed=k).name for k in range(3)]
    with (tmp_path / "clips.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([("path", "class"), *((f"clips/{name}", name) for name in names)])
    lora = {"kind": "lora", "rank": 4, "alpha": 4.0, "steps": 2, "lr": 3e-2}
    recipe = {
        "base": "demo_base",
        "data": {"clips": "clips.csv", "limit": None, "height": 32, "width": 48},
        "window": WINDOW,
    }
    recipe |= {"sampler": {"steps": 2}, "keep": [], "arms": {"lora": lora}, "model": {"device": "cpu"}}
    recipe["adaptation"] = {"context_latents": 2, "draws": 2}

    def run(output, **sections):
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": output} | sections))
        assert cli.main(["run", "recipe.yaml", "--quiet"]) == 0
        (row,) = compare_arms({Path(output): read_results(Path(output))})
        return {clip: values[0] for clip, values in (row.pairs.differences("psnr") or {}).items()}, row.pairs

    try:
        gains, pairs = run("always")
        values = np.array(list(gains.values()))
        threshold = float(np.median(values))  # so that some clips lie on either side, whatever the weights
        foreseen = {f"{clip.removeprefix('clips-')}.mp4": gain for clip, gain in gains.items()}
        perfect = Predictor([0.0] * 5, [1.0] * 5, list(foreseen), [0.0] * 5 + list(foreseen.values()), 0.0, 1.0, 0.0)
        settings = fitted_settings(next(iter(pairs.treated.values()))["settings"])
        save_predictor(Path("perfect.json"), Fitted(perfect, "lora", settings, [], []))
        gated, _ = run("oracle", gate={"lora": {"predictor": "perfect.json", "threshold": threshold}})
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert gated == {clip: gain if gain > threshold else 0.0 for clip, gain in gains.items()}
    assert sum(value != 0 for value in gated.values()) == 1
    # With the threshold taken off each gain, the policy that a perfect predictor gives is the oracle's.
    shifted = values - threshold
    assert policies(shifted, shifted)["selective"] == policies(shifted, shifted)["oracle"]
    chosen = np.array([value != 0 for value in gated.values()])
    assert (shifted * chosen).mean() == pytest.approx(policies(shifted, shifted)["oracle"]["benefit"])


def test_what_is_read_back_lies_as_what_was_made(lab):
    """On a CPU some operations round by the address of their input: stored latents and captions are copied out of their files."""
    session = prepare(load_recipe(lab.argv("aligned", arms={"a": FULL})[1]), None, None, Place())
    clip = session.clips[0]
    for _ in ("made", "read"):
        known = known_of(session, session.captions([clip], lambda *done: None), clip)
        assert known.latents.data_ptr() % 64 == 0 == known.prompt.embedding.data_ptr() % 64
