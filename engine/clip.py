"""The path of a clip: encode what is known, adapt, sample the continuation, decode, score, restore.

Reading the clip and writing the result lie around this, in run.py. Nothing here sees a frame after the known ones except
the scores.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .adaptation import AdaptationSettings, Task
from .denoiser import Denoiser, velocities_of
from .errors import UserError
from .feature_cache import FeatureCache
from .files import sha256_json, sha256_tensor
from .flow import sampling_timesteps
from .memory import peak_memory, reset_peak_memory
from .methods.none import NoAdapter
from .methods.optimize import Trace
from .methods.protocol import Adapter, Change
from .models.paths import records
from .models.stdit3 import Caption, Condition, STDiT3
from .models.vae import VAE
from .recorded import CAPTION_LENGTHS, Records
from .sampler import ContinuationGuidance, SamplerSettings, sample
from .seeds import normal
from .transfer import send
from .window import Window

Progress = Callable[[str, int, int], None]
"""progress(phase, done, total); may raise Interrupted to stop between steps."""


class Observer(Protocol):
    """Watches a clip being adapted on: it may compute with the weights in force, and change nothing."""

    def begin(self, task: Task, adapter: Adapter) -> None:
        """Before the first step."""
        ...

    def step(self, steps: int) -> None:
        """After so many steps."""
        ...

    def adapted(self) -> None:
        """After the last step, with the weights that sampling uses."""
        ...


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
    samples: int = 1
    """Continuations that are sampled from one adapted network, from different noise."""


@dataclass(frozen=True)
class Known:
    """All that a method may know of a clip. latents: [1, C, K, h, w]; prompt: the caption's embedding."""

    clip_id: str
    latents: Tensor
    prompt: Caption


@dataclass
class Outcome:
    """What one method made of one clip. pixels: the generated frames [3, F, H, W] float32; latents: [1, C, T, h, w]; more: pixels
    of further samples."""

    pixels: Tensor
    latents: Tensor
    more: list[Tensor]
    trace: Trace
    change: Change
    state: dict[str, Tensor]
    made_from: dict[str, str]
    """SHA-256 of all that sampling started from except the weights: what every method of a clip must share (of the sampler, what
    the recipe says; `more_sampling` alone takes more steps of it)."""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    compiled: dict[str, int] = field(default_factory=dict)
    """Graphs compiled on this clip, and breaks of graphs."""
    layers: dict[str, int] = field(default_factory=dict)
    """With a feature cache: evaluations of a layer while sampling, a guidance branch each, that were `computed` and `reused`."""
    ways: dict[str, str] = field(default_factory=dict)
    """How the method computed what is its own (Adapter.ways)."""


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
    restore: bool = True,
    observer: Observer | None = None,
    snapshots: Mapping[int, Callable[[Outcome], object]] | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Outcome:
    """Adapt to a clip, generate its continuation, and restore the weights whatever happens.

    For placebos: adapt_on is another clip to adapt on; randomize replaces the change by a random one of equal norm. restore:
    False leaves the adapted weights in force for the next clip, unless something fails. observer: watches adapting; snapshots: for
    numbers of steps, what takes the outcome of stopping there. Neither changes a bit of what follows.
    """
    device = experiment.dit.device
    reset_peak_memory(device)
    clock, watched, graphs = Stopwatch(device), Stopwatch(device), count_graphs()

    def finished(trace: Trace) -> Outcome:
        seconds = {"adapt": clock.seconds} | ({"observe": watched.seconds} if observer else {})
        outcome = finish(experiment, known, adapter, trace, seconds, keep_state, progress)
        outcome.compiled = {name: count - graphs[name] for name, count in count_graphs().items()}
        outcome.ways = adapter.ways
        return outcome

    def on_step(step: int, loss: float) -> None:
        progress("adapt", step + 1, adapter.steps)
        take = snapshots.get(step + 1) if snapshots and step + 1 < adapter.steps else None
        if not (observer or take):
            return  # the clock would wait for the device, which has work beyond this step
        with clock.paused():
            if observer:
                with watched.running():
                    observer.step(step + 1)
            if take:
                take(finished(deepcopy(adapter.trace)))

    kept = False
    try:
        if observer:
            with watched.running():
                observer.begin(task_of(experiment, adapt_on or known), adapter)
        with clock.running():
            # Where nothing is learnt the window need not leave a known latent frame to predict.
            trace = adapter.adapt(task_of(experiment, adapt_on or known), on_step) if adapter.steps else Trace()
            if randomize is not None:
                adapter.randomize(randomize)
        if observer:
            with watched.running():
                observer.adapted()
        outcome = finished(trace)
        kept = not restore
    finally:
        if not kept:
            adapter.restore()
    if not kept and (left := adapter.change()).changed:
        raise RuntimeError(f"restoring left {left.changed} numbers changed; no later result could be trusted")
    return outcome


def finish(
    experiment: Experiment,
    known: Known,
    adapter: Adapter,
    trace: Trace,
    seconds: dict[str, float],
    keep_state: bool,
    progress: Progress,
) -> Outcome:
    """What follows adapting, under the weights in force: see that they changed, sample, decode."""
    change = adapter.change()
    if adapter.steps and not trace.steps:
        raise RuntimeError(f"adapting took no step of {adapter.steps}; its result would be the baseline's")
    if trace.steps and not change.changed and trace.kept_step != 0:
        raise UserError(
            f"adapting changed no weight that computes ({trace.steps} steps moved the masters by {change.master:.1e}): "
            "the learning rate is too small for the weights' dtype; raise lr"
        )
    device, more = experiment.dit.device, []
    with torch.no_grad():
        if experiment.dit.float8 is not None:
            with timed(seconds, "quantise", device):
                experiment.dit.float8.refresh()
        with timed(seconds, "sample", device):
            latents, made_from, layers = sample_continuation(experiment, known, adapter, progress)
        with timed(seconds, "decode", device):
            pixels = experiment.vae.decode(latents, experiment.window.generated)[0].float()
        if experiment.samples > 1:
            with timed(seconds, "more samples", device):
                for index in range(1, experiment.samples):
                    other, _, again = sample_continuation(experiment, known, adapter, progress, index)
                    layers = {name: count + again[name] for name, count in layers.items()}
                    more.append(experiment.vae.decode(other, experiment.window.generated)[0].float())
    state = adapter.state() if keep_state else {}
    return Outcome(pixels, latents, more, trace, change, state, made_from, seconds, peak_memory(device), layers=layers)


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


def sample_continuation(
    experiment: Experiment, known: Known, adapter: Adapter, progress: Progress, index: int = 0
) -> tuple[Tensor, dict[str, str], dict[str, int]]:
    """Latents of the whole clip, [1, C, T, h, w] float32, from named noise under the weights in force; SHA-256 of what they were
    made from; and with a feature cache the counts of `Outcome.layers`. index: which sample; each has noise, and a cache, of its own.
    """
    window, settings, dit = experiment.window, experiment.sampler, experiment.dit
    if isinstance(adapter, NoAdapter) and adapter.sampling_steps:
        settings = replace(settings, steps=adapter.sampling_steps)
    sample_name = f", sample {index}" if index else ""
    _, C, K, h, w = known.latents.shape
    shape = (1, C, window.latent_frames, h, w)
    given = torch.zeros(shape, dtype=known.latents.dtype, device=dit.device)
    mask = torch.zeros_like(given)
    given[:, :, :K], mask[:, :, :K] = known.latents, 1
    geometry = dit.geometry(window.latent_frames, (h, w), experiment.pixel_size, tuple(range(K)))
    cache = None
    if settings.cache_every > 1:
        cache = FeatureCache(settings.cache_every, settings.cache_first, len(dit.layers))
    if cache or not records(dit, "sampling"):
        adapter.sampling = None
    elif adapter.sampling is None:
        adapter.sampling = Records(velocities_of(dit, geometry, window.fps), 2 * CAPTION_LENGTHS)  # by batches
    branches = Denoiser(
        dit,
        geometry,
        window.fps,
        known.prompt,
        Condition(given, mask),
        base_weights=adapter.suspended if experiment.adaptation.adapted_branches == "conditional" else None,
        records=adapter.sampling,
        cache=cache,
    )

    def noise(purpose: str, index: int, frames: int) -> Tensor:
        drawn = normal((1, C, frames, h, w), experiment.seed, known.clip_id, purpose + sample_name, index)
        return send(drawn, dit.device, dit.dtype)  # rounded to the model's dtype, as the official scripts draw it

    drawn: dict[int, Tensor] = {}

    def known_noise(step: int) -> Tensor:
        fresh = torch.zeros_like(given)
        fresh[:, :, :K] = drawn.pop(step) if step in drawn else noise("known frames", step, K)
        return fresh

    def stepped(step: int) -> None:
        progress("sample", step + 1, settings.steps)
        if settings.sdedit and step + 1 < settings.steps:
            drawn[step + 1] = noise("known frames", step + 1, K)  # while the device is at work

    start = noise("sampling", 0, window.latent_frames)
    size = (*experiment.pixel_size, window.model_frames)
    timesteps, shared = (
        sampling_timesteps(s.steps, *size, size_dtype=dit.dtype) for s in (settings, experiment.sampler)
    )
    made_from = {
        "known latents": sha256_tensor(known.latents),
        "caption": sha256_tensor(known.prompt.embedding),
        "noise": sha256_tensor(start),
        "sampler": sha256_json([shared.tolist(), experiment.sampler.shaping_videos()]),
    }
    latents = sample(
        ContinuationGuidance(branches, settings, window.latent_frames),
        start,
        timesteps,
        known=given,
        known_mask=mask,
        known_noise=known_noise if settings.sdedit else None,
        on_step=stepped,
    )
    return latents, made_from, {} if cache is None else dict(cache.counts)


def count_graphs() -> dict[str, int]:
    """Graphs that torch.compile made in this process so far, and breaks of graphs."""
    if "torch._dynamo" not in sys.modules:
        return {"graphs": 0, "graph_breaks": 0}
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


class Stopwatch:
    """Wall time of a phase that others may interrupt, the device's queue drained at each end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._since = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        self._since = self._now()
        yield
        self.seconds += self._now() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the time of something else passes."""
        self.seconds += self._now() - self._since
        yield
        self._since = self._now()


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Wall time of a phase, the device's queue drained at both ends."""
    watch = Stopwatch(device)
    with watch.running():
        yield
    seconds[name] = watch.seconds


def describe(outcome: Outcome) -> dict[str, Any]:
    """The part of a result that tells what adapting did; plain JSON values."""
    return {**asdict(outcome.trace), "change": asdict(outcome.change), "ways": outcome.ways}
