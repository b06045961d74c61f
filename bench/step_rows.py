"""The rows of `bench.steps`: what is run at the model's real shapes, on which paths. Each row stands alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from ..engine.adaptation import AdaptationSettings
from ..engine.clip import encode_known, sample_continuation, task_of
from ..engine.denoiser import Denoiser, velocities_of
from ..engine.feature_cache import FeatureCache
from ..engine.methods import Delta, DeltaClosedForm, FullFineTuning, LoRA, NoAdaptation
from ..engine.methods.delta import DeltaAdapter
from ..engine.methods.protocol import Adapter, Method
from ..engine.models.float8 import use_float8
from ..engine.models.paths import records, use_paths
from ..engine.models.stdit3 import Condition
from ..engine.models.vae_fast import use_channels_last, use_plain
from ..engine.recorded import CAPTION_LENGTHS, Records
from ..kernels.attention import MEASURED, Shape, choose, measure, self_attention_shapes
from . import work
from .step_scene import FLOAT8, Scene, describe, describe_path

Row = dict[str, Any]
FARTHEST = 0.05  # of a result from the eager path's, relative; beyond it a row has no time
FIXED = AdaptationSettings(timesteps="sampler", draws=8)


@contextmanager
def on(scene: Scene, name: str) -> Iterator[None]:
    """Compute the layers by a named path for a while; graphs of the path before are forgotten, so they cost no memory."""
    use_paths(scene.experiment.dit, scene.paths(name))
    use_float8(scene.experiment.dit, "all" if name.endswith(FLOAT8) else None)
    try:
        yield
    finally:
        use_paths(scene.experiment.dit, None)
        use_float8(scene.experiment.dit, None)


@contextmanager
def channels(scene: Scene, order: str) -> Iterator[None]:
    """Keep the VAE's channels in an order for a while: plain; last, by `triton`'s kernels or their references, perhaps `compiled`.

    On a CPU always by the references, as the interpreter would take minutes for a chunk; the kernels' own checks run there.
    """
    on_gpu = scene.device.type == "cuda"
    if order != "plain":
        use_channels_last(scene.experiment.vae, "triton" in order and on_gpu, "compiled" in order and on_gpu)
    try:
        yield
    finally:
        use_plain(scene.experiment.vae)


def attention(scene: Scene) -> Row:
    """Measure the attention back ends at the shapes of adapting and sampling, and keep the choice for the other rows."""
    config, window = scene.experiment.dit.config, scene.experiment.window
    heads, dim, dtype = config.num_heads, config.hidden_size // config.num_heads, scene.experiment.dit.dtype
    backends = MEASURED if scene.device.type == "cuda" else ("flash", "math")
    adapted, sampled = scene.grid(window.known_latents), scene.grid(window.latent_frames)
    wanted = [(1, adapted, True), (1, adapted, False), (1, sampled, False), (3, sampled, False)]
    rows: list[Row] = []
    for samples, grid, training in wanted:
        shapes = self_attention_shapes(samples, grid, heads, dim)
        rows += measure(shapes, scene.device, dtype, training=training, backends=backends, runs=5)
    scene.choice = choose(rows)
    # To a caption: recorded only, where `paths` names flash, which takes any number of keys, forward and backward.
    unknown = (window.latent_frames - window.known_latents) * sampled.rows * sampled.cols
    for training in (False, True):
        shape = Shape(1, unknown, scene.length, heads, dim)
        rows += measure([shape], scene.device, dtype, training=training, backends=backends, runs=5)
    return {"backends": rows}


def sampling(path: str, branches: int, reused: bool = False) -> Callable[[Scene], Row]:
    """One evaluation of the guidance branches: a sampling step. reused: one at which the feature cache serves."""

    def run(scene: Scene) -> Row:
        _, C, _, h, w = scene.known.latents.shape
        T = scene.experiment.window.latent_frames
        z = torch.randn(1, C, T, h, w, generator=torch.Generator().manual_seed(2)).to(scene.device)
        t = torch.tensor(600.0, device=scene.device)
        with on(scene, path), torch.no_grad():
            layers, cache = len(scene.experiment.dit.layers), None
            config, size = scene.experiment.dit.config, scene.size
            if reused:  # one pair of layers at each step; the first call computes what all later ones reuse
                first = min(2, layers - 1)
                cache = FeatureCache(every=2**31, first=first, layers=layers)
                config = replace(config, depth=(first + 1) // 2)
            step = denoiser_of(scene, scene.length, cache)
            if reused:
                step(z, t, all_branches=branches == 3)
            row, found = scene.watch.measure(lambda: step(z, t, all_branches=branches == 3))
            row |= compared(scene, f"sampling {branches}", torch.cat(found))
            row |= scene.rates(row["ms"], work.forward(config, branches, scene.grid(T), scene.length, size=size))
            row["path"] = describe(scene, path)
            before = scene.watch.graphs()
            if path != "eager":
                for length in scene.lengths:
                    denoiser_of(scene, length)(z, t, all_branches=branches == 3)
                row |= {"caption_lengths": list(scene.lengths), **scene.watch.graphs(before)}
        return row

    return run


def denoiser_of(scene: Scene, length: int, cache: FeatureCache | None = None) -> Denoiser:
    """The network of the scene's clip with a caption of this length, its known latents given."""
    _, C, K, h, w = scene.known.latents.shape
    T, dit = scene.experiment.window.latent_frames, scene.experiment.dit
    given = torch.zeros(1, C, T, h, w, dtype=scene.known.latents.dtype, device=scene.device)
    mask = torch.zeros_like(given)
    given[:, :, :K], mask[:, :, :K] = scene.known.latents, 1
    geometry, fps = dit.geometry(T, (h, w), scene.experiment.pixel_size, tuple(range(K))), scene.experiment.window.fps
    recorded = (
        Records(velocities_of(dit, geometry, fps), CAPTION_LENGTHS) if not cache and records(dit, "sampling") else None
    )
    return Denoiser(dit, geometry, fps, scene.caption(length), Condition(given, mask), records=recorded, cache=cache)


def compared(scene: Scene, kind: str, found: Tensor) -> Row:
    """Relative distance from what the first row of this kind computed (eager, in the same dtype: it rounds as well)."""
    found = found.detach().float()
    if not found.isfinite().all():
        raise ArithmeticError("the result is not finite")
    if kind not in scene.truth:
        scene.truth[kind] = found.cpu()
        return {}
    truth = scene.truth[kind].to(found.device)
    error = ((found - truth).norm() / truth.norm()).item()
    if not error < FARTHEST:
        raise ArithmeticError(f"relative distance {error:.3g} from the eager path's result, allowed {FARTHEST}")
    return {"distance_from_eager": error}


def training(
    method: Method, path: str, budget: float = 1.0, adaptation: AdaptationSettings | None = None
) -> Callable[[Scene], Row]:
    """Steps of a method on the known latents, by the method's own loop: wall time from step to step, draws and logging included.

    budget: which part of what the compiler would keep for the backward may be kept; the rest is computed again.
    """

    def run(scene: Scene) -> Row:
        experiment = replace(scene.experiment, adaptation=adaptation or scene.experiment.adaptation)
        with on(scene, path), patched_budget(budget):
            few = {"steps": scene.training_steps} if scene.training_steps else {}
            adapter = replace(method, **few).attach(experiment.dit, 0)  # type: ignore[type-var]
            try:
                row, trace = scene.watch.steps(
                    lambda tick: adapter.adapt(task_of(experiment, scene.known), tick), adapter.restore
                )
                row |= {"losses": [trace.losses[0], trace.losses[-1]], "trained": adapter.change().trained}
                row |= compared(scene, f"{method.kind} losses", torch.tensor(trace.losses))
                row |= scene.rates(row["ms"], step_work(scene, method, row["trained"]))
                row["path"] = describe(scene, path)
                if path != "eager":
                    before = scene.watch.graphs()
                    for length in scene.lengths:
                        known = replace(scene.known, prompt=scene.caption(length))
                        task = task_of(experiment, known)
                        task.loss(task.draw(0)).backward()
                    row |= {"caption_lengths": list(scene.lengths), **scene.watch.graphs(before)}
                row["restore_ms"] = scene.watch.once(adapter.restore)
                left = adapter.change().changed
                if left:
                    raise ArithmeticError(f"restoring left {left} numbers changed")
            finally:
                adapter.detach()
                for parameter in experiment.dit.parameters():
                    parameter.grad = None
        return row

    return run


def float8_weights(scene: Scene) -> Row:
    """Quantising every weight anew, as after full fine-tuning, once a clip."""
    dit = scene.experiment.dit
    with on(scene, f"fused{FLOAT8}"), torch.no_grad():
        copies = dit.float8
        assert copies is not None

        def refresh() -> int:
            for _, copy in copies.pairs():
                copy.version = (0, 0)  # no weight's
            return copies.refresh()

        row, count = scene.watch.measure(refresh)
        numbers = sum(linear.weight.numel() for linear, _ in copies.pairs())
        row |= scene.rates(row["ms"], work.Work((scene.size + 1) * numbers, 0))
        return row | {"weights": count, "float8_gib": copies.bytes / 2**30, "path": "quantize_rows, in place"}


def step_work(scene: Scene, method: Method, trained: int) -> work.Work:
    """What a training step must do."""
    config, grid = scene.experiment.dit.config, scene.grid(scene.experiment.window.known_latents)
    if isinstance(method, LoRA):
        return work.lora_step(config, grid, scene.length, method.rank, scene.size)
    return work.full_step(config, grid, scene.length, trained, scene.size)


@contextmanager
def patched_budget(budget: float) -> Iterator[None]:
    before = functorch_config.activation_memory_budget
    functorch_config.activation_memory_budget = budget
    try:
        yield
    finally:
        functorch_config.activation_memory_budget = before


def delta_features(path: str) -> Callable[[Scene], Row]:
    """Features of 8 draws, without gradients."""

    def run(scene: Scene) -> Row:
        experiment = replace(scene.experiment, adaptation=FIXED)
        with on(scene, path):
            adapter = Delta(site="pre").attach(experiment.dit, 0)
            try:
                task = task_of(experiment, scene.known)
                for k in range(8):
                    task.draw(k)
                row, cached = scene.watch.measure(lambda: adapter.cache(task), runs=3)
                row |= compared(scene, "features", torch.cat([c.state.tokens for c in cached]))
                grid = scene.grid(experiment.window.known_latents)
                once = work.forward(experiment.dit.config, 1, grid, scene.length, size=scene.size)
                row |= scene.rates(row["ms"], once.times(8))
                row |= {"ms_a_draw": row["ms"] / 8, "path": describe_path(scene.paths(path))}
            finally:
                adapter.detach()
        return row

    return run


def delta_steps(site: str, fast: bool) -> Callable[[Scene], Row]:
    """Steps on cached features, or the closed form; the features are made before."""

    def run(scene: Scene) -> Row:
        experiment = replace(scene.experiment, adaptation=FIXED)
        closed = site.endswith("closed")
        method = (
            DeltaClosedForm(site="mid") if closed else Delta(site=site, steps=scene.delta_steps)  # type: ignore[arg-type]
        )
        with on(scene, "fused, not compiled" if fast else "eager"):
            adapter = method.attach(experiment.dit, 0)
            try:
                task = task_of(experiment, scene.known)
                cached = scene.truth.get("cached") or adapter.cache(task)
                scene.truth["cached"] = cached
                kept = DeltaAdapter.cache
                DeltaAdapter.cache = lambda self, task: cached  # type: ignore[method-assign]
                try:
                    adapter.adapt(task, lambda step, loss: None)
                    adapter.restore()
                    row, trace = scene.watch.wall(lambda: adapter.adapt(task, lambda step, loss: None), adapter.restore)
                finally:
                    DeltaAdapter.cache = kept  # type: ignore[method-assign]
                row |= {"losses": [trace.losses[0], trace.losses[-1]], "steps": trace.steps}
                row |= compared(scene, f"delta {site}", torch.tensor(trace.losses))
                tokens = sum(c.state.tokens.numel() for c in cached)
                passes = 1 if closed else trace.steps  # each step reads the cached features once
                row |= scene.rates(row["ms"], work.Work(scene.size * tokens * passes, 0))
                row["path"] = "Triton kernels on cached features" if fast else "plain PyTorch on cached features"
            finally:
                adapter.detach()
        return row

    return run


def vae(order: str, what: str) -> Callable[[Scene], Row]:
    """Encode the known frames, or decode the chunks that hold the scored ones. order: plain, last (channels last)."""

    def run(scene: Scene) -> Row:
        experiment, window = scene.experiment, scene.experiment.window
        generator = torch.Generator().manual_seed(3)
        shape = (*scene.known.latents.shape[:2], window.latent_frames, *scene.known.latents.shape[3:])
        latents = torch.randn(shape, generator=generator).to(scene.device)
        with channels(scene, order), torch.no_grad():
            if what == "encode":
                row, found = scene.watch.measure(lambda: encode_known(experiment.vae, scene.pixels, window), runs=3)
            else:
                row, found = scene.watch.measure(lambda: experiment.vae.decode(latents, window.generated), runs=3)
        row |= compared(scene, f"vae {what}", found)
        row |= scene.rates(row["ms"], vae_work(scene, what)) | {
            "path": f"channels {order}" if order != "plain" else order
        }
        return row

    return run


def vae_work(scene: Scene, what: str) -> work.Work:
    """Of encoding the known frames, or of decoding the chunks that hold the generated ones."""
    window, (height, width) = scene.experiment.window, scene.experiment.pixel_size
    config, frames = scene.experiment.vae.config, window.encoded_frames
    pixels, latents = 3 * height * width, config.z_channels * (height // 8) * (width // 8)
    if what == "encode":
        moved = frames * pixels + window.known_latents * latents
        return work.autoencoder(
            config, "encoder", lambda vae: vae.encode(torch.empty(1, 3, frames, height, width)), moved, scene.size
        )
    shape = (1, config.z_channels, window.latent_frames, height // 8, width // 8)
    moved = len(window.generated) * pixels + window.latent_frames * latents
    return work.autoencoder(
        config, "decoder", lambda vae: vae.decode(torch.empty(shape), window.generated), moved, scene.size
    )


def whole(path: str, order: str, adapted: bool) -> Callable[[Scene], Row]:
    """A clip's phases after one another: encode, 20 LoRA steps, 30 sampling steps, decode, restore. Two clips
    before it warm up: the first launches and compiles, the second records."""

    def run(scene: Scene) -> Row:
        experiment, seconds = scene.experiment, {}
        method: Method = LoRA(steps=scene.training_steps or 20) if adapted else NoAdaptation()
        with on(scene, path), channels(scene, order):
            adapter: Adapter = method.attach(experiment.dit, 0)
            try:
                for short in (True, True, False):
                    one = replace(experiment, sampler=replace(experiment.sampler, steps=2, force_steps=0))
                    run_one = one if short else experiment
                    scene.watch.reset_peak()
                    clock = scene.watch.phases()
                    known = replace(scene.known, latents=encode_known(run_one.vae, scene.pixels, run_one.window))
                    clock("encode")
                    if adapted:
                        adapter.adapt(task_of(run_one, known), lambda step, loss: None)
                    clock("adapt")
                    with torch.no_grad():
                        latents, *_ = sample_continuation(run_one, known, adapter, lambda *_: None)
                        clock("sample")
                        pixels = run_one.vae.decode(latents, run_one.window.generated)
                    clock("decode")
                    adapter.restore()
                    clock("restore")
                    seconds = dict(clock.seconds)  # type: ignore[attr-defined]
                if not pixels.isfinite().all():
                    raise ArithmeticError("the decoded frames are not finite")
                row = {"seconds": seconds, "ms": 1e3 * sum(seconds.values()), "peak_gib": scene.watch.peak()}
                row["path"] = f"{describe_path(scene.paths(path))}; VAE channels {order}"
            finally:
                adapter.detach()
        return row

    return run


LORA, FULL = LoRA(steps=8), FullFineTuning(steps=6)

ROWS: dict[str, Callable[[Scene], Row]] = {
    "attention": attention,
    "sample3 eager": sampling("eager", 3),
    "sample3 fused": sampling("fused", 3),
    "sample3 fused, not compiled": sampling("fused, not compiled", 3),
    "vae encode plain": vae("plain", "encode"),
    "vae encode last triton": vae("last triton", "encode"),
    "vae decode plain": vae("plain", "decode"),
    "vae decode last triton": vae("last triton", "decode"),
    "lora eager": training(LORA, "eager"),
    "lora fused": training(LORA, "fused"),
    "lora fused, not compiled": training(LORA, "fused, not compiled"),
    "delta features eager": delta_features("eager"),
    "delta features fused, not compiled": delta_features("fused, not compiled"),
    "delta steps pre eager": delta_steps("pre", fast=False),
    "delta steps pre fast": delta_steps("pre", fast=True),
    "delta steps mid eager": delta_steps("mid", fast=False),
    "delta steps mid fast": delta_steps("mid", fast=True),
    "delta closed": delta_steps("mid closed", fast=False),
    "sample1 eager": sampling("eager", 1),
    "sample1 fused": sampling("fused", 1),
    "sample3 fused, reused": sampling("fused", 3, reused=True),
    "sample1 fused, reused": sampling("fused", 1, reused=True),
    "full eager": training(FULL, "eager"),
    "full fused": training(FULL, "fused"),
    "clip lora fused": whole("fused", "last triton", adapted=True),
    "clip lora fused, not compiled": whole("fused, not compiled", "last triton", adapted=True),
    "sample3 fused, float8": sampling(f"fused{FLOAT8}", 3),
    "sample1 fused, float8": sampling(f"fused{FLOAT8}", 1),
    "sample3 fused, not compiled, float8": sampling(f"fused, not compiled{FLOAT8}", 3),
    "lora fused, float8": training(LORA, f"fused{FLOAT8}"),
    "lora fused, not compiled, float8": training(LORA, f"fused, not compiled{FLOAT8}"),
    "float8 weights": float8_weights,
    "sample3 compiled": sampling("compiled", 3),
    "sample3 compiled + attention": sampling("compiled + attention", 3),
    "lora compiled": training(LORA, "compiled"),
    "lora compiled + attention": training(LORA, "compiled + attention"),
    "lora fused, budget 0.7": training(LORA, "fused", budget=0.7),
    "full compiled": training(FULL, "compiled"),
    "lora fused, launched": training(LORA, "fused, launched"),
    "full fused, launched": training(FULL, "fused, launched"),
    "full fused, not compiled": training(FULL, "fused, not compiled"),
    "sample1 fused, launched": sampling("fused, launched", 1),
    "lora fused, not compiled, half hidden again": training(LORA, "fused, not compiled, half hidden again"),
    "lora fused, half hidden again": training(LORA, "fused, half hidden again"),
    "lora fused, not compiled, hidden again": training(LORA, "fused, not compiled, hidden again"),
    "full fused, not compiled, rotation again": training(FULL, "fused, not compiled, rotation again"),
    "delta features fused": delta_features("fused"),
    "sample3 fused - gelu": sampling("fused - gelu", 3),
    "sample3 fused - attention": sampling("fused - attention", 3),
    "sample1 fused, not compiled": sampling("fused, not compiled", 1),
    "vae decode last compiled": vae("last compiled", "decode"),
    "vae decode last": vae("last", "decode"),
    "clip none eager": whole("eager", "plain", adapted=False),
    "clip lora eager": whole("eager", "plain", adapted=True),
}
"""In the order of what is asked first; what needs an eager row's result stands after it."""
