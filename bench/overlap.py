"""What reading and finishing clips beside the device's work gives, and what it costs the device's own phases; STDiT3-XL/2.

Run: python -m vidtta.bench.overlap --clips 4 --method lora --out FILE.json      (needs a GPU; no weights, no data)
     python -m vidtta.bench.overlap --check                                      (CPU: a small network; no timing that means anything)

Clips in turn, overlapped, overlapped, in turn, in one process after two to warm up, with engine/overlap.py as a run has it: frames are
scaled from 320x240, encoded, adapted on (20 steps of LoRA), sampled (30 steps), decoded and scored with Farneback's flow, the video
written. Where OpenCV or PyAV is missing, hashing for as many seconds of a processor stands in its place, and the rows say so. Exits
with 1 where the bits of latents or scores differ between the two, or a phase of the device took 1 % longer or more memory beside others.
Weights and frames are random. Not included: decoding a file, the references' scores (once a clip, in the first arm), LPIPS.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from ..engine.clip import Known, Outcome, continue_clip, encode_known
from ..engine.data.video import fill, to_model, to_uint8, write_video
from ..engine.determinism import make_deterministic
from ..engine.environment import describe_environment
from ..engine.files import sha256_tensor
from ..engine.methods import LoRA, NoAdaptation
from ..engine.models.paths import use_paths
from ..engine.models.vae_fast import use_channels_last
from ..engine.overlap import Begun, Overlap
from ..engine.references import begin_scores, begin_truth_flow
from .step_rows import attention
from .step_scene import real_scene, small_scene

Row = dict[str, Any]
FLOW_SECONDS, VIDEO_SECONDS = 2.6, 0.9
"""Of a processor, for 23 pairs and 45 frames at 640x480."""
PHASES = ("adapt", "sample", "decode")
ALLOWED = 1.01
HAS_FLOW, HAS_VIDEO = (importlib.util.find_spec(name) is not None for name in ("cv2", "av"))


def hashing(seconds: float, threads: int) -> None:
    """Work for so many seconds of a processor on so many threads, without Python's lock."""
    block = bytes(1 << 20)

    def work() -> None:
        until = time.thread_time() + seconds / threads
        while time.thread_time() < until:
            hashlib.sha256(block).digest()

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(work)


class Clips:
    """Clips made, in turn or overlapped."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.device = torch.device("cpu" if arguments.check else "cuda")
        self.scene = small_scene(self.device) if arguments.check else real_scene(self.device)
        self.scene.compiler, self.folder, self.scale = "inductor", folder, 0.01 if arguments.check else 1.0
        if "fused" in arguments.path:
            attention(self.scene)
        use_paths(self.scene.experiment.dit, self.scene.paths(arguments.path))
        if "fused" in arguments.path:
            use_channels_last(self.scene.experiment.vae, triton=not arguments.check)
        method = LoRA(steps=2 if arguments.check else 20) if arguments.method == "lora" else NoAdaptation()
        self.adapter = method.attach(self.scene.experiment.dit, 0)
        self.flow: Literal["farneback", "none"] = "farneback" if HAS_FLOW else "none"

    def load(self, k: int) -> tuple[Tensor, Tensor]:
        noise, window = torch.Generator().manual_seed(k), self.scene.experiment.window
        stored = torch.randint(0, 256, (window.total_frames, 3, 240, 320), generator=noise, dtype=torch.uint8)
        frames = torch.stack([fill(frame, 1.0, *self.scene.experiment.pixel_size) for frame in stored])
        return frames, to_model(frames)

    def make(self, k: int, overlap: Overlap, loading: Begun[tuple[Tensor, Tensor]], settings: Any) -> Callable[[], Row]:
        """The device's share of a clip; what does the rest."""
        frames, pixels = loading.result()
        pixels = pixels.to(self.device)
        known = Known(f"clip {k}", encode_known(settings.vae, pixels, settings.window), self.scene.caption())
        begun = begin_truth_flow(pixels, settings.window, self.flow)
        truth_flow = overlap.start(partial(begun, overlap.processors)) if begun else None
        outcome = continue_clip(settings, known, self.adapter)
        score = begin_scores(
            outcome.pixels,
            pixels,
            truth_flow.result() if truth_flow else None,
            settings.window,
            lpips=None,
            lpips_reason="not measured",
            flow=self.flow,
        )
        video = torch.cat([frames[: settings.window.known_frames], to_uint8(outcome.pixels).cpu()])
        return partial(self.finish, k, overlap.processors, score, video, settings.window.fps, self.row(outcome))

    def row(self, outcome: Outcome) -> Row:
        peak = outcome.peak_memory_bytes or 0
        return {"latents": sha256_tensor(outcome.latents), "peak_gib": peak / 2**30, **outcome.seconds}

    def finish(self, k: int, processors: int, score: Callable[[int], Any], video: Tensor, fps: float, row: Row) -> Row:
        begun = time.monotonic()
        row["scores"] = score(processors)
        if not HAS_FLOW:
            hashing(self.scale * 2 * FLOW_SECONDS, processors)
        if HAS_VIDEO:
            write_video(self.folder / f"{k}.mp4", video, fps)
        else:
            hashing(self.scale * VIDEO_SECONDS, 1)
        return row | {"finish": time.monotonic() - begun}

    def block(self, overlapped: bool, clips: range, settings: Any) -> Row:
        """So many clips and the seconds until the last one was finished."""
        begun, rows = time.monotonic(), []
        with Overlap(overlapped) as overlap:
            for k, loading in overlap.each(clips, self.load):
                finish = self.make(k, overlap, loading, settings)
                overlap.settle()
                finished = overlap.start(finish)
                overlap.hand_over(lambda finished=finished: rows.append(finished.result()))
        seconds = time.monotonic() - begun
        row = {"overlapped": overlapped, "processors": overlap.processors, "seconds": seconds, "clips": rows}
        return row | {"clips_an_hour": 3600 * len(clips) / seconds}


def compare(rows: list[Row]) -> Row:
    """Phases of the device, memory and clips an hour, overlapped over in turn; whether the bits are the same."""

    def mean(overlapped: bool, value: Callable[[Row], float]) -> float:
        return fmean(value(clip) for row in rows if row["overlapped"] is overlapped for clip in row["clips"])

    found: Row = {}
    for phase in (*PHASES, "peak_gib"):
        alone, beside = (mean(way, lambda clip, phase=phase: clip[phase]) for way in (False, True))
        found[phase] = {"in turn": alone, "overlapped": beside, "ratio": beside / alone if alone else 1.0}
    rate = [fmean(row["clips_an_hour"] for row in rows if row["overlapped"] is way) for way in (False, True)]
    found["clips_an_hour"] = {"in turn": rate[0], "overlapped": rate[1], "ratio": rate[1] / rate[0]}
    bits = [[(clip["latents"], clip["scores"]) for clip in row["clips"]] for row in rows]
    return found | {"same_bits": all(one == bits[0] for one in bits)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=4, help="clips a block; there are four blocks")
    parser.add_argument("--method", choices=["lora", "none"], default="lora")
    parser.add_argument("--path", default="fused, not compiled", help="as in bench.steps: fused, compiled, eager, ...")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after each of them")
    parser.add_argument("--commit", help="the code's commit, where the machine has no checkout to ask")
    parser.add_argument("--check", action="store_true", help="a small network on the CPU; checks alone")
    arguments = parser.parse_args(argv)
    if arguments.check:
        arguments.path = "eager"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    make_deterministic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        clips = Clips(arguments, Path(folder))
        environment = describe_environment(clips.device)
        environment |= {"commit": arguments.commit} if arguments.commit else {}
        settings = clips.scene.experiment
        if not arguments.check:
            short = replace(settings, sampler=replace(settings.sampler, steps=2, force_steps=0))
            for warm_up in (short, settings, settings):  # the third of an arm's clips computes from records alone
                clips.block(False, range(1), warm_up)
        found: Row = {"environment": environment, "method": arguments.method, "path": arguments.path, "rows": rows}
        found["flow"] = "Farneback" if HAS_FLOW else f"{2 * FLOW_SECONDS} s of hashing"
        found["video"] = "x264" if HAS_VIDEO else f"{VIDEO_SECONDS} s of hashing"
        for overlapped in (False, True, True, False):
            rows.append(clips.block(overlapped, range(arguments.clips), settings))
            print(
                f"{'overlapped' if overlapped else 'in turn'}: {rows[-1]['clips_an_hour']:.1f} clips an hour",
                flush=True,
            )
            if arguments.out:
                arguments.out.write_text(json.dumps(found, indent=1))
    found["compared"] = compared = compare(rows)
    for name, value in compared.items():
        print(
            f"{name}: {value}"
            if name == "same_bits"
            else f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in value.items())
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))
    slower = [name for name in (*PHASES, "peak_gib") if compared[name]["ratio"] > ALLOWED and not arguments.check]
    return int(bool(slower) or not compared["same_bits"])


if __name__ == "__main__":
    sys.exit(main())
