import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vidtta.engine.errors import UserError
from vidtta.engine.fetch import hub_patterns
from vidtta.engine.models.checkpoint import load_strict, open_state, read_config, resolve_source, state_hash

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([0.5, -2.0]), "scale": torch.tensor(3.0)}


class Small(nn.Module):
    """A linear layer, a persistent 0-dimensional buffer, and a buffer that belongs to no file."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        self.a = nn.Linear(3, 2, dtype=dtype, device=device)
        self.register_buffer("scale", torch.zeros((), dtype=dtype, device=device))
        self.register_buffer("table", torch.zeros(4, device=device), persistent=False)


def assert_is_state(found: dict[str, Tensor]) -> None:
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def write_shards(folder: Path, save: Callable, suffix: str, base: str) -> None:
    weight_map = {name: f"{base}-{i}{suffix}" for i, name in enumerate(STATE)}
    for name, shard in weight_map.items():
        save({name: STATE[name]}, folder / shard)
    (folder / f"{base}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Every layout that is published or that training programs write


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_weight_file(tmp_path, name):
    (save_file if name.endswith(".safetensors") else torch.save)(STATE, tmp_path / name)
    assert_is_state(open_state(tmp_path))
    assert_is_state(open_state(tmp_path / name))


def test_safetensors_go_before_a_pickle_beside_them(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert_is_state(open_state(tmp_path))


def test_sharded_folders(tmp_path):
    for folder, save, suffix, base in [
        ("s", save_file, ".safetensors", "model"),
        ("b", torch.save, ".bin", "pytorch_model"),
    ]:
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, save, suffix, base)
        assert_is_state(open_state(tmp_path / folder))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"ema": s},
        lambda s: {"model": {"state_dict": s}},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_files_and_their_wrappings(tmp_path, wrap, zipped):
    torch.save(wrap(STATE), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert_is_state(open_state(tmp_path / "x.pth"))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of mapped files is Linux's")
def test_tensors_are_mapped_and_writing_them_leaves_the_file_alone(tmp_path, name):
    path = tmp_path / name
    (save_file if name.endswith(".safetensors") else torch.save)(STATE, path)
    before = path.read_bytes()
    state = open_state(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    state["a.bias"].fill_(7)
    assert path.read_bytes() == before


# What is refused, and how it is said


REFUSED = "is not a plain tensor file and was not loaded; give a file of tensors alone, best as .safetensors"


class Attack:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, zipped):
    witness = tmp_path / "ran"
    torch.save({**STATE, "b": Attack(f"touch {witness}")}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"^{re.escape(f'{tmp_path}/x.pth {REFUSED}.')}$"):
        open_state(tmp_path / "x.pth")
    assert not witness.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)  # the attack is real: the careless loader runs it
    assert witness.exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, 2], "it holds no named tensors"),
        ({}, "it holds no named tensors"),
        ({"a": torch.ones(1), "lr": 0.1}, "1 not a named tensor: lr"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, value, says):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(UserError, match=re.escape(f"x.pt {REFUSED} ({says}).")):
        open_state(tmp_path / "x.pt")


def test_two_sets_of_weights_are_not_chosen_between(tmp_path):
    torch.save({"ema": STATE, "model": STATE}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds several sets of weights \(ema, model\)"):
        open_state(tmp_path / "x.pth")


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_truncated_files_are_refused_in_one_sentence(tmp_path, kept):
    for name, save, says in [
        (
            "x.safetensors",
            save_file,
            r"x\.safetensors is damaged or incomplete and was not loaded \(.+\); fetch it again\.$",
        ),
        (
            "x.pth",
            torch.save,
            rf"x\.pth {re.escape(REFUSED)}\.$",
        ),
    ]:
        save(STATE, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
        with pytest.raises(UserError, match=says) as caught:
            open_state(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, save_file, ".safetensors", "model")
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"lacks the shard model-1\.safetensors that model\.safetensors\.index\.json names"
    ):
        open_state(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "..", "sub/x.safetensors", "..\\x.safetensors", ""]
)
def test_an_index_cannot_leave_its_folder(tmp_path, shard):
    folder = tmp_path / "weights"
    (folder / "sub").mkdir(parents=True)
    for target in (tmp_path / "secret.safetensors", folder / "sub" / "x.safetensors"):
        save_file(STATE, target)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    with pytest.raises(UserError, match=re.escape(f"names the shard `{shard}`; a shard must be a plain file name")):
        open_state(folder)


def test_a_tensor_that_no_shard_holds_is_named(tmp_path):
    write_shards(tmp_path, save_file, ".safetensors", "model")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model-0.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="1 named by the index but in no shard: ghost; fetch the weights again"):
        open_state(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        open_state(tmp_path)


def test_folders_and_files_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"holds no weights; expected one of model\.safetensors"):
        open_state(tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        open_state(tmp_path / "absent.pth")
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"has the suffix `\.ckpt`"):
        open_state(tmp_path / "x.ckpt")


def test_config(tmp_path):
    with pytest.raises(
        UserError, match=r"config\.json is missing; give a folder that holds config\.json beside the weights"
    ):
        read_config(tmp_path)
    for text, says in [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a JSON list"),
        (b"\xff", "cannot be read as JSON"),
    ]:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=says):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"depth": 28}')
    assert read_config(tmp_path) == {"depth": 28}


# Where weights are looked for


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_an_existing_path_is_taken_as_it_is(tmp_path, monkeypatch):
    assert resolve_source(str(tmp_path), "run it") == tmp_path
    (tmp_path / "x.pth").write_bytes(b"")
    assert resolve_source(str(tmp_path / "x.pth"), "run it") == tmp_path / "x.pth"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/x.pth", "run it") == tmp_path / "x.pth"


def test_a_hub_id_is_found_in_the_local_cache(hub_cache):
    commit = "0123456789" * 4
    snapshot = hub_cache / "models--team--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (hub_cache / "models--team--model" / "refs").mkdir()
    (hub_cache / "models--team--model" / "refs" / "main").write_text(commit)
    assert resolve_source("team/model", "vidtta fetch opensora") == snapshot


def test_only_the_files_that_fetch_takes_must_be_in_the_cache(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or "/snapshot")
    assert resolve_source("DeepFloyd/t5-v1_1-xxl", "vidtta fetch t5") == Path("/snapshot")
    patterns = hub_patterns("DeepFloyd/t5-v1_1-xxl")
    assert asked == [(("DeepFloyd/t5-v1_1-xxl",), {"local_files_only": True, "allow_patterns": patterns})]


@pytest.mark.parametrize("source", ["team/model", "no/such/folder", "./weights", "", "a--b/..c"])
def test_a_source_that_is_nowhere_names_itself_and_the_command(hub_cache, source, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was tried"))
    with pytest.raises(
        UserError,
        match=rf"^`{re.escape(source)}` is neither a .+; run `vidtta fetch opensora`, or give the path of a copy.*\.$",
    ):
        resolve_source(source, "vidtta fetch opensora")


# Loading


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_cast_into_the_same_storage(device, dtype):
    module = Small(dtype, device)
    pointers = {name: value.data_ptr() for name, value in module.state_dict().items()}
    parameters = list(module.parameters())
    load_strict(module, {f"module.{name}": value for name, value in STATE.items()}, "x.pth")
    assert {name: value.data_ptr() for name, value in module.state_dict().items()} == pointers
    assert all(new is old for new, old in zip(module.parameters(), parameters, strict=True))
    for name, value in module.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value.cpu(), STATE[name].to(dtype))
    assert all(parameter.requires_grad for parameter in parameters)


def test_a_meta_module_takes_the_values_themselves():
    module = Small(torch.bfloat16, "meta")
    module.a.bias.requires_grad_(False)
    load_strict(module, STATE, "x.pth")
    assert all(torch.equal(value, STATE[name].bfloat16()) for name, value in module.state_dict().items())
    assert isinstance(module.a.weight, nn.Parameter)
    assert (module.a.weight.requires_grad, module.a.bias.requires_grad) == (True, False)
    assert "scale" in dict(module.named_buffers())
    assert module.get_buffer("table").is_meta
    same = Small(torch.float32, "meta")
    load_strict(same, STATE, "x.pth")
    assert same.a.weight.data_ptr() == STATE["a.weight"].data_ptr()


def test_a_prefix_that_the_module_owns_is_kept():
    outer = nn.ModuleDict({"module": nn.Linear(1, 1)})
    load_strict(outer, {"module.weight": torch.ones(1, 1), "module.bias": torch.ones(1)}, "x.pth")
    assert outer.state_dict()["module.weight"].item() == 1
    with pytest.raises(UserError, match=r"^x\.pth holds scale twice"):
        load_strict(Small(), {**STATE, "module.scale": torch.ones(())}, "x.pth")


def test_misfits_are_listed_together_and_nothing_is_loaded():
    module = Small()
    before = state_hash(module)
    state = {"a.weight": torch.ones(2, 4), **{f"extra.{i}": torch.ones(1) for i in range(10)}}
    expected = (
        "dit.pth does not fit Small, use weights of this architecture: 2 missing: scale, a.bias; "
        "10 unexpected: extra.0, extra.1, extra.2, extra.3, extra.4, extra.5, extra.6, extra.7 and 2 more; "
        "1 of another shape: a.weight (found [2, 4], wanted [2, 3])."
    )
    with pytest.raises(UserError) as caught:
        load_strict(module, state, "dit.pth")
    assert str(caught.value) == expected
    assert state_hash(module) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(bad):
    with pytest.raises(UserError, match=r"^x.pth: a.bias holds NaN or infinity as float32; the file is damaged"):
        load_strict(Small(), {**STATE, "a.bias": torch.tensor([0.0, bad])}, "x.pth")


def test_a_value_that_overflows_the_module_dtype_is_named():
    with pytest.raises(UserError, match=r"^x.pth: a.bias holds NaN or infinity as float16"):
        load_strict(Small(torch.float16), {**STATE, "a.bias": torch.tensor([0.0, 1e6])}, "x.pth")


def test_a_state_may_hold_empty_and_whole_number_tensors():
    module = nn.Module()
    module.register_buffer("none", torch.ones(0, 4))
    module.register_buffer("count", torch.tensor(3))
    load_strict(module, {"none": torch.ones(0, 4), "count": torch.tensor(5)}, "x.pth")
    assert module.get_buffer("count").item() == 5
    assert state_hash(module) == state_hash(module)


# Fingerprint


def loaded(dtype: torch.dtype = torch.float32) -> Small:
    module = Small(dtype)
    load_strict(module, STATE, "x.pth")
    return module


def test_the_hash_is_the_documented_one_and_stays_the_same_from_run_to_run():
    digest = hashlib.sha256()
    for name, value in sorted(STATE.items()):
        digest.update(f"{name} float32 {list(value.shape)}\n".encode() + value.numpy().tobytes())
    assert state_hash(loaded()) == digest.hexdigest()
    assert state_hash(loaded()) == "f818337bee33d34ca2174c17f6a2c00a91fd714686418f88434fd4ecefd539c8"
    assert state_hash(loaded(torch.bfloat16)) == "c1a988d664e0c90de43e7edb0be32aa1101a24e6c1acb9156c33c834a9f6b9dd"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_flipped_bit_anywhere_changes_the_hash(device, dtype):
    module = loaded(dtype).to(device)
    before = state_hash(module)
    assert before == state_hash(loaded(dtype))
    for value in module.state_dict().values():
        low_byte = value.reshape(-1).view(torch.uint8)[:1]
        low_byte ^= 1
        assert state_hash(module) != before
        low_byte ^= 1
        assert state_hash(module) == before


def test_the_hash_sees_sign_of_zero_dtype_and_shape_but_not_strides_or_transient_buffers():
    module = loaded()
    before = state_hash(module)
    module.get_buffer("table").fill_(5)
    module.a.weight.data = module.a.weight.data.T.contiguous().T
    assert state_hash(module) == before
    values = [torch.zeros(2, 3), -torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)]
    hashes = set()
    for value in values:
        module = nn.Module()
        module.register_buffer("a", value)
        hashes.add(state_hash(module))
    assert len(hashes) == len(values)
