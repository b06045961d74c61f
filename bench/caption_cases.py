"""Attention to captions, for `bench.kernels`: the known frames to one, the rest to another."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.models.attention import attend_to_few
from ..kernels import caption_attention

if TYPE_CHECKING:
    from .kernel_cases import Case, Sizes

KEYS = 60


def caption_cases(s: "Sizes") -> Iterator["Case"]:
    """Queries alone trained, as under LoRA, and with keys and values, as in full fine-tuning."""
    from .kernel_cases import Case, randn

    for name, B, grid in s.batches:
        N, H, d = grid.tokens, s.heads, s.dim // s.heads
        split = grid.frames // 2 * grid.rows * grid.cols

        def make(
            device: torch.device, dtype: torch.dtype, B: int = B, N: int = N, H: int = H, d: int = d
        ) -> list[Tensor]:
            text = (randn(device, dtype, rows, KEYS, 2, H, d).unbind(2) for rows in (B, 1))
            return [randn(device, dtype, B, N, H, d), *(t for pair in text for t in pair)]

        def reference(*t: Tensor, split: int = split) -> Tensor:
            return caption_attention.caption_attention_reference(*t, split=split)

        def ours(*t: Tensor, split: int = split) -> Tensor:
            return caption_attention.caption_attention(*t, split=split)

        def apart(q: Tensor, k: Tensor, v: Tensor, known_k: Tensor, known_v: Tensor, split: int = split) -> Tensor:
            known_k, known_v = (t.expand(q.shape[0], -1, -1, -1) for t in (known_k, known_v))
            known = attend_to_few(q[:, :split], known_k, known_v, None, "flash")
            return torch.cat([known, attend_to_few(q[:, split:], k, v, None, "flash")], dim=1)

        moved = B * N * H * d
        products = 4 * B * N * KEYS * H * d
        variants = tuple(
            (caption_attention, {name: value}) for name, value in (("EACH", 1), ("EACH", 8), ("STAGES", 1))
        )
        impls: dict[str, Any] = {"triton": ours} | ({"two of flash": apart} if s.dim > 100 else {})
        for kind, trained in (("", (0,)), (" text", (0, 1, 2, 3, 4))):
            if kind and name != s.batches[0][0]:
                continue  # gradients are timed at the first shape alone
            yield Case(
                f"caption_attention{kind}", name, make, reference, impls, (4 * moved, products),
                trained, (6 * moved, 3 * products), truth=torch.float32, variants=variants,
            )  # fmt: skip
