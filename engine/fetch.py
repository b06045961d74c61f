"""Fetch published weights, once, into the caches that their loaders read: the hub's cache and torch hub's folder.

With prepare/download.py the only module that opens a network connection. Everything else reads these caches and names
the command that fills them.
"""

import contextlib
import http.client
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from .errors import UserError
from .files import sha256_file

What = Literal["opensora", "t5", "lpips", "raft"]

# Repository -> the files taken from it (None: all). T5's list keeps a second copy of its 19 GB, in another format, out.
HUB_REPOSITORIES: dict[str, dict[str, list[str] | None]] = {
    "opensora": {"hpcai-tech/OpenSora-STDiT-v4-i2v": None, "hpcai-tech/OpenSora-VAE-v1.3": None},
    "t5": {
        "DeepFloyd/t5-v1_1-xxl": [
            "config.json",
            "spiece.model",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "pytorch_model*",
        ]
    },
}

# Files of torch hub. The digits before the suffix begin the file's SHA-256.
HUB_FILES: dict[str, str] = {"lpips": "alexnet-owt-7be5be79.pth", "raft": "raft_small_C_T_V2-01064c6d.pth"}


def fetch(what: What, progress: bool = True) -> list[Path]:
    """Fetch one set of weights unless it is there already; return its folders (opensora, t5) or its file (lpips, raft).

    Raises UserError when something cannot be reached or arrives damaged: what, from where, where to put it by hand, and
    the command to repeat.
    """
    if what in HUB_REPOSITORIES:
        with _hub_progress(progress):
            return [_fetch_repository(repository, what) for repository in HUB_REPOSITORIES[what]]
    if what in HUB_FILES:
        return [_fetch_file(what, progress)]
    raise UserError(f"fetch: `{what}` is not known; give one of {', '.join(get_args(What))}.")


def hub_patterns(repository: str) -> list[str] | None:
    """Return the files that make a hub repository complete for us, as patterns; None when all of them do."""
    for repositories in HUB_REPOSITORIES.values():
        if repository in repositories:
            return repositories[repository]
    return None


def torch_hub_file(name: str) -> Path:
    """Return where torch hub keeps the file `name`: $TORCH_HOME/hub/checkpoints. It need not exist."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / name


def verify_hub_file(path: Path) -> None:
    """Raise UserError unless `path` exists and its SHA-256 begins with the digits in its name.

    PyTorch checks a file that it downloads, but not one that it finds.
    """
    what = next((what for what, name in HUB_FILES.items() if name == path.name), None)
    cure = f"run `vidtta fetch {what}`" if what else "fetch it again"
    if not path.is_file():
        raise UserError(f"{path} is missing; {cure}.")
    found, wanted = sha256_file(path), _hash_prefix(path.name)
    if not found.startswith(wanted):
        raise UserError(
            f"{path} is not the published file: its SHA-256 begins with {found[: len(wanted)]}, not {wanted}; {cure}."
        )


def _fetch_repository(repository: str, what: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=hub_patterns(repository)))
    except Exception as error:  # the hub's client raises its own errors, the HTTP library's and the system's
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
        raise UserError(
            f"The hub repository {repository} could not be fetched ({_reason(error)}); connect and repeat "
            f"`vidtta fetch {what}`, or copy {folder} here from a machine where that command succeeded."
        ) from error


def _fetch_file(what: str, progress: bool) -> Path:
    import torch

    name = HUB_FILES[what]
    path = torch_hub_file(name)
    with contextlib.suppress(UserError):
        verify_hub_file(path)
        return path
    url = _file_url(what)
    by_hand = f"connect and repeat `vidtta fetch {what}`, or put the file at {path} by hand"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_hash_prefix(name), progress=progress)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} could not be fetched ({_reason(error)}); {by_hand}.") from error
    except RuntimeError as error:
        raise UserError(
            f"{url} gave a damaged file: its SHA-256 does not begin with {_hash_prefix(name)}; {by_hand}."
        ) from error
    return path


def _file_url(what: str) -> str:
    """Return the address that torchvision itself would download from."""
    from .torchvision_ops import declare_missing_operators

    declare_missing_operators()
    from torchvision.models import AlexNet_Weights
    from torchvision.models.optical_flow import Raft_Small_Weights

    weights = {"lpips": AlexNet_Weights.IMAGENET1K_V1, "raft": Raft_Small_Weights.C_T_V2}
    return weights[what].url


def _hash_prefix(name: str) -> str:
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    assert match, f"{name} carries no hash"
    return match[1]


@contextlib.contextmanager
def _hub_progress(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silenced = not shown and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            enable_progress_bars()


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
