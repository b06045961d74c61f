"""The VAE's encoder and decoder, channels last: norm, SiLU, upsampling and zero padding in one pass between the convolutions.

The same functions as `vae_layers.py`, read from the same modules. cuDNN's convolutions are fastest channels last and without
padding of their own; what lies between them (kernels/norm_silu_pad.py) keeps that order and writes the padding. Where the kernels
cannot run (`triton` False) their references compute the same, and a compiler may fuse them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import norm_silu_pad as kernels
from .vae import VAE
from .vae_layers import (
    Attention,
    CausalConv3d,
    Decoder,
    Encoder,
    Middle,
    Norm,
    ResBlock,
    SpatialDown,
    SpatialUp,
    SpatioTemporalDown,
    SpatioTemporalUp,
)

LAST = torch.channels_last_3d


class ChannelsLast(nn.Module):
    """An encoder or a decoder in the fast order. Holds no weights of its own: `coder` does, and is put channels last in place."""

    coder: Any

    def __init__(self, coder: Encoder | Decoder, triton: bool) -> None:
        super().__init__()
        self.triton = triton
        _lay_out(coder, last=True)
        object.__setattr__(self, "coder", coder)  # not a child: the state dict's keys stay as they are

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x = x_BCTHW.contiguous(memory_format=LAST)
        return self._decode(x) if isinstance(self.coder, Decoder) else self._encode(x)

    def _encode(self, x: Tensor) -> Tensor:
        coder = self.coder
        h = _conv(coder.conv_in, F.pad(x, (1, 1, 1, 1, 2, 0)))
        for level in coder.down:
            for block in level.block:
                h = self._res_block(block, h)
            step = level.downsample
            if isinstance(step, SpatialDown):
                h = _per_frame(step.conv, F.pad(h, (0, 1, 0, 1)), stride=2)
            elif isinstance(step, SpatioTemporalDown):
                h = _conv(step.conv, F.pad(h, (1, 1, 1, 1, 2, 0)))
        h = self._middle(coder.mid, h)
        return _conv(coder.conv_out, self._act(coder.norm_out, h))

    def _decode(self, x: Tensor) -> Tensor:
        coder = self.coder
        h = self._middle(coder.mid, _conv(coder.conv_in, F.pad(x, (1, 1, 1, 1, 2, 0))))
        for level in reversed(coder.up):
            for block in level.block:
                h = self._res_block(block, h)
            step = level.upsample
            if isinstance(step, SpatialUp):
                h = _per_frame(step.conv, self._up(h, 1, 0))
            elif isinstance(step, SpatioTemporalUp):
                up = step.conv3d
                a = self._act(up.norm1, _conv(up.conv1, self._up(h, 2, 2)))
                h = self._act(up.norm2, _conv(up.conv2, a), pad=False, skip=h)
        pixels = F.conv3d(self._act(coder.norm_out, h), coder.conv_out.weight, coder.conv_out.bias)
        return pixels[:, :, 3:]

    def _middle(self, mid: Middle, h: Tensor) -> Tensor:
        return self._res_block(mid.block_2, _attention(mid.attn_1, self._res_block(mid.block_1, h)))

    def _res_block(self, block: ResBlock, x: Tensor) -> Tensor:
        h = _conv(block.conv1, self._act(block.norm1, x))
        h = _conv(block.conv2, self._act(block.norm2, h))
        shortcut = block.nin_shortcut
        return (_conv(shortcut, x) if isinstance(shortcut, CausalConv3d) else x) + h

    def _act(self, norm: Norm, x: Tensor, pad: bool = True, skip: Tensor | None = None) -> Tensor:
        function = kernels.norm_silu_pad if self.triton else kernels.norm_silu_pad_reference
        return function(x, norm.weight, norm.bias, norm.eps, norm.num_groups, pad, skip)

    def _up(self, x: Tensor, time: int, front: int) -> Tensor:
        return (kernels.upsample_pad if self.triton else kernels.upsample_pad_reference)(x, time, front)


def _conv(conv: CausalConv3d, padded: Tensor) -> Tensor:
    """The convolution alone: its input is padded already, in time and around."""
    c = conv.conv
    return F.conv3d(padded, c.weight, c.bias, c.stride).contiguous(memory_format=LAST)


def _per_frame(conv: nn.Conv2d, padded_BCTHW: Tensor, stride: int = 1) -> Tensor:
    """A 2D convolution of every frame, as a 3D one of depth 1: no frame is copied."""
    weight = conv.weight.unsqueeze(2)
    return F.conv3d(padded_BCTHW, weight, conv.bias, (1, stride, stride)).contiguous(memory_format=LAST)


def _attention(attn: Attention, x: Tensor) -> Tensor:
    """As `Attention.forward`; tokens lie one after the other already."""
    h = attn.norm(x).contiguous(memory_format=LAST)
    rows = h.movedim(1, -1).flatten(1, 3)  # [B, N, C]
    q, k, v = (F.linear(rows, c.conv.weight.flatten(1), c.conv.bias).unsqueeze(1) for c in (attn.q, attn.k, attn.v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
    out = F.linear(out, attn.proj_out.conv.weight.flatten(1), attn.proj_out.conv.bias)
    return x + out.unflatten(1, x.shape[2:]).movedim(-1, 1)


def _lay_out(coder: nn.Module, last: bool) -> None:
    """Lay a coder's convolution weights out, channels last or first."""
    orders = {4: torch.channels_last, 5: LAST} if last else {}
    for parameter in coder.parameters():
        order = orders.get(parameter.ndim, torch.contiguous_format)
        parameter.data = parameter.data.contiguous(memory_format=order)


def use_channels_last(
    vae: VAE, triton: bool, compiled: bool = False, compiler: str | Callable[..., Any] = "inductor"
) -> None:
    """Run the VAE in this order from now on; its weights are laid out anew, their values and names stay. compiler: torch.compile's
    back end."""
    for name in ("encoder", "decoder"):
        fast = ChannelsLast(getattr(vae, name), triton)
        run = torch.compile(fast.forward, backend=compiler, dynamic=False, fullgraph=True) if compiled else fast.forward
        vae.fast[name] = run


def use_plain(vae: VAE) -> None:
    """Back to the plain order."""
    vae.fast.clear()
    for coder in (vae.encoder, vae.decoder):
        _lay_out(coder, last=False)
