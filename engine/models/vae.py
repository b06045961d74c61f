"""Open-Sora v1.3's video VAE: pixels to latents and back, 4 times fewer in time, 8 times in height and in width.

A clip goes through in chunks of 17 frames (5 latent frames). Neighbours share one frame and nothing else: each chunk
has its own zero padding and its own GroupNorm statistics, so its latents depend on all of its frames and on no other.
The official code also splits its convolutions into tiles, which changes no bit of the result and takes 1.7 to 1.9 times
as long; that is left out on purpose. Frames well above 480x640, with activations past 2**31 elements, may need it.

Axes: B samples, C channels, F pixel frames, T latent frames, H x W pixels, h x w = H/8 x W/8 latent pixels.
Pixels are in [-1, 1]. Latents are those of the DiT: (z - mean) / std for each channel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .vae_layers import GROUPS, Decoder, Encoder, Norm

CHUNK_FRAMES = 17
CHUNK_LATENTS = 5
STRIDE = CHUNK_FRAMES - 1  # pixel frames from the start of one chunk to the start of the next

# The official code keeps these in the source, not in the checkpoint ("video" normalisation), one number a channel.
# fmt: off
LATENT_MEAN = (
    -0.19016949832439423, -0.04480062797665596, 0.020789705216884613, 0.01865335740149021,
    -0.011585569009184837, 0.0010865575168281794, 0.08378933370113373, 0.08902134001255035,
    0.00940945465117693, 0.08086848258972168, -0.07251627743244171, 0.05052144080400467,
    -0.0209724809974432, -0.1223079189658165, -0.003862356534227729, -0.023072388023138046,
)
LATENT_STD = (
    0.9490776062011719, 0.9594117999076843, 0.9444302916526794, 0.9103284478187561,
    0.959351658821106, 0.8430351614952087, 0.8888124823570251, 0.9291136860847473,
    0.972594141960144, 0.8917953968048096, 0.8630853891372681, 0.8279891610145569,
    0.9114300012588501, 0.7922844886779785, 0.8991407155990601, 0.9473513960838318,
)
# How the official code runs (its scripts override these as they load the VAE), how it was trained, what wrote the file.
RUNTIME_OPTIONS = frozenset((
    "micro_batch_size", "micro_batch_size_2d", "micro_frame_size", "temporal_overlap", "normalization",
    "use_tiled_conv3d", "tile_size", "tiled_dim", "num_tiles", "is_training",
    "is_checkpoint", "video_frame_num", "dropout",
    "type", "model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
))
# fmt: on
# Choices that are built in here; a configuration may state them but not change them.
FIXED_OPTIONS = {
    "double_z": True,
    "resamp_with_conv": True,
    "down_sampling_layer": (1, 2),
    "temporal_up_layers": (2, 3),
    "temporal_downsample": 4,
}


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are the published model's."""

    ch: int = 128
    """Width of the first level, a multiple of 32 (the groups of a published norm)."""
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each of the four levels, in multiples of `ch`."""
    num_res_blocks: int = 2
    """Res blocks of a level in the encoder; the decoder has one more."""
    in_channels: int = 3
    """Channels of the pixels that are encoded."""
    out_ch: int = 3
    """Channels of the pixels that are decoded."""
    z_channels: int = 16
    """Latent channels; 16, because the normalisation is known for 16."""
    norm_groups: int = GROUPS
    """Groups of every norm. Small widths need fewer: with one or two channels a group the norm takes a chunk's mean colours away,
    and the latents of a chunk whose first frames alone are known contradict those of the whole chunk."""

    def __post_init__(self) -> None:
        if self.ch < 1 or self.ch % GROUPS:
            raise ValueError(f"VAE config: ch is {self.ch}; it must be a positive multiple of {GROUPS}.")
        if len(self.ch_mult) != 4 or min(self.ch_mult) < 1:
            raise ValueError(f"VAE config: ch_mult is {list(self.ch_mult)}; it must be four positive integers.")
        for name in ("num_res_blocks", "in_channels", "out_ch"):
            if getattr(self, name) < 1:
                raise ValueError(f"VAE config: {name} is {getattr(self, name)}; it must be at least 1.")
        if self.norm_groups < 1 or GROUPS % self.norm_groups:
            raise ValueError(f"VAE config: norm_groups is {self.norm_groups}; it must divide {GROUPS}.")
        if self.z_channels != len(LATENT_MEAN):
            raise ValueError(f"VAE config: z_channels is {self.z_channels}; it must be {len(LATENT_MEAN)}.")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Read a flat configuration (the fields above), or a published one with an `encoder` and a `decoder` part.

        The decoder's `num_res_blocks` may be the encoder's N (the official code adds the extra block itself) or N + 1,
        the number that is built. RUNTIME_OPTIONS are ignored; FIXED_OPTIONS must have their value.
        Raises ValueError for an unknown key, a value that is not allowed, or parts that disagree.
        """
        top = {key: value for key, value in config.items() if key not in ("encoder", "decoder")}
        sizes = _sizes(top)
        if missing := [part for part in ("encoder", "decoder") if part not in config]:
            if len(missing) == 1:
                raise ValueError(f"VAE config: {missing[0]} is missing; give both encoder and decoder, or neither.")
            return cls(**sizes)
        encoder, decoder = _sizes(config["encoder"]), _sizes(config["decoder"])
        # Each part also states the channels of the other end, which it does not use.
        encoder.pop("out_ch", None)
        decoder.pop("in_channels", None)
        blocks = encoder.get("num_res_blocks", cls.num_res_blocks)
        if decoder.get("num_res_blocks") == blocks + 1:
            decoder["num_res_blocks"] = blocks
        for part in (encoder, decoder):
            for key, value in part.items():
                if sizes.setdefault(key, value) != value:
                    raise ValueError(
                        f"VAE config: {key} is {sizes[key]} and {value} in different parts; they must agree."
                    )
        return cls(**sizes)


def _sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of VAEConfig among `options`, lists as tuples; whatever else they hold is checked."""
    allowed, sizes = {field.name for field in fields(VAEConfig)}, {}
    for key, value in options.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in allowed:
            sizes[key] = value
        elif key in FIXED_OPTIONS:
            if value != FIXED_OPTIONS[key]:
                raise ValueError(f"VAE config: {key} is {value}; only {FIXED_OPTIONS[key]} is supported.")
        elif key not in RUNTIME_OPTIONS:
            raise ValueError(f"VAE config: unknown key {key!r}; the sizes are {', '.join(sorted(allowed))}.")
    return sizes


def latent_frames(F: int) -> int:
    """Latent frames that F >= 1 pixel frames are encoded to: ceil(n / 4) for each chunk of n frames.

    Frames of a chunk beyond 1 + 4k get no latent frame of their own: 21 and 22 frames both give 7.
    """
    assert F >= 1
    chunks, rest = divmod(F - 1, STRIDE)
    if F == 1:
        return 1
    return CHUNK_LATENTS * chunks + (-(-(rest + 1) // 4) if rest else 0)


def pixel_frames(T: int) -> int:
    """Pixel frames that T >= 1 latent frames are decoded to."""
    assert T >= 1
    chunks, rest = divmod(T, CHUNK_LATENTS)
    return 1 + STRIDE * chunks + (4 * (rest - 1) if rest else 0)


class VAE(nn.Module):
    """Encoder and decoder with the published state-dict keys, and the chunks in time around them.

    Computes in the weights' dtype, one sample at a time, so a sample's result does not depend on its batch. Inputs stay
    as they are and gradients flow. To compile, compile a part in place, `vae.decoder.compile(fullgraph=True)`: its keys
    stay the same.
    """

    spatial_compression = 8

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        shared = {"ch": config.ch, "ch_mult": config.ch_mult, "z_channels": config.z_channels}
        self.encoder = Encoder(**shared, num_res_blocks=config.num_res_blocks, in_channels=config.in_channels)
        self.decoder = Decoder(**shared, num_res_blocks=config.num_res_blocks + 1, out_ch=config.out_ch)
        for module in self.modules():
            if isinstance(module, Norm):
                module.num_groups = config.norm_groups
        self.fast: dict[str, Callable[[Tensor], Tensor]] = {}
        """What runs in place of `encoder` and `decoder` (vae_fast.py); empty on the plain path."""

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.decoder.conv_out.weight.dtype

    def moments(self, pixels_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, each [B, 16, latent_frames(F), H/8, W/8], not normalised.

        pixels_BCFHW: [B, 3, F, H, W] in [-1, 1], any float dtype. The log variance is clamped to [-30, 20]. No frame is
        added; surplus ones (see latent_frames) enter only GroupNorm statistics and the early layers.
        Raises ValueError for another shape, or where H or W is not a multiple of 8.
        """
        shape, C, size = list(pixels_BCFHW.shape), self.config.in_channels, self.spatial_compression
        if len(shape) != 5 or shape[1] != C or min(shape) < 1 or shape[3] % size or shape[4] % size:
            raise ValueError(f"VAE: pixels are {shape}; they must be [B, {C}, F, H, W], H and W multiples of {size}.")
        pixels_BCFHW = pixels_BCFHW.to(self.dtype)
        starts = range(0, max(shape[2] - 1, 1), STRIDE)
        encoder = self.fast.get("encoder", self.encoder)
        chunks = [_each_sample(encoder, pixels_BCFHW[:, :, start : start + CHUNK_FRAMES]) for start in starts]
        mean_BCThw, logvar_BCThw = torch.cat(chunks, dim=2).chunk(2, dim=1)
        return mean_BCThw, logvar_BCThw.clamp(-30.0, 20.0)

    def encode(self, pixels_BCFHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents for the DiT, [B, 16, latent_frames(F), H/8, W/8], in the weights' dtype.

        The posterior's mode, or with a generator a sample, mean + exp(logvar / 2) * eps; the official code samples.
        eps is one float32 draw of the whole shape on the generator's device. Raises as `moments`.
        """
        z_BCThw, logvar_BCThw = self.moments(pixels_BCFHW)
        if generator is not None:
            eps_BCThw = torch.randn(z_BCThw.shape, generator=generator, dtype=torch.float32, device=generator.device)
            z_BCThw = z_BCThw + torch.exp(0.5 * logvar_BCThw) * eps_BCThw.to(z_BCThw)
        mean_C111, std_C111 = latent_stats(z_BCThw.device)
        return ((z_BCThw - mean_C111) / std_C111).to(self.dtype)

    def decode(self, latents_BCThw: Tensor, frames: range | None = None) -> Tensor:
        """Pixels [B, 3, len(frames), 8h, 8w] in the weights' dtype, not clamped.

        frames: the pixel frames to return, counted from 0; all where None. Only the chunks that hold them are decoded;
        the result is bit for bit that of decoding all and slicing. A frame that two chunks share is the mean of both.
        Raises ValueError for latents of another shape, or frames that do not exist.
        """
        shape, C = list(latents_BCThw.shape), self.config.z_channels
        if len(shape) != 5 or shape[1] != C or min(shape) < 1:
            raise ValueError(f"VAE: latents are {shape}; they must be [B, {C}, T, h, w].")
        total = pixel_frames(shape[2])
        frames = range(total) if frames is None else frames
        if frames.step != 1 or not 0 <= frames.start < frames.stop <= total:
            raise ValueError(f"VAE: frames is {frames}; it must be a range with step 1 inside range(0, {total}).")

        mean_C111, std_C111 = latent_stats(latents_BCThw.device)
        chunks = (latents_BCThw * std_C111 + mean_C111).to(self.dtype).split(CHUNK_LATENTS, dim=2)
        # Chunk i holds pixel frames 16i to 16i + 16; the first is averaged with the last of the chunk before.
        first = max(frames.start - 1, 0) // STRIDE
        last = min((frames.stop - 1) // STRIDE, len(chunks) - 1)
        decoder = self.fast.get("decoder", self.decoder)
        pieces = [_each_sample(decoder, chunks[first])]
        for chunk in chunks[first + 1 : last + 1]:
            before, after = pieces.pop(), _each_sample(decoder, chunk)
            both = 0.5 * (before[:, :, -1:] + after[:, :, :1])
            pieces += [before[:, :, :-1], both, after[:, :, 1:]]
        start = STRIDE * first
        return torch.cat(pieces, dim=2)[:, :, frames.start - start : frames.stop - start]


def _each_sample(coder: Callable[[Tensor], Tensor], chunk_BCTHW: Tensor) -> Tensor:
    return torch.cat([coder(sample_1CTHW) for sample_1CTHW in chunk_BCTHW.split(1)])


def latent_stats(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, each [16, 1, 1, 1]; float32, which promotes what they meet."""
    mean_C, std_C = torch.tensor((LATENT_MEAN, LATENT_STD), dtype=torch.float32, device=device)
    return mean_C.view(-1, 1, 1, 1), std_C.view(-1, 1, 1, 1)
