"""Where the files of a T5 checkpoint lie: in a directory, or in the local cache of the hub."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..models.checkpoint import resolve_source

DEFAULT_T5 = "DeepFloyd/t5-v1_1-xxl"
TOKENIZER_FILES = ["tokenizer.json", "spiece.model"]
"""Either is enough."""
WEIGHT_FILES = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
]
"""The first that exists is read, which is the order of the loading library too."""
SETTING_FILES = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
"""Read by the tokenizer where present."""


@dataclass(frozen=True)
class T5Files:
    """The files that are read for one source."""

    folder: Path
    weights: list[Path]
    described_by: list[Path]
    """config.json, the tokenizer's files and the index of the weights, as far as there are such."""
    commit: str | None
    """The revision for a hub id, None for a directory."""


def _first(folder: Path, names: list[str], source: str, what: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"text encoder {source}: {folder} lacks {what} ({' or '.join(names)}); complete it, or run vidtta fetch t5"
    )


def find_t5_files(source: str) -> T5Files:
    """The files of a directory or hub id. Raises UserError naming the first one that is missing; downloads nothing."""
    folder = resolve_source(source, "vidtta fetch t5")
    described_by = [
        _first(folder, ["config.json"], source, "the model's settings"),
        *(folder / name for name in TOKENIZER_FILES + SETTING_FILES if (folder / name).is_file()),
    ]
    _first(folder, TOKENIZER_FILES, source, "the tokenizer")
    weights = [_first(folder, WEIGHT_FILES, source, "the weights")]
    if weights[0].name.endswith(".index.json"):
        described_by += weights
        names = json.loads(weights[0].read_text(encoding="utf-8"))["weight_map"].values()
        weights = [_first(folder, [name], source, "a part of the weights") for name in sorted(set(names))]
    is_local = Path(source).expanduser().exists()
    return T5Files(folder, weights, described_by, commit=None if is_local else folder.name)
