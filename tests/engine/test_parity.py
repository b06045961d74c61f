"""The official code's numbers, and that the checker of parity files tells a wrong file from a right one."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity import TOLERANCE, TOLERANCE_BF16, Tensors, check_file, main, read, relative_error

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "parity"
SHARED = Path(__file__).resolve().parents[2] / "../shared/parity"
NAMES = ["dit_t2v", "dit_v2v", "dit_v2v_bf16", "loss_t2v", "loss_v2v", "sample_t2v", "sample_v2v"]
OUTPUTS = {"dit": {"out"}, "loss": {"loss", "g_final", "g_tproj", "grad_norms"}, "sampler": {"out"}}

# Whole files, among them two without a copy here: known frames at both ends with whole windows, and two whole VAE chunks.
ABSENT = pytest.param(SHARED, marks=pytest.mark.skip(reason="the shared parity folder is not beside the checkout"))
WHOLE = sorted(path for path in SHARED.glob("*") if path.suffix in (".json", ".safetensors")) or [ABSENT]


def changed(path: Path, copy: Path, tensors: Tensors | None = None, **meta: str) -> Path:
    """A copy of a parity file with other tensors or metadata."""
    old_tensors, old_meta = read(path)
    save_file(old_tensors | (tensors or {}), copy, metadata=old_meta | meta)
    return copy


@pytest.mark.parametrize("name", NAMES)
def test_our_numbers_are_the_official_ones(name: str):
    errors, tolerance = check_file(FIXTURES / f"{name}.safetensors")
    assert set(errors) == OUTPUTS[read(FIXTURES / f"{name}.safetensors")[1]["kind"]]
    assert tolerance == (2e-2 if "bf16" in name else 1e-4 if "sample" in name else 1e-5)
    assert all(error <= tolerance for error in errors.values()), errors


def test_timestep_transform_is_the_official_one():
    errors, tolerance = check_file(FIXTURES / "timestep_transform.json")
    assert errors["timesteps"] <= tolerance == 1e-5


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_files_kept_outside_the_repository(path: Path):
    errors, tolerance = check_file(path)
    assert all(error <= tolerance for error in errors.values()), errors


def test_tolerances_are_those_that_a_right_implementation_meets():
    assert TOLERANCE == {"timesteps": 1e-5, "dit": 1e-5, "loss": 1e-5, "sampler": 1e-4, "vae": 1e-5}
    assert TOLERANCE_BF16 == 2e-2


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"ours is \[2, 1\], the file's \[2\]"):
        relative_error(torch.zeros(2, 1), torch.zeros(2))


# A tenth of a percent is a hundred times the tolerance, and far too little to be seen in a picture.
def off_by_a_thousandth(tensors: Tensors) -> Tensors:
    out = tensors["out"]
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return {"out": out + 1e-3 * noise / noise.norm() * out.norm()}


def test_a_perturbed_file_fails_and_the_others_still_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors, _ = read(FIXTURES / "dit_t2v.safetensors")
    changed(FIXTURES / "dit_t2v.safetensors", tmp_path / "a_off.safetensors", off_by_a_thousandth(tensors))
    (tmp_path / "b_unreadable.safetensors").write_bytes(b"not a tensor file")
    changed(FIXTURES / "dit_t2v.safetensors", tmp_path / "c_unknown.safetensors", kind="audio")
    changed(
        FIXTURES / "dit_t2v.safetensors",
        tmp_path / "d_wide.safetensors",
        {"out": tensors["out"][..., :-1].contiguous()},
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "e_bare.safetensors")
    (tmp_path / "f_broken.json").write_text("[{")
    shutil.copy(FIXTURES / "timestep_transform.json", tmp_path / "z_right.json")
    (tmp_path / "notes.md").write_text("not a parity file")

    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL a_off.safetensors  (tolerance 1e-05)  out 1.0e-03")
    assert lines[1].startswith("FAIL b_unreadable.safetensors  SafetensorError: ")
    kinds = "kind must be one of ['dit', 'loss', 'sampler', 'vae'], was"
    assert lines[2] == f"FAIL c_unknown.safetensors  ValueError: {kinds} 'audio'"
    assert lines[3].startswith(
        "FAIL d_wide.safetensors  ValueError: ours is [2, 16, 5, 20, 12], the file's [2, 16, 5, 20,"
    )
    assert lines[4] == f"FAIL e_bare.safetensors  ValueError: {kinds} None"
    assert lines[5].startswith("FAIL f_broken.json  JSONDecodeError: ")
    assert lines[6].startswith("ok   z_right.json  (tolerance 1e-05)  timesteps ")
    assert len(lines) == 7


def test_what_is_not_built_fails_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, meta = read(FIXTURES / "sample_v2v.safetensors")
    settings = json.dumps(json.loads(meta["settings"]) | {"initial_image_scale": 2.0})
    sampler = changed(FIXTURES / "sample_v2v.safetensors", tmp_path / "sampler.safetensors", settings=settings)
    vae = changed(FIXTURES.parent / "vae_17.safetensors", tmp_path / "vae.safetensors", micro_frame_size="None")
    assert main([str(sampler), str(vae)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "FAIL sampler.safetensors  ValueError: only an image weight that starts at 1 is built, initial_image_scale is 2.0"
    )
    assert second.startswith("FAIL vae.safetensors  ValueError: only {'micro_frame_size': '17', ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_fails(tmp_path: Path, value: float):
    _, meta = read(FIXTURES / "loss_t2v.safetensors")
    norms = json.loads(meta["grad_norms"])
    norms["x_embedder.proj.bias"] = value
    copy = changed(FIXTURES / "loss_t2v.safetensors", tmp_path / "norms.safetensors", grad_norms=json.dumps(norms))
    assert main([str(copy)]) == 1


def test_a_mask_with_a_gap_keeps_every_valid_token(tmp_path: Path):
    """Where the padding stands changes nothing: the last valid token trades places with one beyond the valid ones."""
    tensors, _ = read(FIXTURES / "dit_v2v.safetensors")
    assert tensors["mask"].tolist() == [[1] * 7 + [0] * 5]
    places = [0, 1, 2, 3, 4, 5, 10, 7, 8, 9, 6, 11]
    moved = {name: tensors[name][:, :, places].contiguous() for name in ("y", "y_null")}
    copy = changed(
        FIXTURES / "dit_v2v.safetensors", tmp_path / "gap.safetensors", moved | {"mask": tensors["mask"][:, places]}
    )
    errors, tolerance = check_file(copy)
    assert errors["out"] <= tolerance


def test_sampler_files_may_hold_a_batch(tmp_path: Path):
    tensors, _ = read(FIXTURES / "sample_t2v.safetensors")
    twice = {name: tensors[name].repeat(2, 1, 1, 1, 1) for name in ("z", "out")}
    copy = changed(FIXTURES / "sample_t2v.safetensors", tmp_path / "batch.safetensors", twice)
    errors, tolerance = check_file(copy)
    assert errors["out"] <= tolerance


def run_as_a_program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["parity", *arguments])
    monkeypatch.delitem(sys.modules, "tests.parity", raising=False)  # runpy warns where it is imported already
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("tests.parity", run_name="__main__")
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run_as_a_program(monkeypatch, str(FIXTURES / "timestep_transform.json")) == 0
    assert capsys.readouterr().out.startswith("ok   timestep_transform.json")
    assert run_as_a_program(monkeypatch, str(tmp_path)) == 1
    assert capsys.readouterr().out.startswith("no .safetensors or .json file to check; usage: ")
    assert run_as_a_program(monkeypatch, str(tmp_path / "absent.safetensors")) == 1
    assert capsys.readouterr().out.startswith("FAIL absent.safetensors  FileNotFoundError: ")
