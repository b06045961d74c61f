"""How long a fresh process takes to its first sampling step and its first training step: with an empty compile cache, then with a warm one.

Run: python -m vidtta.bench.start [--out FILE.json] [--only NAME ...] [--path fused] [--minutes M]     (needs a GPU; no weights, no data)
     python -m vidtta.bench.start --check        (CPU: a small network; checks, no timings that mean anything)

Each row is two processes. The first finds the caches of torch.compile and of Triton empty and measures attention; the second finds
what the first left, as the second task of an array does, and reads which attention to use. `seconds` of a row: until torch and the
engine are imported, until the network stands on the device, and until the step is done; `ms` is their sum, `steady_ms` the same
step again. Both processes must compute the same, or the warm row has no time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import suite
from .suite import Row

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
TARGETS = {"cold": None, "warm": 20.0}
"""Seconds that a start may take."""
DIFFERENCE = (
    1e-2  # between the results of the two processes, relative; kernels that are chosen by timing may round differently
)


@dataclass
class Starts:
    """Where caches live, and what the cold processes found. program: what is started."""

    folder: Path
    path: str
    check: bool
    limit: float
    program: list[str] = field(default_factory=lambda: [sys.executable, "-m", "vidtta.bench.start"])
    found: dict[str, float] = field(default_factory=dict)


def start(work: str, cache: str) -> Callable[[Starts], Row]:
    """A process to its first step of `work` (sampling, training). cache: cold, warm; the latter follows the former."""

    def run(starts: Starts) -> Row:
        if cache == "warm" and work not in starts.found:
            raise suite.Absent("there is no cold start before it, which would have filled the cache")
        folder = starts.folder / work
        folder.mkdir(exist_ok=True)
        environment = os.environ | {name: str(folder / part) for name, part in CACHES.items()}
        command = [*starts.program, "--child", work, "--caches", str(folder), "--path", starts.path]
        command += ["--check"] if starts.check else []
        done = subprocess.run(
            [*command, "--began", repr(time.time())],
            capture_output=True,
            text=True,
            env=environment,
            timeout=starts.limit,
        )
        if done.returncode:
            raise RuntimeError(f"the process ended with status {done.returncode}: {done.stderr[-400:]}")
        row: Row = json.loads(done.stdout.splitlines()[-1])
        value = row.pop("value")
        if cache == "warm":
            distance = abs(value - starts.found[work]) / abs(starts.found[work])
            if not distance <= DIFFERENCE:
                raise ArithmeticError(
                    f"relative distance {distance:.3g} from the cold process's result, allowed {DIFFERENCE}"
                )
            row["against"] = {"distance": distance, "allowed": DIFFERENCE}
        else:
            starts.found[work] = value
        return row | {"target_s": TARGETS[cache], "work": work, "cache": cache}

    return run


ROWS = {f"start {work} {cache}": start(work, cache) for work in ("sampling", "training") for cache in ("cold", "warm")}


def child(arguments: argparse.Namespace) -> None:
    """Be the process that is timed; prints its row as the last line."""
    import torch

    from ..engine.clip import task_of
    from ..engine.methods import LoRA
    from ..kernels.attention import Choice
    from .step_rows import attention, denoiser_of, on
    from .step_scene import describe_path, real_scene, small_scene

    device = suite.device(arguments.check)
    seconds = {"imports": time.time() - arguments.began}
    scene = small_scene(device) if arguments.check else real_scene(device)
    if arguments.check:
        scene.compiler = "aot_eager"
    scene.watch.now()
    seconds["network"] = time.time() - arguments.began - sum(seconds.values())
    # What conditions is drawn: encoding it by the VAE would be another start.
    config, window, size = scene.experiment.vae.config, scene.experiment.window, scene.experiment.pixel_size
    shape = (1, config.z_channels, window.known_latents, size[0] // 8, size[1] // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, scene.experiment.dit.dtype)
    scene.set_known(latents)
    chosen = arguments.caches / "attention.json"
    if chosen.exists():
        scene.choice = Choice.from_json(chosen.read_text())
    else:
        attention(scene)
        assert scene.choice is not None
        chosen.write_text(scene.choice.to_json())
    scene.watch.now()
    seconds["attention"] = time.time() - arguments.began - sum(seconds.values())
    with on(scene, arguments.path):
        if arguments.child == "sampling":
            z = torch.randn(
                *shape[:2], window.latent_frames, *shape[3:], generator=torch.Generator().manual_seed(2)
            ).to(device)
            with torch.no_grad():
                step = denoiser_of(scene, scene.length)

                def work() -> float:
                    return torch.cat(step(z, torch.tensor(600.0, device=device), all_branches=True)).norm().item()

                value = work()
                done = time.time()
                steady, _ = scene.watch.measure(work, 2)
        else:
            adapter, ticks = LoRA(steps=4).attach(scene.experiment.dit, 0), []

            def tick(step: int, loss: float) -> None:
                scene.watch.now()
                ticks.append(time.time())

            value = adapter.adapt(task_of(scene.experiment, scene.known), tick).losses[0]
            done = ticks[0]  # the second step is recorded on a card, the last one replayed
            steady = {"ms": 1e3 * (ticks[-1] - ticks[-2]), "peak_gib": scene.watch.peak()}
    seconds["first step"] = done - arguments.began - sum(seconds.values())
    row: dict[str, Any] = {
        "ms": 1e3 * (done - arguments.began), "seconds": seconds, "steady_ms": steady["ms"],
        "compile_s": seconds["first step"] - steady["ms"] / 1e3, "value": value, "peak_gib": steady["peak_gib"],
        "path": describe_path(scene.paths(arguments.path)),
    }  # fmt: skip
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = suite.parser("start", __doc__, minutes=8.0)
    parser.add_argument("--path", default="fused", help="how layers are computed, as in the steps suite")
    parser.add_argument("--child", choices=("sampling", "training"), help=argparse.SUPPRESS)
    parser.add_argument("--caches", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    names = suite.chosen(list(ROWS), arguments.only)
    if arguments.list:
        print("\n".join(names))
        return

    from . import record

    about = record.environment(suite.device(arguments.check), arguments.commit)
    with tempfile.TemporaryDirectory() as folder:
        starts = Starts(Path(folder), arguments.path, arguments.check, 60 * arguments.minutes)

        def write(rows: list[Row]) -> None:
            if arguments.out:
                record.write(arguments.out, "start", about, rows)

        suite.finish(suite.run(ROWS, names, starts, 60 * arguments.minutes, write))


if __name__ == "__main__":
    main()
