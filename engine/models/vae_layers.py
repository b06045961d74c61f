"""Layers of Open-Sora v1.3's video VAE, and the encoder and decoder of one chunk of frames.

Module names are those of the published checkpoint, so its state dict loads as it is. `vae.py` adds the chunks and the
normalisation. Every tensor is [B, C, T, H, W] in the weights' dtype. Convolution, norm + SiLU and resampling stand
apart, so that a fused channels-last path can take the place of one of them.

Axes: B samples, C channels, T frames (of pixels, latents or anything between), H rows, W columns, N = T * H * W.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every published GroupNorm


def pad_time(x_BCTHW: Tensor) -> Tensor:
    """Put two zero frames in front, none behind: a time kernel of 3 then sees no later frame."""
    return F.pad(x_BCTHW, (0, 0, 0, 0, 2, 0))


def per_frame(conv: nn.Conv2d, x_BCTHW: Tensor) -> Tensor:
    """Apply a 2D convolution to every frame."""
    B = x_BCTHW.shape[0]
    return conv(x_BCTHW.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, -1)).transpose(1, 2)


class CausalConv3d(nn.Module):
    """3D convolution, causal in time. Kernel 3 pads every side of a frame with one zero; kernel 1 pads nothing."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1):
        super().__init__()
        side = kernel // 2
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding=(0, side, side))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(pad_time(x_BCTHW) if self.conv.kernel_size[0] == 3 else x_BCTHW)


class Norm(nn.GroupNorm):
    """GroupNorm, as published over 32 groups (others by `VAEConfig.norm_groups`); its statistics span all frames it is given, so it
    is not causal in time."""

    def __init__(self, channels: int, *, eps: float = 1e-6):
        super().__init__(GROUPS, channels, eps)


class ResBlock(nn.Module):
    """x' + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))); x' is x, or a 1x1x1 convolution of it where the width changes."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = Norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = Norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        changes = in_channels != out_channels
        self.nin_shortcut = CausalConv3d(in_channels, out_channels, kernel=1) if changes else nn.Identity()

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        h_BCTHW = self.conv1(F.silu(self.norm1(x_BCTHW)))
        return self.nin_shortcut(x_BCTHW) + self.conv2(F.silu(self.norm2(h_BCTHW)))


class Attention(nn.Module):
    """Attention with one head as wide as the tensor, causal in raster order over (t, h, w), added to its input.

    A token sees the earlier frames whole and its own frame up to itself. Flash-attention kernels stop at a head of 256,
    half the published width.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)
        self.q = CausalConv3d(channels, channels, kernel=1)
        self.k = CausalConv3d(channels, channels, kernel=1)
        self.v = CausalConv3d(channels, channels, kernel=1)
        self.proj_out = CausalConv3d(channels, channels, kernel=1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        h_BCTHW = self.norm(x_BCTHW)
        # Contiguous, because memory-efficient kernels refuse a strided last axis and the plain one holds N * N numbers.
        q_B1NC, k_B1NC, v_B1NC = (
            conv(h_BCTHW).flatten(2).mT.unsqueeze(1).contiguous() for conv in (self.q, self.k, self.v)
        )
        out_B1NC = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC, is_causal=True)
        return x_BCTHW + self.proj_out(out_B1NC.squeeze(1).mT.reshape(x_BCTHW.shape))


class Middle(nn.Module):
    """Res block, attention, res block at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCTHW)))


class SpatialDown(nn.Module):
    """Halve height and width of every frame; zeros are added below and on the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return per_frame(self.conv, F.pad(x_BCTHW, (0, 1, 0, 1)))


class SpatioTemporalDown(nn.Module):
    """Halve height and width, and take T frames to ceil(T / 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=2)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(x_BCTHW)


class SpatialUp(nn.Module):
    """Double height and width of every frame: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return per_frame(self.conv, F.interpolate(x_BCTHW, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


class UpResidual(nn.Module):
    """SiLU(norm2(conv2(SiLU(norm1(conv1(u))))) + u) + u; here alone the norms have eps 1e-5."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels)
        self.norm1 = Norm(channels, eps=1e-5)
        self.conv2 = CausalConv3d(channels, channels)
        self.norm2 = Norm(channels, eps=1e-5)

    def forward(self, u_BCTHW: Tensor) -> Tensor:
        a_BCTHW = F.silu(self.norm1(self.conv1(u_BCTHW)))
        return F.silu(self.norm2(self.conv2(a_BCTHW)) + u_BCTHW) + u_BCTHW


class SpatioTemporalUp(nn.Module):
    """Double frames, height and width: nearest neighbour, then two convolutions with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv3d = UpResidual(channels)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv3d(F.interpolate(x_BCTHW, scale_factor=2.0, mode="nearest"))


def res_blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    """`count` res blocks, of which the first changes the width."""
    return nn.Sequential(*(ResBlock(out_channels if j else in_channels, out_channels) for j in range(count)))


class DownLevel(nn.Module):
    """The res blocks of one resolution, then the step down."""

    def __init__(self, block: nn.Module, downsample: nn.Module):
        super().__init__()
        self.block, self.downsample = block, downsample

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.downsample(self.block(x_BCTHW))


class UpLevel(nn.Module):
    """The res blocks of one resolution, then the step up."""

    def __init__(self, block: nn.Module, upsample: nn.Module):
        super().__init__()
        self.block, self.upsample = block, upsample

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.upsample(self.block(x_BCTHW))


class Encoder(nn.Module):
    """One chunk of pixels [B, in_channels, n, H, W] to mean and log variance [B, 2 z_channels, ceil(n/4), H/8, W/8]."""

    def __init__(self, *, ch: int, ch_mult: Sequence[int], num_res_blocks: int, in_channels: int, z_channels: int):
        super().__init__()
        widths = [ch * multiple for multiple in ch_mult]
        steps = SpatialDown(widths[0]), SpatioTemporalDown(widths[1]), SpatioTemporalDown(widths[2]), nn.Identity()
        inputs = [ch, *widths]
        self.conv_in = CausalConv3d(in_channels, ch)
        self.down = nn.Sequential(
            *(DownLevel(res_blocks(inputs[i], widths[i], num_res_blocks), steps[i]) for i in range(len(widths)))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * z_channels)

    def forward(self, pixels_BCTHW: Tensor) -> Tensor:
        h_BCTHW = self.mid(self.down(self.conv_in(pixels_BCTHW)))
        return self.conv_out(F.silu(self.norm_out(h_BCTHW)))


class Decoder(nn.Module):
    """One chunk of latents [B, z_channels, k, h, w] to pixels [B, out_ch, 4k - 3, 8h, 8w]."""

    def __init__(self, *, ch: int, ch_mult: Sequence[int], num_res_blocks: int, out_ch: int, z_channels: int):
        super().__init__()
        widths = [ch * multiple for multiple in ch_mult]
        steps = nn.Identity(), SpatialUp(widths[1]), SpatioTemporalUp(widths[2]), SpatioTemporalUp(widths[3])
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = CausalConv3d(z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        # Indexed by level, so the last one runs first.
        self.up = nn.ModuleList(
            UpLevel(res_blocks(inputs[i], widths[i], num_res_blocks), steps[i]) for i in range(len(widths))
        )
        self.norm_out = Norm(widths[0])
        self.conv_out = nn.Conv3d(widths[0], out_ch, 3, padding=(0, 1, 1))

    def forward(self, latents_BCTHW: Tensor) -> Tensor:
        h_BCTHW = self.mid(self.conv_in(latents_BCTHW))
        for level in reversed(self.up):
            h_BCTHW = level(h_BCTHW)
        pixels_BCTHW = self.conv_out(pad_time(F.silu(self.norm_out(h_BCTHW))))
        return pixels_BCTHW[:, :, 3:]  # the first latent frame stands for one pixel frame, not four
