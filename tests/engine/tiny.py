"""A network, an autoencoder and a clip so small that a test adapts them in milliseconds; weights by rule, so numbers repeat."""

import math
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from vidtta.engine.adaptation import AdaptationSettings, Task
from vidtta.engine.clip import Experiment, Known, encode_known
from vidtta.engine.models.rule_weights import fill_by_rule
from vidtta.engine.models.stdit3 import Caption, STDiT3, STDiT3Config
from vidtta.engine.models.vae import VAE, VAEConfig
from vidtta.engine.sampler import SamplerSettings
from vidtta.engine.window import Window

CHANNELS = 16
DTYPES = (torch.float32, torch.bfloat16)
FIXED_DRAWS = AdaptationSettings(draws=3, timesteps="sampler")


@cache
def _dit(hidden: int, depth: int, dtype: torch.dtype) -> STDiT3:
    config = STDiT3Config(hidden_size=hidden, depth=depth, num_heads=4, caption_channels=16, model_max_length=8)
    model = STDiT3(config)
    fill_by_rule(model)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_dit(dtype: torch.dtype = torch.float32, *, hidden: int = 48, depth: int = 2) -> STDiT3:
    """A new network of 2 * depth layers, frozen as a loaded one is."""
    return deepcopy(_dit(hidden, depth, dtype))


@cache
def tiny_vae(dtype: torch.dtype = torch.float32) -> VAE:
    """One autoencoder for all tests: nothing may change it."""
    vae = VAE(VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1))
    fill_by_rule(vae)
    return vae.to(dtype).eval().requires_grad_(False)


def noise(seed: int, *shape: int) -> Tensor:
    """Standard normal float32 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_caption(seed: int = 1) -> Caption:
    """Five tokens, the last of which is padding."""
    return Caption(noise(seed, 1, 5, 16), torch.tensor([[True, True, True, True, False]]))


def tiny_latents(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The known latents of a clip of 32 x 48 pixels, [1, 16, 7, 4, 6]."""
    return noise(seed, 1, CHANNELS, 7, 4, 6).to(dtype)


def tiny_task(
    model: STDiT3,
    settings: AdaptationSettings = FIXED_DRAWS,
    *,
    latents: Tensor | None = None,
    recipe_seed: int = 0,
    clip_id: str = "clip",
    sampling_steps: int = 30,
) -> Task:
    """A task on 7 known latent frames; noise levels are those of 49 frames of 480 x 640."""
    return Task(
        model,
        tiny_latents(model.dtype).to(model.device) if latents is None else latents,
        tiny_caption().to(model.device),
        settings,
        recipe_seed=recipe_seed,
        clip_id=clip_id,
        pixel_size=(480, 640),
        fps=24.0,
        sampled_frames=49,
        sampling_steps=sampling_steps,
    )


def tiny_experiment(
    dtype: torch.dtype = torch.float32, adaptation: AdaptationSettings = FIXED_DRAWS, *, window: Window | None = None
) -> Experiment:
    """45 frames of 16 x 32 pixels, 22 of them known, sampled in 4 steps: three guided, one with the prompt alone."""
    return Experiment(
        dit=tiny_dit(dtype),
        vae=tiny_vae(dtype),
        window=window or Window(),
        pixel_size=(16, 32),
        sampler=SamplerSettings(steps=4, force_steps=2),
        adaptation=adaptation,
        seed=0,
    )


def tiny_pixels(seed: int = 0) -> Tensor:
    """A clip's 45 frames, [3, 45, 16, 32] in [-1, 1]: a still picture and one that fades in."""
    still, change = noise(seed, 3, 1, 16, 32), noise(seed + 1, 3, 1, 16, 32)
    return (0.4 * still + 0.4 * torch.linspace(-1, 1, 45)[:, None, None] * change).clamp(-1, 1)


def tiny_known(experiment: Experiment, clip_id: str = "clip") -> Known:
    """What a method may know of the clip whose frames are `tiny_pixels()`; latents [1, 16, 7, 2, 4]."""
    return Known(clip_id, encode_known(experiment.vae, tiny_pixels(), experiment.window), tiny_caption())


def save_alexnet(path: Path) -> Path:
    """Seeded random AlexNet weights in the published layout; the classifier, which LPIPS never reads, takes no room."""
    from torchvision.models import alexnet

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in alexnet(weights=None).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.zeros(1).expand(shape)
        if name.startswith("classifier")
        else torch.randn(shape, generator=generator) * max(1, math.prod(shape[1:])) ** -0.5
        for name, shape in shapes.items()
    }
    torch.save(state, path)
    return path
