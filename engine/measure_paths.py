"""Measuring the ways of one kind of work against each other: the last layers of the network, or a chunk of the VAE, on a random clip."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import Choice
from .choices import Way, Work, paths_of, use_vae_way
from .clip import Experiment, Known, task_of
from .denoiser import Denoiser
from .methods import LoRA
from .models.paths import records, use_paths
from .models.stdit3 import Caption, Condition
from .models.vae import CHUNK_FRAMES, CHUNK_LATENTS
from .models.vae_fast import use_plain
from .recorded import Recorded
from .seeds import normal

LAYERS = 8  # of the network, spatial and temporal in turn
RUNS = 5
TOKENS = 60  # of the caption
LARGEST_DISTANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}
"""From the plain path's result, relative L2; its gradients may lie twice as far."""

Row = dict[str, Any]


def measure_ways(
    experiment: Experiment,
    work: Work,
    ways: tuple[Way, ...],
    attention: Choice | None,
    cross: str | None,
    lora: LoRA,
) -> list[Row]:
    """A row for each way of a kind of work: milliseconds (of a few layers, or of a VAE chunk), seconds of the first call, relative
    distance from the plain path; or why there are none. One way alone is tried, not timed. Plain JSON."""
    truth, rows = None, []
    for way in dict.fromkeys(("plain", *ways)):
        row: Row = {"work": work, "way": way}
        try:
            with _in_force(experiment, work, way, attention, cross), _example(experiment, work, lora) as call:
                start = _now(experiment)
                result = call().detach().float()
                row["first_s"] = _now(experiment) - start
                if (work == "training" or work == "features") and records(experiment.dit, work) and len(ways) > 1:
                    call = Recorded(call, (), warm_ups=1)  # as a run does them
                if truth is None:
                    truth = result
                row["distance"] = ((result - truth).norm() / truth.norm()).item()
                allowed = LARGEST_DISTANCE[experiment.dit.dtype] * (2 if work == "training" else 1)
                if not row["distance"] <= allowed:
                    raise ArithmeticError(
                        f"relative distance {row['distance']:.3g} from the plain path, allowed {allowed}"
                    )
                row["milliseconds"] = _median_ms(experiment, call) if len(ways) > 1 else 0.0
        except Exception as error:  # each way fails in ways of its own; whoever asked for it is told
            row.pop("milliseconds", None)
            row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        gc.collect()
        if experiment.dit.device.type == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
    return rows if "plain" in ways else rows[1:]


def _now(experiment: Experiment) -> float:
    if experiment.dit.device.type == "cuda":
        torch.cuda.synchronize(experiment.dit.device)
    return time.perf_counter()


def _median_ms(experiment: Experiment, call: Callable[[], Tensor]) -> float:
    call()
    times = []
    for _ in range(RUNS):
        start = _now(experiment)
        call()
        times.append(1e3 * (_now(experiment) - start))
    return statistics.median(times)


@contextmanager
def _in_force(
    experiment: Experiment, work: Work, way: Way, attention: Choice | None, cross: str | None
) -> Iterator[None]:
    """Inside, one kind of work is computed in one way."""
    before = experiment.dit.paths
    if work == "vae":
        use_vae_way(experiment.vae, way)
    else:
        use_paths(experiment.dit, paths_of(way, attention, cross))
    try:
        yield
    finally:
        use_paths(experiment.dit, before)
        if work == "vae" and way != "plain":
            use_plain(experiment.vae)


@contextmanager
def _example(experiment: Experiment, work: Work, lora: LoRA) -> Iterator[Callable[[], Tensor]]:
    """A call that does a kind of work on a random clip at the recipe's shapes, under the paths in force; built as a run builds it, so
    that a graph compiled here serves there too."""
    if work == "vae":
        with torch.no_grad():
            yield partial(_vae_chunk, experiment)
        return
    dit, window = experiment.dit, experiment.window
    count = min(LAYERS, len(dit.layers))
    first = len(dit.layers) - count
    null: Tensor = dit.y_embedder.y_embedding  # type: ignore[assignment]
    caption = Caption(null[None, :TOKENS])
    frames = window.latent_frames if work == "sampling" else window.known_latents
    height, width = experiment.pixel_size
    shape = (1, dit.config.in_channels, frames, height // 8, width // 8)
    latents = normal(shape, 0, "", "paths").to(dit.device, dit.dtype)
    with torch.no_grad():
        if work == "sampling":
            mask = torch.zeros_like(latents)
            mask[:, :, : window.known_latents] = 1
            known = tuple(range(window.known_latents))
            geometry = dit.geometry(frames, (height // 8, width // 8), experiment.pixel_size, known)
            denoiser = Denoiser(dit, geometry, window.fps, caption, Condition(latents * mask, mask))
            x, t = latents.float().expand(3, -1, -1, -1, -1), torch.full((3,), 600.0, device=dit.device)
            fps = torch.full((3,), window.fps, device=dit.device)
            state = dit.embed(x, t, fps, geometry, denoiser.all_conditions)
            text = denoiser.all_text, denoiser.null_text
        else:
            task = task_of(experiment, Known("paths", latents, caption))
            state, text, geometry = task.embed(task.draw(0)), task.captions(), task.geometry
    if work != "training":

        def forward() -> Tensor:
            with torch.no_grad():
                return dit.run_layers(state, *text, geometry, first).tokens

        yield forward
        return
    adapter = replace(lora, last_layers=count, cache_prefix=False).attach(dit, 0)
    try:

        def step() -> Tensor:
            tokens = dit.run_layers(state, *text, geometry, first).tokens
            grads = torch.autograd.grad(tokens.float().square().mean(), adapter.masters.parameters)
            return torch.cat([grad.flatten() for grad in grads])

        yield step
    finally:
        adapter.detach()


def _vae_chunk(experiment: Experiment) -> Tensor:
    """Encode a chunk's frames and decode a chunk's latents; both results in one row of numbers."""
    vae, (height, width) = experiment.vae, experiment.pixel_size
    frames = min(CHUNK_FRAMES, experiment.window.encoded_frames)
    pixels = normal((1, 3, frames, height, width), 0, "", "pixels").clamp(-1, 1).to(experiment.dit.device)
    latents = normal((1, vae.config.z_channels, CHUNK_LATENTS, height // 8, width // 8), 0, "", "paths")
    found = vae.encode(pixels), vae.decode(latents.to(experiment.dit.device))
    return torch.cat([tensor.float().flatten() for tensor in found])
