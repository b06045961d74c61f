"""Encoded prompts on disk, so that a text encoder is loaded only while some prompt is new."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import sha256_file, sha256_json, write_tensors
from .encoder import EncodedText, TextEncoder, embedded_table, is_embedded
from .t5_files import find_t5_files


def text_key(source: str, *, channels: int, max_length: int, dtype: torch.dtype) -> str:
    """What identifies the embeddings that `load_text_encoder` with these arguments would give.

    A hub id counts by its revision. A directory counts by the SHA-256 of config.json, the tokenizer's files and the
    index of the weights, and by the names and sizes of the weight files: not by their contents, which are too large to
    read each time, so weights changed in place at the same size are not noticed. Neither the device nor the versions of
    the libraries count. Raises UserError where files are missing.
    """
    if is_embedded(source):
        table = embedded_table(source, channels)
        identity = "embedded-1" + (f":{sha256_file(table)}" if table else "")
    else:
        files = find_t5_files(source)
        identity = f"t5:{source}@{files.commit}"
        if files.commit is None:
            identity = "t5:" + sha256_json(
                {
                    "described_by": {path.name: sha256_file(path) for path in files.described_by},
                    "weights": {path.name: path.stat().st_size for path in files.weights},
                }
            )
    return f"{identity}, {channels} channels, {max_length} tokens, {dtype}"


def _cache_path(folder: Path, key: str, prompt: str) -> Path:
    return folder / f"{hashlib.sha256((key + prompt).encode()).hexdigest()}.safetensors"


def _digest(embedding_LC: Tensor) -> str:
    return hashlib.sha256(embedding_LC.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _write(path: Path, text: EncodedText) -> None:
    metadata = {"prompt": text.prompt, "sha256": _digest(text.embedding)}
    write_tensors(path, {"embedding": text.embedding}, metadata)


def _read(path: Path, prompt: str) -> EncodedText | None:
    """The stored result; None where the file is absent, unreadable or damaged."""
    try:
        with safe_open(path, framework="pt") as stored:
            metadata, embedding_LC = stored.metadata() or {}, stored.get_tensor("embedding").clone()
    except (OSError, SafetensorError):
        return None
    whole = metadata.get("prompt") == prompt and metadata.get("sha256") == _digest(embedding_LC)
    return EncodedText(prompt, embedding_LC) if whole else None


def encode_distinct(
    encoder_factory: Callable[[], TextEncoder],
    prompts: list[str],
    folder: Path,
    key: str,
    progress: Callable[[int], None] | None = None,
) -> dict[str, EncodedText]:
    """Every distinct prompt's embedding, from `folder` or else encoded and stored there, one file each, as it is done.

    The encoder is built only where a prompt is missing or its file damaged, and closed afterwards, also on an error.
    key: identifies the encoder (`text_key`). `progress` hears how many prompts this call has encoded.
    """
    results = {prompt: _read(_cache_path(folder, key, prompt), prompt) for prompt in dict.fromkeys(prompts)}
    missing = [prompt for prompt, text in results.items() if text is None]
    if missing:
        encoder = encoder_factory()
        try:
            for done, prompt in enumerate(missing, start=1):
                (text,) = encoder.encode([prompt])
                _write(_cache_path(folder, key, prompt), text)
                results[prompt] = text
                if progress:
                    progress(done)
        finally:
            encoder.close()
    return {prompt: text for prompt, text in results.items() if text is not None}
