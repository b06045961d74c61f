"""Loading the models of a recipe: what comes back, and the one sentence for every way it can go wrong."""

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vidtta.engine.errors import UserError
from vidtta.engine.models.checkpoint import state_hash
from vidtta.engine.models.load import ModelSettings, choose_device, load_models

from .tiny_run import tiny_lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def settings(lab, tmp_path, monkeypatch):
    """Settings whose weights are the test's own copy."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    for name in ("dit", "vae"):
        shutil.copytree(lab.root / name, tmp_path / name)
    return ModelSettings(dit=str(tmp_path / "dit"), vae=str(tmp_path / "vae"), dtype="float32", device="cpu")


def change(folder, **tensors):
    """Replace tensors of a checkpoint; None removes one. Names are written with __ for a dot."""
    path = folder / "model.safetensors"
    state = load_file(path) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in state.items() if value is not None}, path)


def refusal(settings):
    with pytest.raises(UserError) as error:
        load_models(settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_come_frozen_in_their_dtype_and_with_their_fingerprint(settings, tmp_path):
    models = load_models(settings)
    stored = load_file(tmp_path / "dit/model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in models.dit.state_dict().items())
    assert models.marks == ()
    assert models.hashes == {"dit": state_hash(models.dit), "vae": state_hash(models.vae)}
    for model in (models.dit, models.vae):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    half = load_models(replace(settings, dtype="bfloat16"))
    assert {value.dtype for value in half.vae.parameters()} == {torch.bfloat16}
    assert half.hashes["vae"] != models.hashes["vae"]
    change(tmp_path / "vae", decoder__conv_out__bias=torch.tensor([0.1, 0.2, 0.3]))
    again = load_models(settings)
    assert again.hashes["vae"] != models.hashes["vae"]
    assert again.hashes["dit"] == models.hashes["dit"]


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_is_a_setting(settings, deterministic):
    torch.use_deterministic_algorithms(False)
    load_models(replace(settings, deterministic=deterministic))
    assert torch.are_deterministic_algorithms_enabled() == deterministic


def test_float32_is_not_tf32(settings):
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    load_models(settings)
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]


def test_embedded_models_are_trained_and_need_no_leave(settings):
    models = load_models(replace(settings, dit="embedded", vae="embedded", text="embedded"))
    assert models.marks == ()
    assert models.dit.config.hidden_size == 216
    assert models.dit.final_layer.linear.weight.norm() > 1  # it starts at zero


def test_the_embedded_text_fits_the_embedded_transformer_alone(settings):
    other = replace(settings, text="embedded")
    assert refusal(other) == (
        "model.text is embedded, whose table of words was trained for 64 channels and this transformer takes 16; set "
        "model.allow_untrained=true to run on an untrained table, or name a T5 encoder"
    )
    assert load_models(replace(other, allow_untrained=True)).marks == (
        "untrained text: captions are looked up in a table filled by a fixed rule",
    )


def test_weights_that_do_not_fit(settings, tmp_path):
    folder = tmp_path / "dit"
    change(folder, fps_embedder__mlp__0__bias=None)
    assert refusal(settings) == (
        f"{folder} does not fit STDiT3, use weights of this architecture: 1 missing: fps_embedder.mlp.0.bias."
    )
    change(folder, fps_embedder__mlp__0__bias=torch.zeros(3), extra=torch.zeros(1))
    assert refusal(settings) == (
        f"{folder} does not fit STDiT3, use weights of this architecture: 1 unexpected: extra; "
        "1 of another shape: fps_embedder.mlp.0.bias (found [3], wanted [48])."
    )


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), "float32"), (float("-inf"), "float32"), (3.4e38, "bfloat16")]
)
def test_weights_that_are_not_finite(settings, tmp_path, value, dtype):
    change(tmp_path / "vae", decoder__conv_out__bias=torch.tensor([0.0, value, 0.0]))
    assert refusal(replace(settings, dtype=dtype)) == (
        f"{tmp_path}/vae: decoder.conv_out.bias holds NaN or infinity as {dtype}; "
        "the file is damaged or overflows that dtype, use another."
    )


def test_weights_that_never_saw_known_frames(settings, tmp_path):
    shape = load_file(tmp_path / "dit/model.safetensors")["x_embedder_cond.proj.weight"].shape
    change(tmp_path / "dit", x_embedder_cond__proj__weight=torch.zeros(shape))
    assert refusal(settings) == (
        f"model.dit '{tmp_path}/dit' cannot continue a clip: x_embedder_cond.proj.weight is all zero (never trained on "
        "known frames); use the image-and-video-conditioned weights, hpcai-tech/OpenSora-STDiT-v4-i2v"
    )


@pytest.mark.parametrize("part", ["dit", "vae"])
def test_config_json(settings, tmp_path, part):
    config = tmp_path / part / "config.json"
    good = json.loads(config.read_text())
    config.unlink()
    assert refusal(settings) == f"{config} is missing; give a folder that holds config.json beside the weights."
    config.write_text('{"depth": ')
    assert refusal(settings).startswith(f"{config} cannot be read as JSON (")
    config.write_text("[]")
    assert refusal(settings) == f"{config} holds a JSON list; an object was expected, fetch it again."
    config.write_text(json.dumps({**good, "typo": 1}))
    assert refusal(settings).startswith(f"{config}: ") and "typo" in refusal(settings)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("dit", "hidden_size", "48"),
        ("dit", "hidden_size", None),
        ("dit", "num_heads", 0),
        ("dit", "depth", 1.5),
        ("dit", "depth", -1),
        ("vae", "ch", "32"),
        ("vae", "ch_mult", 4),
        ("vae", "ch_mult", []),
        ("vae", "num_res_blocks", None),
    ],
)
def test_values_that_config_json_cannot_have(settings, tmp_path, part, key, value):
    config = tmp_path / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    assert refusal(settings).startswith(f"{config}: ")


def test_a_pickle_that_runs_code_is_not_run(settings, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    (tmp_path / "dit/model.safetensors").unlink()
    weights = tmp_path / "dit/pytorch_model.bin"
    weights.write_bytes(pickle.dumps({"x": Hostile()}, protocol=2))
    refused = (
        f"{weights} is not a plain tensor file and was not loaded; give a file of tensors alone, best as .safetensors."
    )
    assert refusal(settings) == refused
    torch.save({"x": Hostile()}, weights)
    assert refusal(settings) == refused
    assert not (tmp_path / "owned").exists()


def test_sources_that_are_not_there(settings, tmp_path):
    assert refusal(replace(settings, vae=str(tmp_path / "nowhere"))) == (
        f"`{tmp_path}/nowhere` is neither a file nor a folder; run `vidtta fetch opensora`, or give the path of a copy or a "
        "hub id."
    )
    (tmp_path / "dit/model.safetensors").unlink()
    assert refusal(settings).startswith(f"{tmp_path}/dit holds no weights; expected one of model.safetensors, ")
    weights = tmp_path / "vae/model.safetensors"
    assert refusal(replace(settings, dit=str(weights))).startswith(f"{tmp_path}/vae/config.json: unknown fields")


@pytest.mark.parametrize("name", ["model.pth", "ema.pt"])
def test_a_training_programs_file_loads_by_its_folder_or_its_own_path(settings, tmp_path, name):
    published = load_models(settings).hashes
    torch.save({"ema": load_file(tmp_path / "dit/model.safetensors")}, tmp_path / "dit" / name)
    (tmp_path / "dit/model.safetensors").unlink()
    for source in (tmp_path / "dit", tmp_path / "dit" / name):
        assert load_models(replace(settings, dit=str(source))).hashes == published
    torch.save({}, tmp_path / "dit/optimizer.pt")
    assert refusal(settings).startswith(
        f"{tmp_path}/dit holds several weight files; expected one of model.safetensors, "
    )


@pytest.mark.parametrize("name", ["cuda:99", "meta", "mps", "banana", ""])
def test_devices_that_are_not_here(name):
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    with pytest.raises(UserError) as error:
        choose_device(name)
    assert str(error.value) == f"model.device was {name!r}, which is not here; use auto or one of {found}"


def test_devices_that_are_here():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
