"""The path of a clip: encode what is known, adapt, sample the continuation, decode, score, restore.

Reading the clip and writing the result lie around this, in run.py. Nothing here sees a frame after the known ones except
the scores.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adaptation import AdaptationSettings, Task
from .denoiser import Denoiser
from .errors import UserError
from .files import sha256_json, sha256_tensor
from .flow import sampling_timesteps
from .memory import peak_memory, reset_peak_memory
from .methods.optimize import Trace
from .methods.protocol import Adapter, Change
from .models.stdit3 import Caption, Condition, STDiT3
from .models.vae import VAE
from .sampler import ContinuationGuidance, SamplerSettings, sample
from .seeds import normal
from .window import Window

Progress = Callable[[str, int, int], None]
"""progress(phase, done, total); may raise Interrupted to stop between steps."""


@dataclass(frozen=True)
class Experiment:
    """Everything of a recipe that shapes a video except the method, with the networks it runs on."""

    dit: STDiT3
    vae: VAE
    window: Window
    pixel_size: tuple[int, int]
    """Height and width in pixels."""
    sampler: SamplerSettings
    adaptation: AdaptationSettings
    seed: int


@dataclass(frozen=True)
class Known:
    """All that a method may know of a clip. latents: [1, C, K, h, w]; prompt: the caption's embedding."""

    clip_id: str
    latents: Tensor
    prompt: Caption


@dataclass
class Outcome:
    """What one method made of one clip. pixels: the generated frames [3, F, H, W] float32; latents: [1, C, T, h, w]."""

    pixels: Tensor
    latents: Tensor
    trace: Trace
    change: Change
    state: dict[str, Tensor]
    made_from: dict[str, str]
    """SHA-256 of all that sampling started from except the weights: what every method of a clip must share."""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None


@torch.no_grad()
def encode_known(vae: VAE, pixels_3FHW: Tensor, window: Window, generator: torch.Generator | None = None) -> Tensor:
    """Latents of the known frames alone, [1, C, K, h, w]: the posterior's mode, or with a generator a sample.

    Frames after them are cut off before encoding.
    """
    known = pixels_3FHW[:, : window.encoded_frames]
    latents = vae.encode(known[None].to(next(vae.parameters()).device), generator)
    assert latents.shape[2] == window.known_latents, f"{latents.shape[2]} latent frames for {window.encoded_frames}"
    return latents


def continue_clip(
    experiment: Experiment,
    known: Known,
    adapter: Adapter,
    *,
    adapt_on: Known | None = None,
    randomize: torch.Generator | None = None,
    keep_state: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Outcome:
    """Adapt to a clip, generate its continuation, and restore the weights whatever happens.

    For placebos: adapt_on is another clip to adapt on; randomize replaces the change by a random one of equal norm.
    """
    reset_peak_memory(experiment.dit.device)
    seconds: dict[str, float] = {}
    try:
        with timed(seconds, "adapt", experiment.dit.device):
            trace = adapt(experiment, adapt_on or known, adapter, progress)
            if randomize is not None:
                adapter.randomize(randomize)
        change = adapter.change()
        if adapter.steps and not trace.steps:
            raise RuntimeError(f"adapting took no step of {adapter.steps}; its result would be the baseline's")
        if trace.steps and not change.changed:
            raise UserError(
                f"adapting changed no weight that computes ({trace.steps} steps moved the masters by {change.master:.1e}): "
                "the learning rate is too small for the weights' dtype; raise lr"
            )
        with torch.no_grad():
            with timed(seconds, "sample", experiment.dit.device):
                latents, made_from = sample_continuation(experiment, known, adapter, progress)
            with timed(seconds, "decode", experiment.dit.device):
                pixels = experiment.vae.decode(latents, experiment.window.generated)[0].float()
        state = adapter.state() if keep_state else {}
    finally:
        adapter.restore()
    if (left := adapter.change()).changed:
        raise RuntimeError(f"restoring left {left.changed} numbers changed; no later result could be trusted")
    memory = peak_memory(experiment.dit.device)
    return Outcome(pixels, latents, trace, change, state, made_from, seconds, memory)


def task_of(experiment: Experiment, known: Known) -> Task:
    """What a method adapts on."""
    return Task(
        experiment.dit,
        known.latents,
        known.prompt,
        experiment.adaptation,
        recipe_seed=experiment.seed,
        clip_id=known.clip_id,
        pixel_size=experiment.pixel_size,
        fps=experiment.window.fps,
        sampled_frames=experiment.window.model_frames,
        sampling_steps=experiment.sampler.steps,
    )


def adapt(experiment: Experiment, known: Known, adapter: Adapter, progress: Progress) -> Trace:
    """Adapt to the known latents."""
    if not adapter.steps:
        return Trace()  # nothing is learnt, so the window need not leave a known latent frame to predict
    return adapter.adapt(task_of(experiment, known), lambda step, loss: progress("adapt", step + 1, adapter.steps))


def sample_continuation(
    experiment: Experiment, known: Known, adapter: Adapter, progress: Progress
) -> tuple[Tensor, dict[str, str]]:
    """Latents of the whole clip, [1, C, T, h, w] float32, from named noise under the weights in force; and SHA-256 of what
    they were made from.
    """
    window, settings, dit = experiment.window, experiment.sampler, experiment.dit
    _, C, K, h, w = known.latents.shape
    shape = (1, C, window.latent_frames, h, w)
    given = torch.zeros(shape, dtype=known.latents.dtype, device=dit.device)
    mask = torch.zeros_like(given)
    given[:, :, :K], mask[:, :, :K] = known.latents, 1
    geometry = dit.geometry(window.latent_frames, (h, w), experiment.pixel_size, tuple(range(K)))
    branches = Denoiser(
        dit,
        geometry,
        window.fps,
        known.prompt,
        Condition(given, mask),
        base_weights=adapter.suspended if experiment.adaptation.adapted_branches == "conditional" else None,
    )

    def noise(purpose: str, index: int, frames: int) -> Tensor:
        drawn = normal((1, C, frames, h, w), experiment.seed, known.clip_id, purpose, index)
        return drawn.to(dit.device, dit.dtype)  # rounded to the model's dtype, as the official scripts draw it

    def known_noise(step: int) -> Tensor:
        fresh = torch.zeros_like(given)
        fresh[:, :, :K] = noise("known frames", step, K)
        return fresh

    start = noise("sampling", 0, window.latent_frames)
    timesteps = sampling_timesteps(settings.steps, *experiment.pixel_size, window.model_frames, size_dtype=dit.dtype)
    made_from = {
        "known latents": sha256_tensor(known.latents),
        "caption": sha256_tensor(known.prompt.embedding),
        "noise": sha256_tensor(start),
        "sampler": sha256_json([timesteps.tolist(), asdict(settings)]),
    }
    latents = sample(
        ContinuationGuidance(branches, settings, window.latent_frames),
        start,
        timesteps,
        known=given,
        known_mask=mask,
        known_noise=known_noise if settings.sdedit else None,
        on_step=lambda step: progress("sample", step + 1, settings.steps),
    )
    return latents, made_from


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Wall time of a phase, the device's queue drained at both ends."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    yield
    seconds[name] = now() - start


def describe(outcome: Outcome) -> dict[str, Any]:
    """The part of a result that tells what adapting did; plain JSON values."""
    return {**asdict(outcome.trace), "change": asdict(outcome.change)}
