"""Text encoders: from prompts to the token embeddings that the transformer's cross-attention reads.

L tokens of one prompt, at most the maximal length; C the text width, 4096 for T5 v1.1 XXL.
"""

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from ..models.checkpoint import read_config
from ..torchvision_ops import declare_missing_operators
from .t5_files import DEFAULT_T5, find_t5_files

TABLE_ROWS = 1024  # of the embedded text's table, without the end token's
TRAINED_TABLE = Path(__file__).parents[1] / "models" / "embedded" / "text" / "table.safetensors"


@dataclass(frozen=True, eq=False)
class EncodedText:
    """One prompt after encoding."""

    prompt: str
    embedding: Tensor
    """[L, C], the encoder's dtype, on the CPU: the valid tokens alone, the end token last."""

    @property
    def n_tokens(self) -> int:
        """L, the end token included."""
        return self.embedding.shape[0]


class TextEncoder(Protocol):
    """What turns prompts into embeddings. It may hold a large model until it is closed."""

    def encode(self, prompts: list[str], progress: Callable[[int], None] | None = None) -> list[EncodedText]:
        """One result a prompt, in order; equal prompts run once. `progress` hears how many distinct ones are done."""
        ...

    def close(self) -> None:
        """Free the model and its device memory; `encode` must not be called again."""
        ...


def _encode_distinct(
    encode_one: Callable[[str], Tensor], prompts: list[str], progress: Callable[[int], None] | None
) -> list[EncodedText]:
    encoded = {}
    for prompt in dict.fromkeys(prompts):
        encoded[prompt] = EncodedText(prompt, encode_one(prompt))
        if progress:
            progress(len(encoded))
    return [encoded[prompt] for prompt in prompts]


class T5Text:
    """The encoder half of T5 v1.1, tokenised and run as the published Open-Sora v1.3 does."""

    def __init__(
        self,
        source: str = DEFAULT_T5,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_length: int = 300,
    ) -> None:
        """Load tokenizer and weights from a directory or from the local cache of the hub; nothing is downloaded.

        The published inference runs in float32. Raises UserError where a file or a weight is missing.
        """
        files = find_t5_files(source)
        declare_missing_operators()
        from transformers import AutoTokenizer, T5EncoderModel

        # Through from_pretrained: T5Tokenizer(vocab_file=...) ignores the file and makes every word unknown.
        self._tokenizer = AutoTokenizer.from_pretrained(files.folder, local_files_only=True)
        loaded: Any = T5EncoderModel.from_pretrained(
            files.folder, dtype=dtype, local_files_only=True, weights_only=True, output_loading_info=True
        )
        model, report = loaded
        # transformers fills what is missing with random numbers and merely warns.
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"text encoder {source}: {len(missing)} of the encoder's tensors are not in its weights, the first is "
                f"{missing[0]}; use a complete T5 v1.1 checkpoint (vidtta fetch t5)"
            )
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self._max_length = max_length

    def encode(self, prompts: list[str], progress: Callable[[int], None] | None = None) -> list[EncodedText]:
        """See `TextEncoder`. Prompts run one by one, so a result does not depend on its neighbours."""
        return _encode_distinct(self._encode_one, prompts, progress)

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> Tensor:
        tokens = self._tokenizer(
            [prompt],
            max_length=self._max_length,
            padding="max_length",
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        assert self._model is not None, "encode after close"
        mask_BL = tokens["attention_mask"]
        output = self._model(input_ids=tokens["input_ids"].to(self._device), attention_mask=mask_BL.to(self._device))
        return output.last_hidden_state[0].cpu()[mask_BL[0].bool()]

    def close(self) -> None:
        """Free the model, and give its memory back to the card."""
        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def word_rows(prompt: str, max_length: int) -> list[int]:
    """The rows of the table that a prompt means: crc32(word) mod 1024 for each of its words, and the end token's row, the last."""
    words = re.findall("[a-z0-9']+", prompt.lower())[: max_length - 1]
    return [crc32(word.encode()) % TABLE_ROWS for word in words] + [TABLE_ROWS]


class EmbeddedText:
    """A stand-in for T5 in the embedded default: one table row a word. **Untrained** unless a trained table is given.

    Every word of the lower-cased prompt (letters, digits, apostrophes) is the row crc32(word) mod 1024, and one more
    row ends the text. So prompts of other words differ, and nothing else can be expected of it: the rows mean nothing,
    and some words share one. Without a table the rows are standard normal numbers from NumPy's default generator seeded
    with crc32(b"vidtta.embedded.text").
    """

    def __init__(
        self,
        channels: int,
        max_length: int = 300,
        dtype: torch.dtype = torch.float32,
        table_file: Path | None = None,
    ) -> None:
        """`table_file`: safetensors with key "table", [1025, channels], the end token's row last."""
        if table_file:
            table_RC = _read_table(table_file, channels)
        else:
            generator = np.random.default_rng(crc32(b"vidtta.embedded.text"))
            table_RC = torch.from_numpy(generator.standard_normal((TABLE_ROWS + 1, channels), dtype=np.float32))
        self._table_RC = table_RC.to(dtype)
        self._max_length = max_length

    def encode(self, prompts: list[str], progress: Callable[[int], None] | None = None) -> list[EncodedText]:
        """See `TextEncoder`. A long prompt loses its last words, never the end token."""
        return _encode_distinct(self._encode_one, prompts, progress)

    def _encode_one(self, prompt: str) -> Tensor:
        return self._table_RC[word_rows(prompt, self._max_length)]

    def close(self) -> None:
        """Nothing to free: the table is small and on the CPU."""


def embedded_table(source: str, channels: int) -> Path | None:
    """The PATH of "embedded:PATH"; of "embedded" the trained table of the package, or None where the model takes another width.

    Raises UserError where there is no such file.
    """
    if source == "embedded":
        return TRAINED_TABLE if channels == trained_width() else None
    path = Path(source.removeprefix("embedded:")).expanduser()
    if not path.is_file():
        raise UserError(f"text encoder {source}: there is no such file; give a safetensors file, or embedded alone")
    return path


def trained_width() -> int:
    """Channels of the package's trained table."""
    with safe_open(TRAINED_TABLE, framework="pt") as file:
        return file.get_slice("table").get_shape()[1]


def is_embedded(source: str) -> bool:
    """Whether a recipe's text encoder is "embedded" or "embedded:PATH", rather than T5."""
    return source == "embedded" or source.startswith("embedded:")


def _read_table(path: Path, channels: int) -> Tensor:
    try:
        table_RC = load_file(path)["table"].float()
    except (SafetensorError, KeyError) as error:
        raise UserError(
            f'text encoder embedded:{path}: not a safetensors file with a tensor "table" ({error})'
        ) from None
    if list(table_RC.shape) != [TABLE_ROWS + 1, channels]:
        raise UserError(
            f"text encoder embedded:{path}: the table is {list(table_RC.shape)}; "
            f"this model takes {[TABLE_ROWS + 1, channels]}"
        )
    return table_RC


def load_text_encoder(
    source: str, *, channels: int, max_length: int, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder:
    """The encoder that a recipe names: "embedded" (the package's table, see `embedded_table`), "embedded:PATH", a T5 directory or hub id.

    channels: the width C that the transformer takes. Raises UserError where the encoder's width differs.
    """
    if is_embedded(source):
        return EmbeddedText(channels, max_length, dtype, embedded_table(source, channels))
    width = read_config(find_t5_files(source).folder).get("d_model")
    if width != channels:
        raise UserError(f"text encoder {source}: its width is {width}; this model takes {channels}")
    return T5Text(source, device, dtype, max_length)
