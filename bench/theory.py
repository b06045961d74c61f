"""What theory says of adapting, seen on the small trained model: losses on fixed draws, and where a large rate overfits.

Run: python -m vidtta.bench.theory [--clips N] [--steps N] [--out FILE.json]

For shifted tuning clips, with 4 fixed draws to train on and 4 others held out, at every step of plain gradient descent and of
AdamW on all weights: the mean loss on both sets. Plain descent at a small rate must never raise the first; at a large rate the
first goes on falling while the second turns, and the turning point is printed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.adaptation import AdaptationSettings, Task
from ..engine.clip import encode_known
from ..engine.data.video import to_model
from ..engine.demo.world import DOMAINS, build_scene, captions, clip_numbers, frames_of
from ..engine.determinism import make_deterministic
from ..engine.environment import describe_environment
from ..engine.files import write_json
from ..engine.models.load import EMBEDDED, load_dit, load_vae
from ..engine.models.stdit3 import Caption, STDiT3
from ..engine.models.vae import VAE
from ..engine.text.encoder import TRAINED_TABLE, EmbeddedText
from ..engine.window import Window

DRAWS = 4
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "gradient descent, lr 1e-4": lambda weights: torch.optim.SGD(weights, 1e-4),
    "gradient descent, lr 1e-3": lambda weights: torch.optim.SGD(weights, 1e-3),
    "AdamW, lr 3e-5": lambda weights: torch.optim.AdamW(weights, 3e-5, weight_decay=0.0),
    "AdamW, lr 1e-4": lambda weights: torch.optim.AdamW(weights, 1e-4, weight_decay=0.0),
    "AdamW, lr 1e-3": lambda weights: torch.optim.AdamW(weights, 1e-3, weight_decay=0.0),
}


def shifted_task(dit: STDiT3, vae: VAE, index: int) -> Task:
    """The adaptation of one shifted tuning clip, its timesteps spread over the sampler's grid."""
    window = Window()
    scene = build_scene(DOMAINS["shifted"], clip_numbers("shifted", "tuning", [index]))
    pixels = to_model(frames_of(scene, window.total_frames, window.fps, 96, 128)[0])
    text = EmbeddedText(dit.config.caption_channels, table_file=TRAINED_TABLE).encode(captions(scene))[0]
    return Task(
        dit,
        encode_known(vae, pixels, window).to(dit.device),
        Caption(text.embedding[None]).to(dit.device),
        AdaptationSettings(timesteps="sampler"),
        recipe_seed=0,
        clip_id=f"shifted-tuning-{index:06d}",
        pixel_size=(96, 128),
        fps=window.fps,
        sampled_frames=window.model_frames,
        sampling_steps=10,
    )


def curves(task: Task, make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int) -> dict[str, list[float]]:
    """Mean loss before each step and after the last, on the draws that are trained on and on as many others; weights restored."""
    weights = [p for name, p in task.model.named_parameters() if name != "rope.freqs"]
    start = [p.detach().clone() for p in weights]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer, found = make(list(weights)), {"trained": [], "held_out": []}
    for step in range(steps + 1):
        loss = torch.stack([task.loss(task.draw(k)) for k in range(DRAWS)]).mean()
        with torch.no_grad():
            other = torch.stack([task.loss(task.draw(k)) for k in range(DRAWS, 2 * DRAWS)]).mean()
        found["trained"].append(loss.item())
        found["held_out"].append(other.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        for weight, value in zip(weights, start, strict=True):
            weight.requires_grad_(False).copy_(value)
            weight.grad = None
    return found


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m vidtta.bench.theory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write the curves as JSON")
    arguments = parser.parse_args()
    make_deterministic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dit, vae = (
        load_dit(str(EMBEDDED / "dit"), device, torch.float32),
        load_vae(str(EMBEDDED / "vae"), device, torch.float32),
    )
    record: dict[str, Any] = {"environment": describe_environment(device)}
    for name, make in OPTIMIZERS.items():
        runs = [curves(shifted_task(dit, vae, index), make, arguments.steps) for index in range(arguments.clips)]
        record[name] = runs
        trained, held = (
            [sum(values) / len(runs) for values in zip(*(r[key] for r in runs), strict=True)] for key in runs[0]
        )
        rises = sum(b > a for r in runs for a, b in zip(r["trained"], r["trained"][1:], strict=False))
        turn = min(range(len(held)), key=held.__getitem__)
        print(
            f"{name:28s} trained {trained[0]:.4f} -> {trained[-1]:.4f}, rises in {rises} of {len(runs) * arguments.steps} steps; "
            f"held out {held[0]:.4f} -> {held[-1]:.4f}, least {held[turn]:.4f} at step {turn}",
            flush=True,
        )
        if arguments.out:
            write_json(arguments.out, record)


if __name__ == "__main__":
    main()
