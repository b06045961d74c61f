"""What the measures of a clip cost, and how far the GPU's lie from the CPU's.

Run: python -m vidtta.bench.metrics [--raft]

Needs torch and numpy; without OpenCV the flow's measures are left out, and it says so. Exits with 1 where the GPU's lie farther
from the CPU's than TOLERANCE.

A moving texture and a noisy copy of it, 23 scored frames after a known one, at the demo's size and at full size. --raft times
RAFT with random weights, which cost as much as the published ones.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..engine.metrics import score_frames, score_motion
from ..engine.metrics.optical_flow import raft
from ..engine.torchvision_ops import declare_missing_operators

SIZES = ((96, 128), (480, 640))
FRAMES = 24
TOLERANCE = 1e-3
"""Largest relative difference between devices: Farneback's flow is computed on the CPU alone, and the rest in float64 up to the
order of sums, but a score clamped or warped near a border may turn on the last bit of a float32 pixel."""


def videos(height: int, width: int) -> tuple[Tensor, Tensor]:
    """A noisy copy and a texture that moves by 2 pixels a frame; [3, F, H, W]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 8, width // 8 + 6, generator=generator) * 2 - 1
    texture = torch.nn.functional.interpolate(coarse, (height, width + 2 * FRAMES), mode="bicubic")[0].clamp(-1, 1)
    truth = torch.stack([texture[:, :, 2 * k : 2 * k + width] for k in range(FRAMES)], dim=1)
    pred = truth + 0.1 * torch.randn(truth.shape, generator=generator)
    return torch.cat([truth[:, :1], pred[:, 1:]], dim=1), truth


def milliseconds(work: Callable[[], object], rounds: int = 3) -> float:
    """The median wall time of a call, the device's queue drained."""
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[1:])[rounds // 2]


def flows() -> tuple[Literal["none", "farneback"], ...]:
    """What this machine can compute."""
    return ("none", "farneback") if importlib.util.find_spec("cv2") else ("none",)


def costs(pred: Tensor, truth: Tensor, with_raft: bool) -> dict[str, float]:
    """Milliseconds by what is computed."""
    found = {"images": milliseconds(lambda: score_frames(pred, truth, lpips=None, lpips_reason="not timed"))}
    for name in flows():
        found[f"motion, {name}"] = milliseconds(partial(score_motion, pred, truth, chunk_seams=[12], flow=name))
    if with_raft:
        _random_raft()
        found["raft alone"] = milliseconds(lambda: (raft(pred), raft(truth)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--raft", action="store_true", help="time RAFT too")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, {torch.get_num_threads()} threads")
    if "farneback" not in flows():
        print("OpenCV is not here: the measures of optical flow are left out")
    worst = 0.0
    for height, width in SIZES:
        pair = videos(height, width)
        pred, truth = (video.to(device) for video in pair)
        cost = costs(pred, truth, arguments.raft)
        print(f"{width}x{height}, ms a clip: " + ", ".join(f"{name} {ms:.0f}" for name, ms in cost.items()))
        if device == "cuda":
            apart = distance(pair, (pred, truth))
            worst = max(worst, apart)
            print(
                f"{width}x{height}, largest relative difference between CPU and GPU: {apart:.1e}, allowed {TOLERANCE:.0e}"
            )
    return 1 if worst > TOLERANCE else 0


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Largest relative difference between all measures of the same videos (pred, truth) on two devices, LPIPS apart."""
    found = []
    for pair in (one, other):
        frames = score_frames(*pair, lpips=None, lpips_reason="not compared")
        motion = score_motion(*pair, chunk_seams=[12], flow=flows()[-1])
        values = {(name, k): v for name, score in frames.items() for k, v in enumerate(score["frames"] or ())}
        found.append(values | {(name, key): v for name, entry in motion.items() for key, v in entry.items()})
    ours, theirs = found
    return max(abs(theirs[key] - value) / max(abs(value), 1e-9) for key, value in ours.items())


def _random_raft() -> None:
    declare_missing_operators()
    from torchvision.models.optical_flow import raft_small

    from ..engine.metrics import optical_flow

    network = raft_small(weights=None).eval().requires_grad_(False)
    optical_flow._raft_network = lambda: network  # pyright: ignore[reportAttributeAccessIssue] (stands in for a cached function)


if __name__ == "__main__":
    sys.exit(main())
