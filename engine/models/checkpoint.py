"""Checkpoint files: find them, open them without running code from them, load them strictly, fingerprint the result.

Layouts read: one .safetensors, .pth, .pt or .bin file, or a folder as the hub publishes it (one weight file, or shards
named by an index), or a folder with a single weight file of any name. Pickled files go through PyTorch's weights-only
loader, which builds tensors and plain containers and nothing else. Tensors are mapped from the file, not copied, wherever
its format allows.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..fetch import hub_patterns

WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
PICKLED = (".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "ema", "model")  # training programs keep the weights under one of these
LISTED = 8  # names shown in an error before "and n more"


def resolve_source(source: str, fetch_command: str) -> Path:
    """Return the file or folder that `source` names: an existing path as it is, else a hub id found in the local cache.

    Never touches the network. Raises UserError, naming `source` and `fetch_command`, when neither is there.
    """
    path = Path(source).expanduser()
    if source and path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(
            f"`{source}` is neither a file nor a folder; run `{fetch_command}`, or give the path of a copy or a hub id."
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, local_files_only=True, allow_patterns=hub_patterns(source)))
    except (ImportError, OSError, ValueError) as error:
        raise UserError(
            f"`{source}` is neither a file or folder nor complete in the local hub cache; run `{fetch_command}`, "
            "or give the path of a copy."
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`/config.json. Raises UserError when it is missing or not a JSON object."""
    return _read_object(path / "config.json")


def open_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file, or of a hub-style folder, by name; on the CPU, in their stored dtype.

    A .pth that wraps its weights in one of "state_dict", "ema", "model" is unwrapped. The tensors may be mapped from
    the file: it must stay as it is while they live, and writing to them does not change it.
    Raises UserError when nothing readable is there, a shard is missing, a file is damaged, or a pickle holds anything
    but tensors.
    """
    if not path.is_dir():
        return _open_file(path)
    for name in WEIGHT_FILES:
        if (path / name).exists():
            return _open_file(path / name)
        if (path / f"{name}.index.json").exists():
            return _open_shards(path / f"{name}.index.json")
    others = [file for file in path.iterdir() if file.suffix in (".safetensors", *PICKLED)]
    if len(others) == 1:
        return _open_file(others[0])
    raise UserError(
        f"{path} holds {'several weight files' if others else 'no weights'}; expected one of {', '.join(WEIGHT_FILES)}, one of "
        "these names + .index.json, or a single .safetensors, .pth, .pt or .bin file."
    )


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], source: str, strip_prefixes: tuple[str, ...] = ("module.",)
) -> None:
    """Copy `state` into the parameters and persistent buffers of `module`, cast to their dtypes, in their storages.

    The names must be exactly the module's own, after one of `strip_prefixes` is taken off names the module lacks.
    A tensor on the meta device has no storage to keep: it is replaced by the value itself, on the CPU, still mapped
    from the file if its dtype is already right. Non-persistent buffers on meta stay there, for the caller to build.
    Raises UserError that lists missing, unexpected and misshapen names, before anything is changed; or that names the
    first tensor with a value that is not finite, when earlier tensors are already loaded.
    """
    wanted = module.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        own = name if name in wanted else _strip(name, strip_prefixes)
        if own in found:
            raise UserError(f"{source} holds {own} twice, with and without a prefix; keep one of them.")
        found[own] = value
    misfits = [
        _listed("missing", [name for name in wanted if name not in found]),
        _listed("unexpected", [name for name in found if name not in wanted]),
        _listed(
            "of another shape",
            [
                f"{name} (found {list(found[name].shape)}, wanted {list(target.shape)})"
                for name, target in wanted.items()
                if name in found and found[name].shape != target.shape
            ],
        ),
    ]
    if any(misfits):
        listing = "; ".join(filter(None, misfits))
        raise UserError(f"{source} does not fit {type(module).__name__}, use weights of this architecture: {listing}.")
    for name, target in wanted.items():
        value = found[name].detach().to(target.dtype)
        if not _is_finite(value):
            raise UserError(
                f"{source}: {name} holds NaN or infinity as {_dtype_name(target)}; "
                "the file is damaged or overflows that dtype, use another."
            )
        if target.is_meta:
            _replace(module, name, value.contiguous())
        else:
            with torch.no_grad():
                target.copy_(value)


def state_hash(module: nn.Module) -> str:
    """SHA-256, in hexadecimal, of the names, dtypes, shapes and bytes of all parameters and persistent buffers.

    Sorted by name, one tensor at a time through the CPU, so the device does not matter and no second copy is held.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {_dtype_name(value)} {list(value.shape)}\n".encode())
        # Viewed as bytes: numpy has no bfloat16.
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _open_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"{path} is not a file; give a .safetensors, .pth, .pt or .bin file, or a folder that holds one."
        )
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLED:
        return _open_pickled(path)
    raise UserError(
        f"{path} has the suffix `{path.suffix}`; weights are read from .safetensors, .pth, .pt and .bin files."
    )


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or incomplete and was not loaded ({_first_line(error)}); fetch it again."
        ) from error


def _open_pickled(path: Path) -> dict[str, Tensor]:
    refusal = (
        f"{path} is not a plain tensor file and was not loaded; give a file of tensors alone, best as .safetensors"
    )
    try:
        # Only the zip format, PyTorch's own since 1.6, can be mapped.
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise UserError(f"{refusal}.") from error
    while isinstance(value, Mapping):
        inside = [key for key in WRAPPERS if isinstance(value.get(key), Mapping)]
        if len(inside) > 1:
            raise UserError(
                f"{path} holds several sets of weights ({', '.join(inside)}); save the one to use in a file of its own."
            )
        if not inside:
            break
        value = value[inside[0]]
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{refusal} (it holds no named tensors).")
    others = [str(key) for key, item in value.items() if not (isinstance(key, str) and isinstance(item, Tensor))]
    if others:
        raise UserError(f"{refusal} ({_listed('not a named tensor', others)}).")
    return dict(value)


def _open_shards(index: Path) -> dict[str, Tensor]:
    shard_of = _read_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UserError(f'{index} is not an index of shards: "weight_map" must map tensor names to file names.')
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        # A plain name, so an index cannot point outside its folder (links there may: the hub's cache is made of them).
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise UserError(f"{index} names the shard `{shard}`; a shard must be a plain file name in the same folder.")
        if not (index.parent / shard).is_file():
            raise UserError(f"{index.parent} lacks the shard {shard} that {index.name} names; fetch the weights again.")
    state: dict[str, Tensor] = {}
    for shard in shards:
        tensors = _open_file(index.parent / shard)
        state |= {name: value for name, value in tensors.items() if shard_of.get(name, shard) == shard}
    absent = [name for name in shard_of if name not in state]
    if absent:
        raise UserError(
            f"{index.parent}: {_listed('named by the index but in no shard', absent)}; fetch the weights again."
        )
    return state


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; give a folder that holds {path.name} beside the weights.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({_first_line(error)}); fetch it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; an object was expected, fetch it again.")
    return value


def _is_finite(value: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity; both show in its extremes, found ten times as fast as by isfinite."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(value)).isfinite().all())


def _strip(name: str, prefixes: Iterable[str]) -> str:
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` where the meta tensor `name` is, as a parameter or as a buffer."""
    owner_name, _, own_name = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if own_name in owner._parameters:
        value = nn.Parameter(value, requires_grad=owner.get_parameter(own_name).requires_grad)
    setattr(owner, own_name, value)


def _listed(what: str, names: list[str]) -> str:
    """ "3 missing: a, b, c", with the first names alone if they are many; empty for none."""
    if not names:
        return ""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}"


def _dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
