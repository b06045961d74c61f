"""How far float8 lies from the exact layers, beside what plain bfloat16 errs: a linear, a forward pass, and clips of the small model.

Run: python -m vidtta.bench.float8_error [--out FILE.json] [--depth N] [--clips N] [--only WHAT ...]        (on a GPU, else a CPU)

All errors are relative (L2), against float32 on the same bfloat16 numbers (float64 for a linear), so that they are of the computing
alone. Weights of width 1152 are random, those of the small model trained; only the latter say something of quality. On a CPU float8 is
the reference of float8_linear.py: the same roundings, another order of sums.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.clip import encode_known
from ..engine.denoiser import Denoiser
from ..engine.environment import describe_environment
from ..engine.files import write_json
from ..engine.flow import add_noise
from ..engine.metrics.psnr import psnr
from ..engine.models.float8 import use_float8
from ..engine.models.float8_linear import float8_linear, quantize_weight
from ..engine.models.stdit3 import Caption, Condition, STDiT3, STDiT3Config
from ..engine.seeds import normal
from .clip_quality import Made, Quality, mean

Row = dict[str, Any]
LEVELS = (100.0, 500.0, 900.0)
METHODS = ("none", "lora", "full", "delta_pre")


def distance(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def linears(device: torch.device) -> Iterator[Row]:
    """The linears' shapes, of normal rows and of rows in which every hundredth channel is thirty times as large."""
    for name, K, N in (("qkv", 1152, 3456), ("proj", 1152, 1152), ("fc1", 1152, 4608), ("fc2", 4608, 1152)):
        for kind in ("normal", "outliers"):
            x = normal((512, K), 0, name, "rows").to(device)
            if kind == "outliers":
                x[:, ::100] *= 30
            x, gelu = x.bfloat16(), name == "fc2"
            weight = (normal((N, K), 0, name, "weight") * K**-0.5).to(device, torch.bfloat16)
            bias = torch.zeros(N, device=device, dtype=torch.bfloat16)
            wide = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
            truth = wide @ weight.double().T
            narrow = F.gelu(x, approximate="tanh") if gelu else x
            with torch.no_grad():
                rounded = float8_linear(x, *quantize_weight(weight), bias, weight, gelu)
            errors = {"bfloat16": distance(F.linear(narrow, weight), truth), "float8": distance(rounded, truth)}
            yield {"what": "linear", "of": f"{name} {K} x {N}, {kind}", **errors}


Velocities = Callable[[STDiT3], Tensor]


def forwards(of: str, network: STDiT3, velocities: Velocities) -> Row:
    """The velocities of three guidance branches at three noise levels. network: in bfloat16."""
    truth = velocities(copy.deepcopy(network).float())
    found = {"bfloat16": distance(velocities(network), truth)}
    use_float8(network, "sampling")
    found["float8"] = distance(velocities(network), truth)
    use_float8(network, None)
    return {"what": "forward", "of": of, **found}


@torch.no_grad()
def velocities_of(dit: STDiT3, latents: Tensor, known: int, size: tuple[int, int], caption: Caption) -> Tensor:
    """latents: of a whole clip, [1, C, T, h, w], of which so many frames are known."""
    mask = torch.zeros_like(latents)
    mask[:, :, :known] = 1
    latents, mask = latents.to(dit.device, dit.dtype), mask.to(dit.device, dit.dtype)
    geometry = dit.geometry(latents.shape[2], (latents.shape[3], latents.shape[4]), size, tuple(range(known)))
    branches = Denoiser(dit, geometry, 24.0, caption.to(dit.device), Condition(latents * mask, mask))
    noise = normal(tuple(latents.shape), 0, "", "noise").to(dit.device)
    found: list[Tensor] = []
    for level in LEVELS:
        t = torch.tensor(level, device=dit.device)
        found += branches(add_noise(latents.float(), noise, t), t, all_branches=True)
    return torch.cat(found)


def wide_network(device: torch.device, depth: int, gates: float) -> Row:
    """Width 1152 with random weights; 2 latent frames of 128 x 128 pixels are known of 4. gates: added to every gate, which are near
    zero in random weights, so that the layers hardly count."""
    torch.manual_seed(0)
    with device:
        network = STDiT3(STDiT3Config(depth=depth)).bfloat16().eval().requires_grad_(False)
    with torch.no_grad():
        for layer in network.layers:
            layer.scale_shift_table[[2, 5]] += gates
    latents, words = normal((1, 16, 4, 16, 16), 0, "", "latents"), Caption(normal((1, 20, 4096), 0, "", "caption"))
    of = f"width 1152, {2 * depth} layers, random weights, gates near {gates:g}"
    return forwards(of, network, lambda dit: velocities_of(dit, latents, 2, (128, 128), words))


def small_network(quality: Quality) -> Row:
    """The trained small model on the first clip."""
    pixels, caption = quality.clips[0]
    window, vae = quality.scene.experiment.window, quality.scene.experiment.vae
    with torch.no_grad():
        padded = torch.cat([pixels, pixels[:, -1:].expand(-1, window.model_frames - pixels.shape[1], -1, -1)], dim=1)
        latents = vae.encode(padded[None].to(quality.scene.device)).float()
        assert (
            latents.shape[2] == window.latent_frames and encode_known(vae, pixels, window).shape[2] < latents.shape[2]
        )
    return forwards(
        "small trained model",
        quality.scene.experiment.dit,
        lambda dit: velocities_of(dit, latents, window.known_latents, quality.size, caption),
    )


def clips(wide: Quality, narrow: Quality, name: str) -> Row:
    """PSNR between the frames of float32 and those of bfloat16, with and without float8, all on the plain path; and to the truth."""

    def near(found: list[Made]) -> float:
        return mean([psnr(a.generated, b.generated).mean().item() for a, b in zip(found, exact, strict=True)])

    def good(found: list[Made]) -> float:
        return mean([psnr(m.generated, m.truth).mean().item() for m in found])

    exact = wide.make(name, "plain")
    plain, rounded = narrow.make(name, "plain"), narrow.make(name, "float8 alone")
    return {
        "what": "clip",
        "of": f"small trained model, {name}, {len(exact)} clips",
        "psnr_to_float32": {"bfloat16": near(plain), "float8": near(rounded)},
        "psnr": {"float32": good(exact), "bfloat16": good(plain), "float8": good(rounded)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON, after each")
    parser.add_argument(
        "--depth", type=int, help="pairs of layers at width 1152: 28 on a GPU, as published, 2 on a CPU"
    )
    parser.add_argument("--clips", type=int, default=4, help="clips of the small model")
    parser.add_argument(
        "--only", nargs="+", choices=("linear", "forward", "clip"), default=["linear", "forward", "clip"]
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    depth = arguments.depth or (28 if device.type == "cuda" else 2)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.out:
            write_json(arguments.out, {"environment": describe_environment(device), "rows": rows})

    if "linear" in arguments.only:
        for row in linears(device):
            add(row)
    if "forward" in arguments.only:
        for gates in (0.0, 1.0):
            add(wide_network(device, depth, gates))
    if {"forward", "clip"} & set(arguments.only):
        narrow = Quality(device, torch.bfloat16, arguments.clips)
        if "forward" in arguments.only:
            add(small_network(narrow))
        if "clip" in arguments.only:
            wide = Quality(device, torch.float32, arguments.clips)
            for name in METHODS:
                add(clips(wide, narrow, name))


if __name__ == "__main__":
    main()
