"""How much work a step is: the bytes that must pass through memory and the flops of its products, declared before it is timed.

Flops are those of matrix products, attention and convolutions, a multiply-add counting two (a test holds them against what
PyTorch's counter sees). Bytes are the least: each weight read once a pass, and for each of a layer's three parts the residual
stream read and written once; what lies between them could stay on the chip, so it is not counted. Nothing is computed again.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..engine.models.stdit3 import STDiT3Config
from ..engine.models.vae import VAE, VAEConfig
from ..kernels.windows import Grid, regions

PARTS = 3  # of a layer: self-attention, cross-attention, MLP
STATES = 8 + 16  # bytes a number: a float32 master and its two moments, each read and written


class Work(NamedTuple):
    """Of one call."""

    bytes: int
    flops: int

    def __add__(self, other: Any) -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, count: int) -> "Work":
        """So many of it."""
        return Work(self.bytes * count, self.flops * count)


def linears(config: STDiT3Config, tokens: int) -> int:
    """Flops of a layer's products with `tokens` rows: qkv, proj, the caption's q and proj, and the MLP."""
    return 2 * tokens * config.hidden_size**2 * (3 + 1 + 1 + 1 + int(2 * config.mlp_ratio))


def self_attention(config: STDiT3Config, samples: int, grid: Grid) -> tuple[int, int]:
    """Flops of a spatial and of a windowed layer's attention."""
    spatial = samples * grid.frames * (grid.rows * grid.cols) ** 2
    windowed = samples * sum(r.down * r.across * (grid.frames * r.height * r.width) ** 2 for r in regions(grid))
    return 4 * spatial * config.hidden_size, 4 * windowed * config.hidden_size


def weights(config: STDiT3Config) -> int:
    """Numbers of the layers' weights that a step reads: all but those of the caption's keys and values."""
    return 2 * config.depth * config.hidden_size**2 * (6 + int(2 * config.mlp_ratio))


def forward(
    config: STDiT3Config, samples: int, grid: Grid, text: int, *, conditioned: bool = True, size: int = 2
) -> Work:
    """One evaluation of the network, the captions' keys and values given. text: tokens of the caption; size: bytes a number."""
    D, N = config.hidden_size, samples * grid.tokens
    spatial, windowed = self_attention(config, samples, grid)
    layers = config.depth * (2 * linears(config, N) + spatial + windowed + 2 * 4 * N * text * D)
    patch = 4 * config.in_channels
    embedded = 2 * N * patch * D * (3 if conditioned else 1) + samples * (2 * 2 * (256 * D + D * D) + 2 * 6 * D * D)
    head = 2 * N * D * 2 * patch
    return Work(size * (weights(config) + stream(config, N)), layers + embedded + head)


def stream(config: STDiT3Config, tokens: int) -> int:
    """Numbers of the residual stream that are read and written in one pass through all layers."""
    return 2 * config.depth * PARTS * 2 * tokens * config.hidden_size


def attention_backward(config: STDiT3Config, samples: int, grid: Grid, text: int, text_trained: bool) -> int:
    """Flops of all attention's backward: four products where the forward has two; two to a caption whose keys are fixed."""
    to_text = 2 * config.depth * 4 * samples * grid.tokens * text * config.hidden_size
    return 2 * config.depth * sum(self_attention(config, samples, grid)) + (2 if text_trained else 1) * to_text


def lora_step(config: STDiT3Config, grid: Grid, text: int, rank: int, size: int = 2) -> Work:
    """A step on low-rank additions to every layer's qkv and proj: no gradient of a frozen weight."""
    once, N, D = forward(config, 1, grid, text, size=size), grid.tokens, config.hidden_size
    through = 2 * config.depth * linears(config, N) + attention_backward(config, 1, grid, text, False)
    low = 2 * config.depth * 3 * 2 * N * rank * ((D + 3 * D) + (D + D))
    trained = 2 * config.depth * rank * 6 * D
    moved = size * (2 * weights(config) + 2 * stream(config, N)) + (STATES + 4) * trained
    return Work(moved, once.flops + through + low + 2 * N * D * 8 * config.in_channels)


def full_step(config: STDiT3Config, grid: Grid, text: int, trained: int, size: int = 2) -> Work:
    """A step on all `trained` numbers, with float32 masters and moments; the captions are projected anew."""
    once, D = forward(config, 1, grid, text, size=size), config.hidden_size
    captions = 2 * (2 * text * (config.caption_channels * D + D * D) + 2 * config.depth * 2 * text * D * 2 * D)
    both = once.flops + captions
    attention = config.depth * (
        sum(self_attention(config, 1, grid)) + 2 * 4 * grid.tokens * text * D
    )  # its forward, which has no weights
    backward = 2 * (both - attention) + attention_backward(config, 1, grid, text, True)
    moved = size * (2 * trained + 2 * stream(config, grid.tokens)) + (STATES + 3 * size) * trained
    return Work(moved, both + backward)


def autoencoder(
    config: VAEConfig, part: Literal["encoder", "decoder"], call: Callable[[VAE], Any], moved: int, size: int = 2
) -> Work:
    """Flops of a call of the VAE, counted while it runs on tensors without storage. moved: numbers that go in and come out."""
    with torch.device("meta"):
        vae = VAE(config).requires_grad_(False)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            call(vae)
    weights = sum(p.numel() for p in vae.get_submodule(part).parameters())
    return Work(size * (moved + weights), counter.get_total_flops())
