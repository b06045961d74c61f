import hashlib
import re
import urllib.error

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from vidtta.engine import fetch as module
from vidtta.engine.errors import UserError
from vidtta.engine.fetch import fetch, hub_patterns, torch_hub_file, verify_hub_file

CONTENT = b"weights, honestly"
PREFIX = hashlib.sha256(CONTENT).hexdigest()[:8]
NAME = f"raft_small-{PREFIX}.pth"  # a real hash of a small file


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Torch hub's folder, empty and ours."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small file that torch's own downloader can reach without a network, published as the RAFT weights."""
    source = tmp_path / "server" / NAME
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    monkeypatch.setitem(module.HUB_FILES, "raft", NAME)
    monkeypatch.setattr(module, "_file_url", lambda what: source.as_uri())
    return source


def test_torch_hub_names_are_the_ones_torchvision_asks_for():
    for what, name in module.HUB_FILES.items():
        assert module._file_url(what).rsplit("/", 1)[1] == name


def test_a_file_is_downloaded_once_checked_and_found_again(checkpoints, published):
    assert fetch("raft", progress=False) == [checkpoints / NAME] == [torch_hub_file(NAME)]
    assert (checkpoints / NAME).read_bytes() == CONTENT
    published.unlink()  # a second download would fail
    assert fetch("raft", progress=False) == [checkpoints / NAME]


def test_a_damaged_file_in_the_folder_is_replaced(checkpoints, published):
    checkpoints.mkdir(parents=True)
    (checkpoints / NAME).write_bytes(CONTENT[:-1])
    fetch("raft", progress=False)
    assert (checkpoints / NAME).read_bytes() == CONTENT


def test_a_damaged_download_is_refused_and_leaves_nothing(checkpoints, published):
    published.write_bytes(b"something else")
    with pytest.raises(UserError) as caught:
        fetch("raft", progress=False)
    assert str(caught.value) == (
        f"{published.as_uri()} gave a damaged file: its SHA-256 does not begin with {PREFIX}; connect and repeat "
        f"`vidtta fetch raft`, or put the file at {checkpoints / NAME} by hand."
    )
    assert list(checkpoints.iterdir()) == []


@pytest.mark.parametrize("what", ["lpips", "raft"])
def test_offline_the_file_its_place_and_the_command_are_named(checkpoints, monkeypatch, what):
    def no_route(*_, **__):
        raise urllib.error.URLError("[Errno -2] Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", no_route)
    with pytest.raises(UserError) as caught:
        fetch(what, progress=False)
    assert str(caught.value) == (
        f"{module._file_url(what)} could not be fetched (<urlopen error [Errno -2] Name or service not known>); connect "
        f"and repeat `vidtta fetch {what}`, or put the file at {checkpoints / module.HUB_FILES[what]} by hand."
    )
    assert list(checkpoints.iterdir()) == []


def test_verification(tmp_path, monkeypatch):
    path = tmp_path / NAME
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is missing; fetch it again\\.$"):
        verify_hub_file(path)
    path.write_bytes(CONTENT)
    verify_hub_file(path)
    path.write_bytes(b"!" + CONTENT[1:])
    monkeypatch.setitem(module.HUB_FILES, "raft", NAME)
    found = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with pytest.raises(UserError) as caught:
        verify_hub_file(path)
    assert str(caught.value) == (
        f"{path} is not the published file: its SHA-256 begins with {found}, not {PREFIX}; run `vidtta fetch raft`."
    )


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The hub's client, replaced by one that notes what it was asked for and makes an empty folder."""
    calls: list[tuple[str, list[str] | None]] = []

    def snapshot_download(repository, allow_patterns=None):
        calls.append((repository, allow_patterns))
        folder = tmp_path / repository
        folder.mkdir(parents=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_opensora_is_the_conditioned_model_and_its_vae(asked, tmp_path):
    repositories = ["hpcai-tech/OpenSora-STDiT-v4-i2v", "hpcai-tech/OpenSora-VAE-v1.3"]
    assert fetch("opensora") == [tmp_path / repository for repository in repositories]
    assert asked == [(repository, None) for repository in repositories]


def test_t5_is_taken_in_one_format(asked, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    assert fetch("t5") == [tmp_path / "DeepFloyd/t5-v1_1-xxl"]
    [(repository, patterns)] = asked
    assert patterns == hub_patterns(repository)
    needed = ["config.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json"]
    needed += ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    others = ["README.md", ".gitattributes", "model-00001-of-00002.safetensors", "tf_model.h5"]
    assert list(filter_repo_objects(needed + others, allow_patterns=patterns)) == needed


def test_patterns_of_repositories_we_do_not_know():
    assert hub_patterns("someone/mirror") is None


@pytest.mark.parametrize("error", [OSError, RuntimeError, ConnectionError])
def test_an_unreachable_hub_names_repository_folder_and_command(monkeypatch, error):
    def unreachable(*_, **__):
        raise error("Got: ConnectError: [Errno -2] Name or service not known\nAn error happened")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/caches/hub")
    with pytest.raises(UserError) as caught:
        fetch("opensora")
    assert str(caught.value) == (
        "The hub repository hpcai-tech/OpenSora-STDiT-v4-i2v could not be fetched (Got: ConnectError: [Errno -2] Name or "
        "service not known); connect and repeat `vidtta fetch opensora`, or copy "
        "/caches/hub/models--hpcai-tech--OpenSora-STDiT-v4-i2v here from a machine where that command succeeded."
    )


def test_progress_bars_are_silenced_for_the_call_alone(asked, monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled

    seen: list[bool] = []

    def snapshot_download(*_, **__):
        seen.append(are_progress_bars_disabled())
        return ""

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fetch("t5", progress=False)
    fetch("t5", progress=True)
    assert seen == [True, False]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="`vgg` is not known; give one of opensora, t5, lpips, raft"):
        fetch("vgg")  # pyright: ignore[reportArgumentType]
