"""Named seeds: every random draw comes from (recipe seed, clip, purpose, index), so it depends on no order, shard or resume."""

import hashlib

import torch
from torch import Tensor


def seed_for(recipe_seed: int, clip_id: str, purpose: str, index: int = 0) -> int:
    """A 63-bit seed: the first bytes of SHA-256 over the four names."""
    text = f"{recipe_seed}\0{clip_id}\0{purpose}\0{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(recipe_seed: int, clip_id: str, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose. Drawn on the CPU, numbers are the same on every device."""
    return torch.Generator().manual_seed(seed_for(recipe_seed, clip_id, purpose, index))


def normal(shape: tuple[int, ...], recipe_seed: int, clip_id: str, purpose: str, index: int = 0) -> Tensor:
    """Standard normal float32 numbers on the CPU."""
    return torch.randn(shape, generator=generator_for(recipe_seed, clip_id, purpose, index))
