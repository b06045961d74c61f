"""PyTorch's attention in the place of flash-attn and xformers, where the official code asks for them and they are not here.

The official code imports both by name. What is installed is used as it is; what is missing, or cannot run on the device, is
replaced by a module of that name that holds the functions the official model calls, and the rows say so.
"""

import importlib
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import empty_module, version_of


def attention(
    q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, scale: float | None = None, causal: bool = False
) -> Tensor:
    """softmax(scale q k^T) v of each head."""
    q, k, v = (t.transpose(1, 2) for t in (q_BNHD, k_BLHD, v_BLHD))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal).transpose(1, 2)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """flash-attn's call, without dropout."""
    assert dropout_p == 0.0, "the official configurations have no dropout"
    return attention(q, k, v, softmax_scale, causal)


class BlockDiagonalMask(NamedTuple):
    """xformers' description of samples laid end to end: their numbers of queries and of keys."""

    queries: list[int]
    keys: list[int]

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None) -> "BlockDiagonalMask":
        return cls(list(q_seqlen), list(q_seqlen if kv_seqlen is None else kv_seqlen))


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: BlockDiagonalMask | None = None, p: float = 0.0
) -> Tensor:
    """xformers' call, without dropout: with a mask, one attention a sample."""
    assert p == 0.0, "the official configurations have no dropout"
    if attn_bias is None:
        return attention(query, key, value)
    q, k, v = query.split(attn_bias.queries, 1), key.split(attn_bias.keys, 1), value.split(attn_bias.keys, 1)
    return torch.cat([attention(*one) for one in zip(q, k, v, strict=True)], dim=1)


def put_in_place(device: torch.device) -> dict[str, str]:
    """Have `flash_attn` and `xformers.ops` importable; returns what each is."""
    found = {}
    flash = _usable("flash_attn", "flash_attn_func", device)
    if flash is None:
        module: Any = sys.modules.get("flash_attn") or empty_module("flash_attn")
        module.flash_attn_func = flash_attn_func
    found["flash-attn"] = flash or "PyTorch's SDPA in its place"
    memory = _usable("xformers.ops", "memory_efficient_attention", device)
    if memory is None:
        _, ops, fmha = (empty_module(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha"))
        ops.memory_efficient_attention, fmha.BlockDiagonalMask = memory_efficient_attention, BlockDiagonalMask
    found["xformers"] = memory or "PyTorch's SDPA in its place"
    return found


def _usable(module: str, function: str, device: torch.device) -> str | None:
    """The version of an installed package that has the function, on a GPU; else None."""
    if device.type != "cuda":
        return None
    try:
        getattr(importlib.import_module(module), function)
    except (
        ImportError,
        AttributeError,
        OSError,
        RuntimeError,
    ):  # built for another torch, or another package of the name
        return None
    return version_of({"flash_attn": "flash-attn", "xformers.ops": "xformers"}[module])
