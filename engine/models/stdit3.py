"""STDiT3, the diffusion transformer of Open-Sora v1.3, at any size; parameter names are the published checkpoint's.

The forward pass, in the order of the code: patches are embedded and get their position; `depth` pairs of layers follow, first
attention inside each frame ("spatial"), then inside windows of 8 x 8 tokens by all frames ("temporal"); each layer also
attends to the caption; a modulated linear layer gives the velocity x0 - noise. Frames given as condition attend to the null
caption. The t = 0 path for fixed frames (`x_mask`), which no v1.3 training used, is deliberately left out.

Axes: B samples, T latent frames, S tokens a frame, N = T * S, D hidden, L caption tokens, C latent channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import DEFAULT, Backends, CrossAttention, LayerText, SelfAttention, TextStates
from .float8 import Float8, Linear, in_float8
from .geometry import Geometry, build_geometry
from .rope import Rope

if TYPE_CHECKING:
    from .paths import AnyPaths

# Fields of the published config.json that choose kernels or training behaviour, not the function computed here.
# fmt: off
_RUNTIME_FIELDS = frozenset((
    "input_size", "class_dropout_prob", "drop_path", "enable_flash_attn", "enable_layernorm_kernel",
    "enable_sequence_parallelism", "only_train_temporal", "freeze_y_embedder", "skip_y_embedder", "use_cond",
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "auto_map", "force_huggingface",
    "_name_or_path",
))
# fmt: on
_REQUIRED_VALUES = {
    "patch_size": [1, 2, 2],
    "kernel_size": [8, 8, -1],
    "use_spatial_rope": True,
    "qk_norm": True,
    "qk_norm_legacy": False,
    "pred_sigma": True,
    "skip_temporal": False,
}


@dataclass(frozen=True, kw_only=True)
class STDiT3Config:
    """Sizes of the network; the defaults are STDiT3-XL/2 as published."""

    input_sq_size: int = 512
    in_channels: int = 16
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    model_max_length: int = 300

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} must be positive, was {getattr(self, field.name)}")
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 6:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must give a head dimension divisible by 6"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "STDiT3Config":
        """Read the published config.json; raises ValueError for a field that would change the network in a way not built here."""
        for name, wanted in _REQUIRED_VALUES.items():
            value = config.get(name, wanted)
            value = list(value) if isinstance(value, tuple) else value
            if value != wanted:
                raise ValueError(f"{name} must be {wanted}, was {value}")
        known = {f.name for f in fields(cls)}
        if unknown := set(config) - known - set(_REQUIRED_VALUES) - _RUNTIME_FIELDS:
            raise ValueError(f"unknown fields {sorted(unknown)}; known are {sorted(known)}")
        return cls(**{name: value for name, value in config.items() if name in known})


class PatchEmbed(nn.Module):
    """A linear map of 1 x 2 x 2 patches, stored as the official Conv3d; the right and bottom edge are padded with zeros."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        height, width = x_BCTHW.shape[-2:]
        if height % 2 or width % 2:
            x_BCTHW = F.pad(x_BCTHW, (0, width % 2, 0, height % 2))
        patches = x_BCTHW.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)
        return F.linear(patches.flatten(-3).flatten(1, 3), self.proj.weight.flatten(1), self.proj.bias)


class ScalarEmbed(nn.Module):
    """Cosines and sines of a number at 128 frequencies, through a two-layer MLP; used for the timestep and for fps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, value_B: Tensor) -> Tensor:
        frequencies = torch.exp(
            -math.log(10000.0) / 128 * torch.arange(128, device=value_B.device, dtype=torch.float32)
        )
        angles = value_B.float()[:, None] * frequencies
        dtype: torch.dtype = self.mlp[0].weight.dtype  # type: ignore[assignment]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class Mlp(nn.Module):
    def __init__(self, dim_in: int, hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim_in, hidden)
        self.fc2 = Linear(hidden, dim_out)
        self.first: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        """Product and activation in one, of x, weight and bias; serves where nothing is trained."""

    def forward(self, x: Tensor) -> Tensor:
        first = None if torch.is_grad_enabled() or in_float8(self.fc1, x) or in_float8(self.fc2, x) else self.first
        if first is not None and isinstance(self.fc1, nn.Linear):
            return self.fc2(first(x, self.fc1.weight, self.fc1.bias))
        return self.second(self.fc1(x))

    def second(self, hidden: Tensor) -> Tensor:
        """The activation of the first product, and the second product; in float8 the activation is part of quantising."""
        if in_float8(self.fc2, hidden):
            return self.fc2.product(hidden, gelu=True)
        return self.fc2(F.gelu(hidden, approximate="tanh"))


class CaptionEmbed(nn.Module):
    """Projects a caption's embedding; `y_embedding` [model_max_length, caption_channels] is the null caption, never trained."""

    def __init__(self, channels: int, dim: int, length: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(length, channels) / channels**0.5)
        self.y_proj = Mlp(channels, dim, dim)


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without affine parameters, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Layer(nn.Module):
    """Modulated self-attention, cross-attention to the caption, modulated MLP; each added to the residual stream."""

    def __init__(self, config: STDiT3Config, windowed: bool) -> None:
        super().__init__()
        dim, heads = config.hidden_size, config.num_heads
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn = SelfAttention(dim, heads, windowed)
        self.cross_attn = CrossAttention(dim, heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dim)

    def forward(
        self,
        x_BND: Tensor,
        modulation_B6D: Tensor,
        text: LayerText,
        known_text: LayerText | None,
        geometry: Geometry,
        backends: Backends = DEFAULT,
    ) -> Tensor:
        vectors = (self.scale_shift_table + modulation_B6D).unsqueeze(2).unbind(1)  # each [B, 1, D]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        x = x_BND
        x = x + gate_a * self.attn(layer_norm(x) * (1 + scale_a) + shift_a, geometry, backends)
        x = x + self.cross_attn(x, text, known_text, geometry, backends)
        return x + gate_m * self.mlp(layer_norm(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    """Modulated linear map of each token to its patch, [B, N, 4 * 2C], ordered (row, column, channel)."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.linear = nn.Linear(dim, 4 * out_channels)

    def modulation(self, time_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, [B, 1, D] each."""
        shift, scale = (self.scale_shift_table + time_BD[:, None]).unsqueeze(2).unbind(1)
        return shift, scale

    def forward(self, x_BND: Tensor, time_BD: Tensor, timestep_B: Tensor) -> Tensor:
        """`timestep_B` is not used here: it is for replacements whose effect differs between ranges of noise levels."""
        shift, scale = self.modulation(time_BD)
        return self.linear(layer_norm(x_BND) * (1 + scale) + shift)


@dataclass(frozen=True)
class Caption:
    """A batch of captions as the network takes them. embedding: [B, L, caption_channels]; mask: [B, L] bool or None (all count)."""

    embedding: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device) -> "Caption":
        return Caption(self.embedding.to(device), None if self.mask is None else self.mask.to(device))

    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, so that `Caption(*tensors)` is the same."""
        return (self.embedding,) if self.mask is None else (self.embedding, self.mask)


@dataclass(frozen=True)
class Condition:
    """Known latent frames. latents: [B, C, T, h, w], zero on unknown frames; mask: the same shape, 1 on known frames."""

    latents: Tensor
    mask: Tensor


class Embedded(NamedTuple):
    """A noisy latent inside the network. tokens: [B, N, D]; modulation: [B, 6, D]; time: [B, D]; timestep: [B] float32."""

    tokens: Tensor
    modulation: Tensor
    time: Tensor
    timestep: Tensor


Through = Callable[[Embedded, Callable[..., Embedded]], Embedded]
"""through(state, layers) gives the state after all layers; layers(state, start=, stop=) runs some of them."""


class STDiT3(nn.Module):
    """The network. `forward` is `embed`, `run_layers`, `head`; they can be called apart to cache what does not change."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        dim, channels = config.hidden_size, config.in_channels
        self.rope = Rope(dim // config.num_heads)
        self.x_embedder = PatchEmbed(channels, dim)
        self.x_embedder_cond = PatchEmbed(channels, dim)
        self.x_embedder_cond_mask = PatchEmbed(channels, dim)
        self.t_embedder = ScalarEmbed(dim)
        self.fps_embedder = ScalarEmbed(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbed(config.caption_channels, dim, config.model_max_length)
        self.spatial_blocks = nn.ModuleList(Layer(config, windowed=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(Layer(config, windowed=True) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, 2 * channels)
        self.paths: AnyPaths | None = None
        """How the layers are computed; None is the plain path (paths.py)."""
        self.float8: Float8 | None = None
        """The copies of weights that compute in float8 (float8.py); None where none do."""
        self.recompute = False
        """Whether a layer's activations are computed again for the backward pass, not kept (recompute.py)."""

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj.weight.device

    @property
    def layers(self) -> list[Layer]:
        """All layers in the order they run: spatial 0, temporal 0, spatial 1, ..."""
        return [layer for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True) for layer in pair]  # type: ignore[misc]

    def geometry(
        self,
        frames: int,
        latent_size: tuple[int, int],
        pixel_size: tuple[int, int],
        known_frames: tuple[int, ...] = (),
    ) -> Geometry:
        """Tables for a latent of this shape, in the model's dtype and on its device; see `build_geometry`."""
        quarter = self.config.hidden_size // 4
        exponent = torch.arange(0, 2 * quarter, 2, dtype=torch.float32, device=self.device) / (2 * quarter)
        return build_geometry(
            frames=frames,
            latent_size=latent_size,
            pixel_size=pixel_size,
            known_frames=known_frames,
            freqs=self.rope.freqs,
            inv_freq=(1.0 / 10000.0**exponent).to(self.dtype),
            dtype=self.dtype,
            input_sq_size=self.config.input_sq_size,
        )

    def null_caption(self, like: Caption) -> Caption:
        """The null caption under the prompt's own mask and length, as the official code masks it."""
        null: Tensor = self.y_embedder.y_embedding  # type: ignore[assignment]
        B, L = like.embedding.shape[:2]
        return Caption(null[:L].expand(B, L, -1), like.mask)

    def text_states(self, caption: Caption) -> TextStates:
        """Keys and values of a caption for all layers."""
        text_BLD = self.y_embedder.y_proj(caption.embedding.to(self.dtype))
        pairs = [layer.cross_attn.keys_values(text_BLD) for layer in self.layers]
        mask = None if caption.mask is None else caption.mask[:, None, None, :]
        return TextStates(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), mask)

    def embed(
        self, x_BCTHW: Tensor, timestep_B: Tensor, fps_B: Tensor, geometry: Geometry, condition: Condition | None
    ) -> Embedded:
        """Tokens of a noisy latent with its condition and position, and the modulation that t and fps give."""

        def patches(embedder: PatchEmbed, latent: Tensor) -> Tensor:
            latent = latent.to(self.dtype)
            return embedder(latent if geometry.order is None else latent.index_select(2, geometry.order))

        tokens = patches(self.x_embedder, x_BCTHW)
        if condition is not None:
            tokens = tokens + patches(self.x_embedder_cond, condition.latents)
            tokens = tokens + patches(self.x_embedder_cond_mask, condition.mask)
        tokens = (tokens.unflatten(1, (geometry.frames, -1)) + geometry.position_SD).flatten(1, 2)
        time = self.t_embedder(timestep_B) + self.fps_embedder(fps_B)
        return Embedded(tokens, self.t_block(time).unflatten(-1, (6, -1)), time, timestep_B)

    def run_layers(
        self,
        state: Embedded,
        text: TextStates,
        known_text: TextStates | None,
        geometry: Geometry,
        start: int = 0,
        stop: int | None = None,
    ) -> Embedded:
        """The state after layers start .. stop - 1 (all by default)."""
        tokens = state.tokens
        if self.float8 is not None:
            self.float8.refresh(tokens.shape[:-1].numel())
        run = Layer.__call__ if self.paths is None else self.paths.prepare(self, tokens, (text, known_text), geometry)
        for index, layer in list(enumerate(self.layers))[start:stop]:
            known = None if known_text is None else known_text.at(index)
            inputs = (layer, tokens, state.modulation, text.at(index), known, geometry)
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = run(*inputs)
        return state._replace(tokens=tokens)

    def head(self, state: Embedded, geometry: Geometry) -> Tensor:
        """The network's output [B, 2C, T, h, w] in float32; channels C and up (the variance of older versions) are unused."""
        patches = self.final_layer(state.tokens, state.time, state.timestep)
        x = patches.unflatten(1, (geometry.frames, geometry.rows, geometry.cols)).unflatten(-1, (2, 2, -1))
        x = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # [B, 2C, T, 2 * rows, 2 * cols]
        height, width = geometry.latent_size
        x = x[..., :height, :width]
        return (x if geometry.inverse is None else x.index_select(2, geometry.inverse)).float()

    def forward(
        self,
        x_BCTHW: Tensor,
        timestep_B: Tensor,
        fps_B: Tensor,
        text: TextStates,
        known_text: TextStates | None,
        geometry: Geometry,
        condition: Condition | None,
        through: Through | None = None,
    ) -> Tensor:
        """The velocity x0 - noise, [B, C, T, h, w] in float32.

        x: the noisy latent. timestep: float32, 0 is clean and 1000 is noise. text: states of each sample's caption; known_text:
        of the null caption, for the known frames (one row may serve all samples). through: how the layers are gone through, where
        not all of them are run (feature_cache.py).
        """
        state = self.embed(x_BCTHW, timestep_B, fps_B, geometry, condition)
        layers = partial(self.run_layers, text=text, known_text=known_text, geometry=geometry)
        state = layers(state) if through is None else through(state, layers)
        return self.head(state, geometry)[:, : self.config.in_channels]
