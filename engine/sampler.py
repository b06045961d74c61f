"""The sampler: Euler steps of the rectified flow under classifier-free guidance, as Open-Sora v1.3's scheduler.

`sample` is the loop. What differs between continuation and text to video is how a guided velocity is made; that is a
`Guidance`: it gives the guided velocity of step i and says which latent frames are re-noised before it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .flow import NUM_TIMESTEPS, add_noise
from .transfer import send


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Continuation; the defaults are v1.3's video-to-video configuration."""

    steps: int = 30
    """Euler steps."""
    text_guidance: float = 7.5
    """Guidance scale between the prompt and the null caption."""
    image_guidance: float = 5.0
    """Guidance scale between with and without the known frames."""
    decreasing_image_weight: bool = True
    """Let the image guidance differ between latent frames: 1 on the first, and on the last falling from its scale to 1 over the steps."""
    oscillate_text: bool = True
    """From step `force_steps` on, use text guidance on even steps only."""
    oscillate_image: bool = True
    """From step `force_steps` on, use image guidance on even steps only."""
    force_steps: int = 10
    """Steps at the start that always guide."""
    sdedit: bool = True
    """Before each step, set the known frames to their latents noised afresh to the step's level."""
    cache_every: int = 1
    """Steps that one evaluation of the layers after the first `cache_first` serves; 1 runs every layer at every step, more is faster and
    changes the video."""
    cache_first: int = 2
    """Layers that run at every step where `cache_every` is above 1, from the first on (a spatial and a temporal one are two)."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, was {self.steps}")
        if self.force_steps < 0:
            raise ValueError(f"force_steps must be at least 0, was {self.force_steps}")
        if self.cache_every < 1:
            raise ValueError(f"cache_every must be at least 1 (every layer runs at every step), was {self.cache_every}")
        if self.cache_first < 0:
            raise ValueError(f"cache_first must be at least 0, was {self.cache_first}")

    def shaping_videos(self) -> dict[str, Any]:
        """What of these shapes a video: all, but for the feature cache's keys where it is off, so that earlier results stay valid."""
        values = asdict(self)
        if self.cache_every == 1:
            del values["cache_every"], values["cache_first"]
        return values


def oscillated(scale: float, step: int, force_steps: int, oscillate: bool) -> float:
    """The guidance scale of a step: 1 on odd steps from `force_steps` on, if `oscillate`."""
    return 1.0 if oscillate and step >= force_steps and step % 2 == 1 else scale


def image_weights(scale: float, step: int, steps: int, frames: int) -> Tensor:
    """Image guidance a latent frame, [frames, 1, 1] float32: from 1 on the first to a last that falls from `scale` to 1 over the steps."""
    last = torch.linspace(scale, 1.0, steps)[step].item()
    return torch.linspace(1.0, last, frames)[:, None, None]


class Guidance(Protocol):
    def velocity(self, step: int, t: Tensor, z: Tensor) -> Tensor:
        """The guided velocity of a step, [1, C, T, h, w] float32. t: scalar float32; z: float32."""
        ...


class ContinuationVelocity(Protocol):
    def __call__(self, z: Tensor, t: Tensor, *, all_branches: bool) -> tuple[Tensor, ...]:
        """Velocities of the branches, [1, C, T, h, w] each: (prompt and condition,) or with (null, condition), (null, none)."""
        ...


@dataclass(frozen=True)
class ContinuationGuidance:
    """v = v_none + g_image (v_null - v_none) + g_text (v_prompt - v_null).

    Where both scales are 1 this is v_prompt, and only that branch runs (equal up to rounding).
    """

    branches: ContinuationVelocity
    settings: SamplerSettings
    frames: int

    def scales(self, step: int) -> tuple[float, float]:
        """Text and image scale of a step."""
        s = self.settings
        return (
            oscillated(s.text_guidance, step, s.force_steps, s.oscillate_text),
            oscillated(s.image_guidance, step, s.force_steps, s.oscillate_image),
        )

    def velocity(self, step: int, t: Tensor, z: Tensor) -> Tensor:
        text_scale, image_scale = self.scales(step)
        if text_scale == 1.0 and image_scale == 1.0:
            (prompt,) = self.branches(z, t, all_branches=False)
            return prompt
        prompt, null, unconditional = self.branches(z, t, all_branches=True)
        weight: float | Tensor = image_scale
        if self.settings.decreasing_image_weight and image_scale > 1.0:
            weight = send(image_weights(image_scale, step, self.settings.steps, self.frames), z.device, z.dtype)
        return unconditional + weight * (null - unconditional) + text_scale * (prompt - null)


@dataclass(frozen=True)
class TextGuidance:
    """Text to video: v = v_null + g (v_prompt - v_null), optionally rescaled towards the prompt's spread (the flaw fix)."""

    branches: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    scale: float = 7.5
    oscillate: bool = True
    force_steps: int = 10
    flaw_fix: bool = True

    def velocity(self, step: int, t: Tensor, z: Tensor) -> Tensor:
        prompt, null = self.branches(z, t)
        v = null + oscillated(self.scale, step, self.force_steps, self.oscillate) * (prompt - null)
        if self.flaw_fix:
            axes = tuple(range(1, v.ndim))
            v = v * (0.7 * prompt.std(axes, keepdim=True) / v.std(axes, keepdim=True) + 0.3)
        return v


def sample(
    guidance: Guidance,
    z: Tensor,
    timesteps: Tensor,
    *,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    known_noise: Callable[[int], Tensor] | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Walk from noise `z` [1, C, T, h, w] to a latent, in float32.

    timesteps: [steps] float32, falling. known, known_mask: known latents and where they are (1), with `known_noise(step)` the
    fresh noise of each step, all of z's shape or broadcasting to it; None switches the re-noising of known frames off. After
    the last step known frames hold the network's reconstruction. on_step(i) is called after step i and may raise to stop.
    """
    z = z.float()
    levels = [*timesteps.tolist(), 0.0]
    for step, t in enumerate(timesteps.to(z.device)):
        if known is not None and known_noise is not None and known_mask is not None:
            z = torch.where(known_mask.bool(), add_noise(known, known_noise(step), t), z)
        v = guidance.velocity(step, t, z)
        z = z + v * ((levels[step] - levels[step + 1]) / NUM_TIMESTEPS)
        on_step(step)
    return z
