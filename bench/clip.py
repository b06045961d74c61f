"""A whole clip, phase by phase: each method at STDiT3-XL/2 on each path, with the quality of the small model on the same path.

Run: python -m vidtta.bench.clip [--out FILE.json] [--only NAME ...] [--minutes M]          (needs a GPU; no data)
     python -m vidtta.bench.clip --check        (CPU: a small network; checks, no timings that mean anything)

The full-size weights and frames are random: cost, never quality. 640x480, 45 frames at 24 fps, 22 of them known; 20 steps of adaptation and
30 of sampling, v1.3's defaults. Each row first runs a clip with one step of sampling, so that compiling and what happens once a
process is in `first_s`. After each row the weights must be bit for bit as before; `--twice` also runs each clip twice and compares
the latents' bits. Quality (clip_quality.py) comes from `--clips` clips of the small trained model.

`inference_speedup_from_cached_activations`: how many times longer adapting and sampling would take if nothing were kept: keys and
values of the captions between steps, features of the delta's draws, the layers before the first adapted one. Each of these is
timed once on the row's path, and multiplied by how often a step would compute it again.

`cached every N` in a row's name: with the feature cache (`sampler.cache_every`), which changes the video; `psnr_to_exact` says how much.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..engine.adaptation import AdaptationSettings
from ..engine.clip import Experiment, Known, continue_clip, encode_known, task_of
from ..engine.determinism import make_deterministic
from ..engine.methods import AnyMethod, Delta, DeltaClosedForm, FullFineTuning, LoRA, NoAdaptation
from . import record, suite
from .suite import Row

if TYPE_CHECKING:
    from .clip_quality import Quality
    from .step_scene import Scene

FIXED_DRAWS = AdaptationSettings(timesteps="sampler", draws=16)
CASES: dict[str, tuple[AnyMethod, AdaptationSettings]] = {
    "none": (NoAdaptation(), AdaptationSettings()),
    "lora": (LoRA(steps=20, rank=16), AdaptationSettings()),
    "delta_pre": (Delta(steps=20, site="pre"), FIXED_DRAWS),
    "full": (FullFineTuning(steps=20, lr=1e-5), AdaptationSettings()),
    "lora_last_14": (LoRA(steps=20, rank=16, last_layers=14, cache_prefix=True), AdaptationSettings(draws=4)),
    "delta_mid_closed": (DeltaClosedForm(site="mid"), FIXED_DRAWS),
    "delta_post_closed": (DeltaClosedForm(site="post"), FIXED_DRAWS),
}


@dataclass
class Clips:
    """What the rows run on. quality: of the small model, or why there is none."""

    scene: "Scene"
    quality: "Quality | str"
    twice: bool = False
    small: bool = False


def clip(name: str, path: str, every: int = 1) -> Callable[[Clips], Row]:
    """One method on one path. every: the feature cache's interval."""

    def run(clips: Clips) -> Row:
        from ..engine.models.checkpoint import state_hash
        from .clip_quality import PATHS, path_of, reused_share
        from .step_scene import describe

        scene = clips.scene
        method, adaptation = CASES[name]
        if clips.small:
            method, adaptation = reduced(method, len(scene.experiment.dit.layers)), replace(adaptation, draws=2)
        method.check(adaptation)
        cached = {"cache_every": every, "cache_first": 1 if clips.small else 2} if every > 1 else {}
        sampler = replace(scene.experiment.sampler, **cached)
        experiment = replace(scene.experiment, adaptation=adaptation, sampler=sampler)
        short = replace(experiment, sampler=replace(experiment.sampler, steps=2, force_steps=1))
        before, seconds = state_hash(experiment.dit), {}
        with path_of(scene, path):
            start = scene.watch.now()
            known = replace(scene.known, latents=encode_known(experiment.vae, scene.pixels, experiment.window))
            adapter: Any = method.attach(experiment.dit, experiment.seed)
            try:
                continue_clip(short, known, adapter)
                first = scene.watch.now() - start
                continue_clip(short, known, adapter)  # records what the first one launched
                scene.watch.reset_peak()
                clock = scene.watch.phases()
                known = replace(known, latents=encode_known(experiment.vae, scene.pixels, experiment.window))
                clock("encode")
                encoding_peak = scene.watch.peak()
                outcome = continue_clip(experiment, known, adapter)
                clock("all")
                if not outcome.pixels.isfinite().all():
                    raise ArithmeticError("the decoded frames are not finite")
                restoring = scene.watch.once(adapter.restore) / 1e3
                seconds = {"encode": clock.seconds["encode"], **outcome.seconds, "restore": restoring}
                row: Row = {
                    "ms": 1e3 * sum(seconds.values()), "seconds": seconds, "first_s": first,
                    "ms_a_step": 1e3 * outcome.seconds["adapt"] / max(outcome.trace.steps, 1), "steps": outcome.trace.steps,
                    "peak_gib": max(encoding_peak, (outcome.peak_memory_bytes or 0) / 2**30), "trained": outcome.change.trained,
                    "losses": outcome.trace.losses[:1] + outcome.trace.losses[-1:],
                    "path": f"{describe(scene, PATHS[path][0])}; VAE channels {PATHS[path][1]}",
                }  # fmt: skip
                if cached:
                    row |= {"layers": outcome.layers, "layers_reused": reused_share(outcome.layers)}
                if clips.twice:
                    again = continue_clip(experiment, known, adapter)
                    row["same_bits_twice"] = bool(torch.equal(again.latents, outcome.latents))
                row |= speedup(scene, experiment, known, adapter, outcome.seconds)
            finally:
                adapter.detach()
        if state_hash(experiment.dit) != before:
            raise RuntimeError("the weights are not bit for bit those of before the row")
        return row | quality_of(clips, name, path, **cached)

    return run


def reduced(method: AnyMethod, layers: int) -> AnyMethod:
    """The method for a network of few and narrow layers, in few steps."""
    if isinstance(method, LoRA):
        last = method.last_layers if method.last_layers == "all" else layers // 2
        return replace(method, steps=2, rank=3, last_layers=last)
    return replace(method, steps=2) if isinstance(method, FullFineTuning | Delta) else method


def quality_of(clips: Clips, name: str, path: str, **cached: int) -> Row:
    """PSNR, SSIM, temporal consistency, and PSNR to the plain path; a reason where they cannot be had. cached: keys of the sampler."""
    if isinstance(clips.quality, str):
        return {"quality_absent": clips.quality}
    try:
        return clips.quality.measure(name, path, **cached)
    except Exception as error:  # the row's cost stands without it
        return {"quality_absent": suite.reason(error)}


@torch.no_grad()
def speedup(scene: "Scene", experiment: Experiment, known: Known, adapter: Any, seconds: dict[str, float]) -> Row:
    """Seconds that kept activations save a clip, by what is kept, and how many times longer it would take without."""
    dit, task = experiment.dit, None
    settings, steps = adapter.settings if adapter.steps else None, adapter.steps

    def once(call: Callable[[], Any]) -> float:
        return scene.watch.measure(call, 3)[0]["ms"] / 1e3

    captions = once(lambda: (dit.text_states(known.prompt), dit.text_states(dit.null_caption(known.prompt))))
    saved = {"captions, sampling": captions * (experiment.sampler.steps - 1)}
    if settings is not None:
        task = task_of(experiment, known)
    if isinstance(settings, LoRA) and task is not None:
        saved["captions, adapting"] = captions * (steps - 1)
        if settings.cache_prefix and isinstance(experiment.adaptation.draws, int):
            draw, text = task.draw(0), task.captions()
            prefix = once(lambda: dit.run_layers(task.embed(draw), *text, task.geometry, 0, adapter.cut))
            saved["layers before the first adapted"] = prefix * max(steps - experiment.adaptation.draws, 0)
    if isinstance(settings, Delta) and task is not None:  # each step's loss is over all draws
        saved["features"] = once(lambda: adapter.cache(task)) * (steps - 1)
    taken = seconds["adapt"] + seconds["sample"]
    return {
        "saved_s": saved,
        "inference_speedup_from_cached_activations": (taken + sum(saved.values())) / taken,
    }


ROWS: dict[str, Callable[[Clips], Row]] = {
    **{f"clip {name} {path}": clip(name, path) for name in CASES for path in ("plain", "fast")},
    **{f"clip {name} compiled": clip(name, "compiled") for name in ("none", "lora")},
    **{f"clip {name} float8": clip(name, "float8") for name in ("none", "lora", "full", "delta_pre")},
    **{
        f"clip {name} fast, cached every {n}": clip(name, "fast", n)
        for name in ("none", "lora", "delta_pre")
        for n in (2, 3)
    },
}


def main() -> None:
    parser = suite.parser("clip", __doc__, minutes=8.0)
    parser.add_argument(
        "--clips", type=int, default=2, help="clips of the small model that quality is measured on; 0 for none"
    )
    parser.add_argument("--twice", action="store_true", help="also run each clip twice and compare bits")
    parser.add_argument("--nondeterministic", action="store_true", help="let torch choose algorithms freely")
    arguments = parser.parse_args()
    names = suite.chosen(list(ROWS), arguments.only)
    if arguments.list:
        print("\n".join(names))
        return
    if not arguments.nondeterministic:
        make_deterministic()
    from .step_rows import attention
    from .step_scene import real_scene, small_scene

    device = suite.device(arguments.check)
    about = record.environment(device, arguments.commit) | {"deterministic": not arguments.nondeterministic}
    print(json.dumps(about), flush=True)
    scene = small_scene(device) if arguments.check else real_scene(device)
    attention(scene)

    def write(rows: list[Row]) -> None:
        if arguments.out:
            record.write(arguments.out, "clip", about, rows)

    clips = Clips(scene, small_model(arguments, device, scene), arguments.twice, arguments.check)
    suite.finish(suite.run(ROWS, names, clips, 60 * arguments.minutes, write))


def small_model(arguments: argparse.Namespace, device: torch.device, scene: "Scene") -> "Quality | str":
    """What quality is measured on, or why it is not."""
    if arguments.clips < 1:
        return "not asked for"
    try:
        from .clip_quality import Quality

        dtype, short = scene.experiment.dit.dtype, arguments.check
        return Quality(device, dtype, 1 if short else arguments.clips, steps=2 if short else 12, short=short)
    except Exception as error:  # a machine without safetensors, say
        return suite.reason(error)


if __name__ == "__main__":
    main()
