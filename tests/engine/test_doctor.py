import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vidtta.engine import doctor as doctor_module
from vidtta.engine import doctor_weights
from vidtta.engine.doctor import Line, doctor, show
from vidtta.engine.doctor_weights import (
    condition_line,
    freqs_line,
    kind_of,
    mean_line,
    psnr_line,
    weight_lines,
)
from vidtta.engine.errors import UserError
from vidtta.engine.models.checkpoint import open_state
from vidtta.engine.models.rule_weights import fill_by_rule
from vidtta.engine.models.stdit3 import STDiT3, STDiT3Config
from vidtta.engine.models.vae import VAE, VAEConfig

DIT = STDiT3Config(hidden_size=48, depth=1, num_heads=2, caption_channels=16, model_max_length=8)
SMALL_VAE = VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
FREQS = 10000.0 ** (-torch.arange(0, 8, 2) / 8)  # a head of 24 channels, 8 for each axis


def save(folder: Path, model: nn.Module, model_type: str, **changes: Tensor | None) -> Path:
    """A folder in the published layout, its tensors by rule but for `changes`; None leaves one out."""
    fill_by_rule(model)
    config = asdict(model.config)  # type: ignore[arg-type]
    state = {name: value for name, value in {**model.state_dict(), **changes}.items() if value is not None}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    save_file(state, folder / "model.safetensors")
    return folder


def save_dit(folder: Path, **changes: Tensor | None) -> Path:
    return save(folder, STDiT3(DIT), "STDiT3", **changes)


def save_vae(folder: Path, **changes: Tensor | None) -> Path:
    return save(folder, VAE(SMALL_VAE), "OpenSoraVAE_V1_3_Pipline", **changes)


def checks(folder: Path) -> dict[str, Line]:
    return {line.name: line for line in weight_lines(str(folder))}


def failing(lines: dict[str, Line]) -> list[str]:
    return [name for name, line in lines.items() if line.mark == "FAIL"]


# The environment


@pytest.fixture
def bare_caches(tmp_path, monkeypatch):
    """Weights are looked for in empty folders."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.mark.usefixtures("bare_caches")
def test_all_that_is_required_is_here(capsys):
    assert doctor() == 0
    out = capsys.readouterr().out
    lines = {line[20:61].strip(): (line[:18].strip(), line[63:]) for line in out.splitlines()}
    assert lines["torch"][0] == "found" and lines["torch"][1].startswith(torch.__version__)
    for name in ("Python", "numpy (arrays)", "lpips (LPIPS)", "transformers (T5)", "decode h264", "encode libx264"):
        assert lines[name][0] == "found", name
    assert lines["SDPA MATH"][0] == "found"
    assert "16 heads of 72 in bfloat16 on " in lines["SDPA MATH"][1]
    for name, command in (
        ("weights hpcai-tech/OpenSora-STDiT-v4-i2v", "vidtta fetch opensora"),
        ("weights hpcai-tech/OpenSora-VAE-v1.3", "vidtta fetch opensora"),
        ("weights DeepFloyd/t5-v1_1-xxl", "vidtta fetch t5"),
        ("weights of LPIPS", "vidtta fetch lpips"),
        ("weights of RAFT", "vidtta fetch raft"),
    ):
        assert lines[name][0] == "missing (optional)", name
        assert lines[name][1].endswith(f"  ->  {command}"), name
    if not torch.cuda.is_available():
        assert lines["GPU"] == ("missing (optional)", "no GPU: runs on the CPU")
        assert lines["SDPA CUDNN_ATTENTION"][0] == "missing (optional)"
    assert " GB free at " in lines["disk"][1]


def test_whole_weights_in_the_local_cache_are_found_and_cut_ones_are_not(bare_caches):
    for name, kept in (("OpenSora-STDiT-v4-i2v", None), ("OpenSora-VAE-v1.3", -1)):
        repository = bare_caches / "hub" / f"models--hpcai-tech--{name}"
        snapshot = repository / "snapshots" / ("0" * 40)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        save_dit(snapshot)
        file = snapshot / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
    dit, vae = list(doctor_module._weights())[:2]
    assert (dit.mark, dit.detail) == ("found", str(bare_caches / dit.detail))
    assert vae.mark == "missing (optional)"
    assert "model.safetensors is damaged or incomplete" in vae.detail


def test_a_missing_requirement_is_reported_without_a_traceback(tmp_path):
    program = """if True:
        import sys
        from pathlib import Path
        for name in ("torch", "av", "rich"):
            sys.modules[name] = None
        from vidtta.engine.doctor import doctor
        from vidtta.engine.errors import UserError
        status = doctor()
        try:
            doctor(Path("embedded"))
        except UserError as error:
            print(error)
        sys.exit(status)
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    marks = {line[20:61].strip(): line[:18].strip() for line in ran.stdout.splitlines()}
    for name in ("torch", "av (videos)", "decode h264", "encode libx264"):
        assert marks[name] == "missing (required)", name
    assert marks["decode mpeg4"] == "missing (optional)"
    assert marks["numpy (arrays)"] == "found"
    assert 'pip install "torch<2.14,>=2.11"' in ran.stdout.splitlines()[1]
    assert ran.stdout.splitlines()[-1].startswith(
        "--weights needs torch, which is not usable here (not installed); run "
    )


def test_a_back_end_that_ends_its_process_is_named_and_the_others_are_tried(monkeypatch):
    asked = []

    def process(code: str, *names: str) -> tuple[str, str, str]:
        asked.append(names)
        if "EFFICIENT_ATTENTION" in names:
            return "died of SIGILL", json.dumps(["FLASH_ATTENTION", "cpu", ""]) + "\n", ""
        return "", "".join(json.dumps([name, "cpu", "" if name == "MATH" else "no"]) + "\n" for name in names), ""

    monkeypatch.setattr(doctor_module, "_in_another_process", process)
    lines = list(doctor_module._attention())
    assert [(line.name, line.mark) for line in lines] == [
        ("SDPA FLASH_ATTENTION", "found"),
        ("SDPA EFFICIENT_ATTENTION", "missing (optional)"),
        ("SDPA CUDNN_ATTENTION", "missing (optional)"),
        ("SDPA MATH", "found"),
    ]
    assert lines[1].detail == "16 heads of 72 in bfloat16: the process died of SIGILL"
    assert lines[1].get == "export ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
    assert [len(names) for names in asked] == [4, 2]


def test_how_another_process_ended():
    run = doctor_module._in_another_process
    assert run("import sys; print(sys.argv[1])", "a") == ("", "a\n", "")
    assert run("import os; os.kill(os.getpid(), 9)")[0] == "died of SIGKILL"
    assert run("raise SystemExit(3)")[0] == "ended with status 3"


def test_packages_that_do_not_import_say_why(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise OSError('libGL.so.1: cannot open')")
    (tmp_path / "needy_package.py").write_text("import absent_requirement")
    monkeypatch.syspath_prepend(str(tmp_path))

    def look(module: str) -> Line:
        return doctor_module._package(module, "torch", "it", True)

    assert look("broken_package").detail == "does not import: libGL.so.1: cannot open"
    assert look("needy_package").detail == "does not import: No module named 'absent_requirement'"
    assert look("absent.part").detail == "not installed"
    assert look("absent").get == 'pip install "torch<2.14,>=2.11"'
    assert doctor_module._install("unheard-of") == 'pip install "unheard-of"'


def test_optional_things_do_not_change_the_status(capsys):
    for mark, status in (
        ("found", 0),
        ("note", 0),
        ("skipped", 0),
        ("pass", 0),
        ("missing (optional)", 0),
        ("missing (required)", 1),
        ("FAIL", 1),
    ):
        assert show([Line(mark, "a", "b [1, 2]", "c"), Line("found", "d", "e")]) == status
        assert capsys.readouterr().out.splitlines()[0] == f"{mark:18}  {'a':41}  b [1, 2]  ->  c"


def test_a_terminal_gets_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert show([Line("FAIL", "name", "shape [2, 3] " * 6, "vidtta fetch opensora")]) == 1
    out = capsys.readouterr().out
    assert out.count("shape [2, 3]") >= 5  # nothing is read as markup, what is too long goes on in the next line
    assert "vidtta fetch opensora" in out


# Checkpoints


def test_a_fit_transformer_passes_every_check(tmp_path, capsys):
    folder = save_dit(tmp_path / "dit")
    lines = checks(folder)
    assert failing(lines) == []
    assert [line.mark for line in lines.values()] == ["pass"] * 7 + ["skipped"]
    state = STDiT3(DIT).state_dict()
    numbers = sum(value.numel() for value in state.values())
    assert lines["transformer: keys and shapes"].detail == f"{len(state)} tensors, {numbers:,} numbers, {folder}"
    assert lines["transformer: stored dtypes"].detail == f"{len(state)} float32"
    assert lines["transformer: rope.freqs"].detail == "4 values, equal to the formula in float32"
    assert lines["continuation loss"].detail == "needs the autoencoder too: give a folder that holds both"
    assert doctor(folder) == 0
    assert "keys and shapes" in capsys.readouterr().out


def test_norms_are_those_of_the_file(tmp_path):
    weight = torch.zeros(4, 32, 48)
    weight[:, :16] = 2.0  # of a patch's rows the first half is the velocity
    weight[0, 16, 0] = 5.0
    lines = checks(
        save_dit(
            tmp_path / "dit",
            **{
                "final_layer.linear.weight": weight.reshape(128, 48),
                "final_layer.scale_shift_table": torch.ones(2, 48),
                "x_embedder_cond.proj.weight": torch.full((48, 16, 1, 2, 2), 0.5),
                "x_embedder_cond.proj.bias": torch.zeros(48),
            },
        )
    )
    velocity = 2 * math.sqrt(64 * 48)
    assert lines["transformer: final layer"].detail == f"norms: velocity {velocity:.4g}, unused half 5, table 9.798"
    assert lines["transformer: x_embedder_cond"].detail == f"norms: weight {0.5 * math.sqrt(48 * 64):.4g}, bias 0"


@pytest.mark.parametrize(
    ("changes", "failed", "says"),
    [
        ({"t_block.1.bias": None}, "keys and shapes", "1 missing: t_block.1.bias"),
        ({"other.weight": torch.ones(2)}, "keys and shapes", "1 unexpected: other.weight"),
        ({"t_block.1.bias": torch.ones(3)}, "keys and shapes", "t_block.1.bias (found [3], wanted [288])"),
        ({"rope.freqs": FREQS * 1.01}, "rope.freqs", "off by 0.01 of itself"),
        ({"final_layer.linear.weight": torch.zeros(128, 48)}, "final layer", "predicts a constant"),
        *(
            (
                {f"{part}.proj.weight": torch.zeros(48, 16, 1, 2, 2)},
                part,
                "norms: weight 0, bias ",
            )
            for part in ("x_embedder_cond", "x_embedder_cond_mask")
        ),
    ],
)
def test_one_fault_fails_one_check(tmp_path, capsys, changes, failed, says):
    folder = save_dit(tmp_path / "dit", **changes)
    lines = checks(folder)
    assert failing(lines) == [f"transformer: {failed}"]
    assert says in lines[f"transformer: {failed}"].detail
    assert doctor(folder) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_value_that_is_no_number_fails_and_is_named(tmp_path):
    bias = torch.ones(288)
    bias[7] = torch.nan
    lines = checks(save_dit(tmp_path / "dit", **{"t_block.1.bias": bias}))
    assert failing(lines) == ["transformer: keys and shapes", "transformer: finite"]
    assert lines["transformer: finite"].detail == "NaN or infinity in t_block.1.bias"


def test_weights_saved_in_bfloat16_and_behind_a_prefix_pass(tmp_path):
    folder = save_dit(tmp_path / "dit")
    state = {f"module.{name}": value.bfloat16() for name, value in open_state(folder).items()}
    save_file(state, folder / "model.safetensors")
    lines = checks(folder)
    assert failing(lines) == []
    assert lines["transformer: rope.freqs"].detail == "4 values, equal to the formula rounded to bfloat16"
    assert lines["transformer: stored dtypes"].detail == f"{len(state)} bfloat16"


def test_rope_freqs_one_step_of_float32_off_are_the_formula():
    assert freqs_line(FREQS).mark == "pass"
    assert freqs_line(torch.nextafter(FREQS, torch.tensor(2.0))).mark == "pass"
    assert freqs_line(FREQS.bfloat16().float()).detail.endswith("rounded to bfloat16")
    for wrong in (FREQS.half(), FREQS.flip(0), torch.full((4,), torch.nan)):
        assert freqs_line(wrong).mark == "FAIL"
    assert freqs_line(None).mark == "skipped"
    assert condition_line("x_embedder_cond", None, None).mark == "skipped"


@pytest.mark.parametrize(
    ("value", "mark"), [(19.999, "FAIL"), (20.0, "pass"), (33.0, "pass"), (math.nan, "FAIL"), (-math.inf, "FAIL")]
)
def test_the_reconstruction_must_reach_20_db(value, mark):
    assert psnr_line("r", value, "clip").mark == mark


def test_the_mean_loss_must_be_below_that_of_predicting_zero():
    assert mean_line("l", [(1.0, 2.0), (2.5, 2.0)]) == Line("pass", "l, mean", "1.7500, predicting zero 2.0000")
    assert mean_line("l", [(2.0, 2.0)]).mark == "FAIL"
    assert mean_line("l", [(1.0, 2.0), (3.1, 2.0)]).mark == "FAIL"
    assert mean_line("l", [(math.nan, 2.0), (1.0, 2.0)]).mark == "FAIL"


@pytest.fixture
def small_pictures(monkeypatch):
    monkeypatch.setitem(doctor_weights.RUNS_IN, "cpu", (torch.float32, (16, 32)))


def constant_dit(folder: Path, value: float) -> Path:
    """A transformer that predicts `value` everywhere."""
    weights = {"final_layer.linear.weight": torch.zeros(128, 48), "final_layer.linear.bias": torch.full((128,), value)}
    return save_dit(folder, **weights)


def losses(lines: dict[str, Line]) -> dict[str, tuple[float, float]]:
    """The loss and that of predicting zero, by the timestep's line."""
    found = {}
    for name, line in lines.items():
        if name.startswith("continuation loss at"):
            loss, zero = line.detail.split(", predicting zero ")
            found[name] = float(loss), float(zero)
    return found


@pytest.mark.usefixtures("small_pictures")
def test_a_folder_with_both_is_checked_on_a_clip(tmp_path):
    save_vae(tmp_path / "OpenSora-VAE")
    constant_dit(tmp_path / "STDiT", 0.0)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    lines = checks(tmp_path)
    assert lines["autoencoder: keys and shapes"].mark == "pass"
    size = "480x640" if torch.cuda.is_available() else "16x32"
    of = f" dB (baseball-bunt, 17 frames of {size}; at least 20 wanted)"
    assert lines["autoencoder: reconstruction"].detail.endswith(of)
    by_t = losses(lines)
    assert list(by_t) == [f"continuation loss at t = {t}" for t in (91, 182, 273, 364, 455, 545, 636, 727, 818, 909)]
    assert all(loss == zero > 1.0 for loss, zero in by_t.values())
    assert lines["continuation loss, mean"].mark == "FAIL"
    assert failing(lines) == ["transformer: final layer", "autoencoder: reconstruction", "continuation loss, mean"]


def test_the_loss_is_that_of_the_network():
    """Predicting c loses mean((v - c)^2) = mean(v^2) - 2 c mean(v) + c^2, so over c and -c the middle term goes."""
    dit, vae = STDiT3(DIT), VAE(SMALL_VAE)
    fill_by_rule(vae)
    nn.init.zeros_(dit.final_layer.linear.weight)
    by_sign = []
    for value in (3.0, -3.0):
        nn.init.constant_(dit.final_layer.linear.bias, value)
        lines = doctor_weights._continuation("continuation loss", dit, vae, (16, 16))
        by_sign.append(losses({line.name: line for line in lines}))
    plus, minus = by_sign
    assert len(plus) == 10
    for name, (loss, zero) in plus.items():
        assert minus[name][1] == zero
        assert (loss + minus[name][0]) / 2 - zero == pytest.approx(9, abs=2e-4)


def test_an_autoencoder_alone(tmp_path):
    lines = checks(save_vae(tmp_path / "vae", **{"decoder.conv_out.bias": None}))
    assert failing(lines) == ["autoencoder: keys and shapes"]
    assert lines["autoencoder: reconstruction"] == Line("skipped", "autoencoder: reconstruction", "it did not load")
    assert lines["continuation loss"].detail == "needs the transformer too: give a folder that holds both"


@pytest.mark.usefixtures("small_pictures")
def test_what_this_machine_cannot_do_is_skipped(tmp_path, monkeypatch):
    folder = save_vae(tmp_path / "vae")
    monkeypatch.setitem(sys.modules, "av", None)
    line = checks(folder)["autoencoder: reconstruction"]
    assert line.mark == "skipped"
    assert line.detail == "import of av halted; None in sys.modules; see `vidtta doctor`"


def test_the_embedded_weights_pass(capsys):
    assert doctor(Path("embedded")) == 0
    assert "PSNR" in capsys.readouterr().out


def test_where_there_is_nothing_to_check(tmp_path):
    with pytest.raises(UserError, match="is neither a file nor a folder; run `vidtta fetch opensora`"):
        doctor(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds neither a transformer nor an autoencoder of Open-Sora v1\.3; give a"):
        doctor(tmp_path)
    for name in ("a", "b"):
        save_dit(tmp_path / name)
    with pytest.raises(UserError, match=r"holds two folders with a transformer, .+/a and .+/b; name one of them"):
        doctor(tmp_path)
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        doctor(tmp_path)


def test_a_configuration_that_is_not_of_this_model_fails_its_check(tmp_path):
    folder = save_dit(tmp_path / "dit")
    (folder / "config.json").write_text('{"model_type": "STDiT3", "qk_norm": false}')
    line = checks(folder)["transformer: keys and shapes"]
    assert (line.mark, line.detail) == ("FAIL", f"{folder / 'config.json'}: qk_norm must be True, was False")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "STDiT3"}, "dit"),
        ({"hidden_size": 48, "depth": 1}, "dit"),
        ({"model_type": "OpenSoraVAE_V1_3_Pipline"}, "vae"),
        ({"encoder": {}, "decoder": {}}, "vae"),
        ({"ch": 32, "z_channels": 16}, "vae"),
        ({"model_type": "t5", "hidden_size": 4096, "depth": 24}, None),
        ({}, None),
    ],
)
def test_models_are_told_apart_by_their_configuration(config, kind):
    assert kind_of(config) == kind
