"""Does adapting help? Every method and its placebos on the small trained model: settings chosen on one set, reported on another.

Run: python -m vidtta.bench.quality --out FILE.json [--weights DIR] [--clips N] [--tuning N] [--frames FILE.npz] [--processes N]

Stages, each printed and written when it is done: the sampler's settings on familiar tuning clips; each method's settings on shifted
tuning clips, by mean PSNR; then, with these, every method and both placebos on shifted test clips; no adaptation on familiar test
clips; and the same comparison on `--frames`, real clips as an .npz of `frames` [n, F, 3, H, W] uint8 and their `captions`.
Clips go to worker processes, one clip and arm at a time, through the engine's own `continue_clip`.
"""

import argparse
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.adaptation import AdaptationSettings
from ..engine.arms import PLACEBOS, Placebo
from ..engine.clip import Experiment, Known, continue_clip, encode_known
from ..engine.data.video import to_model
from ..engine.demo.world import DOMAINS, build_scene, captions, clip_numbers, frames_of
from ..engine.determinism import make_deterministic
from ..engine.environment import describe_environment
from ..engine.files import write_json
from ..engine.methods import AnyMethod, Delta, DeltaClosedForm, FullFineTuning, LoRA, NoAdaptation
from ..engine.metrics.score import score_frames
from ..engine.models.load import EMBEDDED, load_dit, load_vae
from ..engine.models.stdit3 import Caption
from ..engine.references import begin_reference_scores
from ..engine.sampler import SamplerSettings
from ..engine.seeds import seed_for
from ..engine.text.encoder import EmbeddedText
from ..engine.window import Window

HEIGHT, WIDTH = 96, 128
WINDOW = Window()
ADAPTATION = AdaptationSettings(timesteps="sampler", draws=16)
SAMPLERS = {
    f"steps={steps} text={text} image={image} sdedit={sdedit}": SamplerSettings(
        steps=steps, text_guidance=text, image_guidance=image, sdedit=sdedit
    )
    for steps, text, image, sdedit in (
        (10, 1.0, 1.0, True),
        (10, 1.0, 1.0, False),
        (12, 1.0, 1.0, False),
        (10, 1.0, 1.5, False),
    )
}
GRID: dict[str, Sequence[AnyMethod]] = {
    "full": [FullFineTuning(steps=20, lr=lr) for lr in (1e-5, 3e-5, 1e-4)],
    "lora": [LoRA(steps=20, lr=lr, rank=8, alpha=8.0) for lr in (1e-4, 3e-4, 1e-3)],
    "delta": [
        Delta(steps=20, site="pre", lr=1e-2),
        Delta(steps=20, site="pre", lr=3e-2),
        Delta(steps=20, site="mid", lr=1e-2),
    ],
    "delta_closed_form": [
        DeltaClosedForm(site="mid", ridge=1e-2),
        DeltaClosedForm(site="mid", ridge=1e-1),
        DeltaClosedForm(site="post", ridge=1e-1),
    ],
}


@dataclass(frozen=True)
class Job:
    """One clip through one arm. source: "DOMAIN/SPLIT" or the path of an .npz; count: clips of the source, in a circle for placebos."""

    source: str
    index: int
    count: int
    arm: str
    method: AnyMethod
    sampler: SamplerSettings
    placebo: Placebo | None = None
    references: bool = False


class Worker:
    """The models of one process, on one card or on the CPU."""

    def __init__(self, weights: str, number: int) -> None:
        cards = torch.cuda.device_count()
        self.device = torch.device("cuda", number % cards) if cards else torch.device("cpu")
        torch.set_num_threads(1)
        make_deterministic()
        root = EMBEDDED if weights == "embedded" else Path(weights)
        self.dit = load_dit(str(root / "dit"), self.device, torch.float32)
        self.vae = load_vae(str(root / "vae"), self.device, torch.float32)
        self.text = EmbeddedText(self.dit.config.caption_channels, table_file=root / "text" / "table.safetensors")
        self.frames: dict[str, Any] = {}

    def clip(self, source: str, index: int) -> tuple[str, Tensor, str]:
        """Id, uint8 frames [F, 3, H, W] and caption."""
        if source.endswith(".npz"):
            if source not in self.frames:
                self.frames[source] = dict(np.load(source))
            held = self.frames[source]
            return str(held["ids"][index]), torch.from_numpy(held["frames"][index]), str(held["captions"][index])
        domain, split = source.split("/")
        scene = build_scene(DOMAINS[domain], clip_numbers(domain, split, [index]))
        frames = frames_of(scene, WINDOW.total_frames, WINDOW.fps, HEIGHT, WIDTH)[0]
        return f"{domain}-{split}-{index:06d}", frames, captions(scene)[0]

    def known(self, source: str, index: int) -> tuple[Known, Tensor]:
        name, frames, caption = self.clip(source, index)
        pixels = to_model(frames).to(self.device)
        embedding = self.text.encode([caption])[0].embedding[None].to(self.device)
        return Known(name, encode_known(self.vae, pixels, WINDOW), Caption(embedding)), pixels

    def run(self, job: Job) -> dict[str, Any]:
        known, pixels = self.known(job.source, job.index)
        experiment = Experiment(self.dit, self.vae, WINDOW, (HEIGHT, WIDTH), job.sampler, ADAPTATION, seed=0)
        truth = pixels[:, WINDOW.scored.start : WINDOW.scored.stop]
        adapter = job.method.attach(self.dit, 0)
        random = torch.Generator(self.device).manual_seed(seed_for(0, known.clip_id, "placebo"))
        try:
            outcome = continue_clip(
                experiment,
                known,
                adapter,
                adapt_on=self.known(job.source, (job.index + 1) % job.count)[0]
                if job.placebo == "other_clip"
                else None,
                randomize=random if job.placebo == "random" else None,
            )
        finally:
            adapter.detach()
        scores = score_frames(outcome.pixels, truth, lpips=None, lpips_reason="not measured here")
        row = {"arm": job.arm, "clip": known.clip_id, "psnr": scores["psnr"]["mean"], "ssim": scores["ssim"]["mean"]}
        row |= {f"{name}_seconds": seconds for name, seconds in outcome.seconds.items()}
        row["losses"] = outcome.trace.losses[:1] + outcome.trace.losses[-1:]
        if job.references:
            begun = begin_reference_scores(self.vae, pixels, None, WINDOW, None, "not measured here")
            for name, found in begun(1).items():
                row[name] = {measure: found[measure]["mean"] for measure in ("psnr", "ssim")}
        return row


_worker: Worker | None = None


def _start(weights: str, numbers: Any) -> None:
    global _worker
    _worker = Worker(weights, numbers.get())


def _run(job: Job) -> dict[str, Any]:
    assert _worker is not None
    return _worker.run(job)


def mean(rows: Sequence[dict[str, Any]], arm: str, measure: str = "psnr") -> float:
    values = [row[measure] for row in rows if row["arm"] == arm]
    return sum(values) / len(values)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the arms' means, and their gain on the first arm."""
    print(f"\n{title}")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    base = {row["clip"]: row["psnr"] for row in rows if row["arm"] == arms[0]}
    for arm in arms:
        gains = [row["psnr"] - base[row["clip"]] for row in rows if row["arm"] == arm]
        wins = sum(gain > 0 for gain in gains) / len(gains)
        error = float(np.std(gains) / len(gains) ** 0.5)
        seconds = mean(rows, arm, "adapt_seconds"), mean(rows, arm, "sample_seconds")
        print(
            f"{arm:45s} n {len(gains):3d}  PSNR {mean(rows, arm):6.2f}  SSIM {mean(rows, arm, 'ssim'):.4f}  "
            f"gain {sum(gains) / len(gains):+.3f} +- {error:.3f}  wins {wins:.2f}  adapt {seconds[0]:.2f} s  sample {seconds[1]:.2f} s"
        )
    for name in ("copy_last_frame", "vae_ceiling"):
        if found := [row[name] for row in rows if name in row]:
            print(name, {m: round(sum(f[m] for f in found) / len(found), 4) for m in ("psnr", "ssim")})


def comparison(source: str, count: int, arms: dict[str, AnyMethod], sampler: SamplerSettings) -> Iterator[Job]:
    """Every arm and both placebos of each that adapts, on every clip."""
    for index in range(count):
        yield Job(source, index, count, "none", NoAdaptation(), sampler, references=True)
        for arm, method in arms.items():
            yield Job(source, index, count, arm, method, sampler)
            for placebo in PLACEBOS:
                yield Job(source, index, count, f"{arm}-{placebo}", method, sampler, placebo)


def describe(value: Any) -> dict[str, Any]:
    return {"kind": getattr(value, "kind", None)} | dataclasses.asdict(value)


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m vidtta.bench.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON of every clip's scores")
    parser.add_argument(
        "--weights", default="embedded", help="folder with vae, dit and text; by default those of the package"
    )
    parser.add_argument("--clips", type=int, default=64, help="test clips of each domain")
    parser.add_argument("--tuning", type=int, default=16, help="tuning clips")
    parser.add_argument("--frames", help="an .npz of real clips")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--commit", help="the code's commit, where the machine has no checkout to ask")
    arguments = parser.parse_args()
    environment = describe_environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    record: dict[str, Any] = {"environment": environment | ({"commit": arguments.commit} if arguments.commit else {})}

    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(arguments.processes):
        numbers.put(number)
    start = time.perf_counter()
    with context.Pool(arguments.processes, _start, (arguments.weights, numbers)) as pool:

        def stage(name: str, jobs: list[Job]) -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = []
            for done, row in enumerate(pool.imap_unordered(_run, jobs), start=1):
                rows.append(row)
                if done % 200 == 0:  # what a stage that is cut off has done is kept
                    write_json(arguments.out, record | {f"{name}, unfinished": rows})
            order = {arm: k for k, arm in enumerate(dict.fromkeys(job.arm for job in jobs))}
            rows.sort(key=lambda row: (order[row["arm"]], row["clip"]))
            show(f"{name} ({time.perf_counter() - start:.0f} s)", rows)
            record[name] = rows
            write_json(arguments.out, record)
            return rows

        few = range(arguments.tuning)
        rows = stage(
            "sampler, familiar tuning",
            [
                Job("familiar/tuning", i, len(few), name, NoAdaptation(), sampler)
                for i in few
                for name, sampler in SAMPLERS.items()
            ],
        )
        sampler = SAMPLERS[max(SAMPLERS, key=lambda name: mean(rows, name))]
        candidates = {f"{arm} {k}": method for arm, methods in GRID.items() for k, method in enumerate(methods)}
        jobs = [Job("shifted/tuning", i, len(few), "none", NoAdaptation(), sampler) for i in few]
        jobs += [
            Job("shifted/tuning", i, len(few), name, method, sampler)
            for i in few
            for name, method in candidates.items()
        ]
        rows = stage("methods, shifted tuning", jobs)
        arms = {
            arm: candidates[max((n for n in candidates if n.split()[0] == arm), key=lambda name: mean(rows, name))]
            for arm in GRID
        }
        record["candidates"] = {name: describe(method) for name, method in candidates.items()}
        record["chosen"] = {"sampler": describe(sampler), **{arm: describe(method) for arm, method in arms.items()}}
        print(json.dumps(record["chosen"]))
        clips = arguments.clips
        stage("shifted test", list(comparison("shifted/test", clips, arms, sampler)))
        stage(
            "familiar test",
            [Job("familiar/test", i, clips, "none", NoAdaptation(), sampler, references=True) for i in range(clips)],
        )
        if arguments.frames:
            count = len(np.load(arguments.frames)["ids"])
            stage("real clips", list(comparison(arguments.frames, count, arms, sampler)))


if __name__ == "__main__":
    main()
