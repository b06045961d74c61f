"""How many graphs are compiled, and how many break, over many clips whose captions have many lengths. It should be none after the first.

Run: python -m vidtta.bench.compiles [--clips 100] [--out FILE.json] [--only NAME ...] [--minutes M]     (needs a GPU)
     python -m vidtta.bench.compiles --check        (CPU: a small network, traced but not compiled to machine code)

Each clip is adapted to (two steps; `none`: not at all), sampled (a step of three branches and one of a single branch) and restored,
by the engine's own functions, with latents, noise and a caption of its own. `graphs_first` is what the first clip compiles,
`graphs_more` and `breaks_more` what the others add; `ms` is the median of a clip after the first. CUDA graphs are recorded when a
length of caption comes for the second time: `last_recording` is the number of the last clip that did, of `recordings`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from . import suite
from .suite import Row

if TYPE_CHECKING:
    from .step_scene import Scene

LENGTHS = 5


def clips(method: str, path: str, count: int) -> Callable[["Scene"], Row]:
    """So many clips by a method, on a path."""

    def run(scene: "Scene") -> Row:
        import statistics

        import torch

        from ..engine.clip import sample_continuation, task_of
        from ..engine.methods import FullFineTuning, LoRA, NoAdaptation
        from ..engine.recorded import Recorded
        from .step_rows import on
        from .step_scene import describe_path

        longest = scene.experiment.dit.config.model_max_length
        lengths = [round(longest * part / LENGTHS) for part in range(1, LENGTHS + 1)]
        short = replace(scene.experiment, sampler=replace(scene.experiment.sampler, steps=2, force_steps=1))
        times, first, before = [], scene.watch.graphs(), scene.watch.graphs()
        made, recorded = Recorded.made, [0]
        with on(scene, path):
            methods = {"none": NoAdaptation(), "lora": LoRA(steps=2), "full": FullFineTuning(steps=2)}
            adapter = methods[method].attach(short.dit, 0)
            try:
                for index in range(count):
                    start = scene.watch.now()
                    generator = torch.Generator().manual_seed(index)
                    noise = torch.randn(scene.known.latents.shape, generator=generator).to(scene.known.latents)
                    known = replace(
                        scene.known,
                        clip_id=f"clip {index}",
                        latents=scene.known.latents + 0.1 * noise,
                        prompt=scene.caption(lengths[index % LENGTHS]),
                    )
                    if adapter.steps:
                        adapter.adapt(task_of(short, known), lambda step, loss: None)
                    with torch.no_grad():
                        latents, *_ = sample_continuation(short, known, adapter, lambda *_: None)
                    adapter.restore()
                    if not latents.isfinite().all():
                        raise ArithmeticError(f"the latents of clip {index} are not finite")
                    times.append((scene.watch.now() - start) * 1e3)
                    recorded.append(Recorded.made - made)
                    if index == 0:
                        first, before = scene.watch.graphs(first), scene.watch.graphs()
            finally:
                adapter.detach()
        return {
            "ms": statistics.median(times[1:]), "times": times[1:], "first_s": times[0] / 1e3, "peak_gib": scene.watch.peak(),
            "clips": count, "caption_lengths": lengths, "graphs_first": first["graphs_more"],
            **scene.watch.graphs(before), "recordings": recorded[-1], "last_recording": recorded.index(recorded[-1]),
            "path": describe_path(scene.paths(path)),
        }  # fmt: skip

    return run


def rows(count: int) -> dict[str, Callable[["Scene"], Row]]:
    """By method and path."""
    return {
        f"compiles {method} {path}": clips(method, path, count)
        for path in ("fused, not compiled", "fused", "compiled")
        for method in ("lora", "full", "none")
    }


def main() -> None:
    parser = suite.parser("compiles", __doc__, minutes=8.0)
    parser.add_argument("--clips", type=int, default=100, help="how many; at least 2")
    arguments = parser.parse_args()
    if arguments.clips < 2:
        parser.error(f"--clips should be at least 2, was {arguments.clips}")
    known = rows(arguments.clips)
    names = suite.chosen(list(known), arguments.only)
    if arguments.list:
        print("\n".join(names))
        return

    from . import record
    from .step_rows import attention
    from .step_scene import real_scene, small_scene

    device = suite.device(arguments.check)
    about = record.environment(device, arguments.commit)
    scene = small_scene(device) if arguments.check else real_scene(device)
    attention(scene)

    def write(done: list[Row]) -> None:
        if arguments.out:
            record.write(arguments.out, "compiles", about, done)

    suite.finish(suite.run(known, names, scene, 60 * arguments.minutes, write))


if __name__ == "__main__":
    main()
