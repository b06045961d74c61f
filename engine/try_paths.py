"""What a run would choose on this machine, and whether each method then computes what the plain path does: random weights, no data.

Run: python -m vidtta.engine.try_paths [--small] [--out FILE.json] [--methods NAME ...]
         [--kernels K] [--compile C] [--attention A] [--float8 F]        (as the keys of model)

STDiT3-XL/2 and the published VAE's sizes at 640x480 in bfloat16; --small: two layers in float32, for a CPU. Each method adapts in a few
steps and samples in four: on the plain path, then three clips on the chosen one, the last of which has another caption length. Needs
torch, triton, numpy and pyyaml alone. This shows that paths agree and what they cost, never quality.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from .adaptation import AdaptationSettings
from .choices import Choices, put_in_force
from .choose import choose_paths
from .clip import Experiment, Known, Outcome, continue_clip, encode_known
from .determinism import make_deterministic
from .environment import describe_environment, device_name
from .methods import AnyMethod, Delta, DeltaClosedForm, FullFineTuning, LoRA, NoAdaptation
from .models.checkpoint import state_hash
from .models.float8 import put_float8_in_force, use_float8
from .models.paths import use_paths
from .models.settings import ModelSettings
from .models.stdit3 import Caption, STDiT3, STDiT3Config
from .models.vae import VAE, VAEConfig
from .models.vae_fast import use_plain
from .sampler import SamplerSettings
from .seeds import normal
from .window import Window

FIXED = AdaptationSettings(timesteps="sampler", draws=8)
METHODS: dict[str, tuple[AnyMethod, AdaptationSettings]] = {
    "none": (NoAdaptation(), FIXED),
    "lora": (LoRA(steps=4), AdaptationSettings()),
    "delta": (Delta(steps=20), FIXED),
    "delta_closed_form": (DeltaClosedForm(), FIXED),
    "full": (FullFineTuning(steps=3), AdaptationSettings()),
}
LENGTHS = (60, 60, 31)
"""Tokens of the captions of the clips on the chosen path."""


def build(device: torch.device, small: bool) -> Experiment:
    """Networks of random weights, a window of 45 frames of which 22 are known, four sampling steps of which two guide."""
    dit, vae, size, dtype = STDiT3Config(), VAEConfig(), (480, 640), torch.bfloat16
    if small:
        dit = STDiT3Config(hidden_size=48, depth=1, num_heads=2, caption_channels=16, model_max_length=64)
        vae, size, dtype = VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1), (16, 32), torch.float32
    torch.manual_seed(0)
    with device:
        network = STDiT3(dit).to(dtype).eval().requires_grad_(False)
        coder = VAE(vae).to(dtype).eval().requires_grad_(False)
    return Experiment(network, coder, Window(), size, SamplerSettings(steps=4, force_steps=2), FIXED, 0)


def try_method(experiment: Experiment, name: str, choices: Choices, asked: ModelSettings) -> dict[str, Any]:
    """A method on the plain path and on the chosen one, there in float8 where that is asked for: relative distance of what is
    generated, seconds, graphs, bits twice."""
    method, adaptation = METHODS[name]
    experiment = replace(experiment, adaptation=adaptation)
    dit, vae, window = experiment.dit, experiment.vae, experiment.window
    pixels = normal((3, window.total_frames, *experiment.pixel_size), 0, "", "pixels").clamp(-1, 1)

    def one(length: int) -> Outcome:
        words = normal((1, length, dit.config.caption_channels), 0, "", "caption").to(dit.device)
        known = Known("clip", encode_known(vae, pixels.to(dit.device), window), Caption(words))
        return continue_clip(experiment, known, adapter)

    before = state_hash(dit)
    row: dict[str, Any] = {"method": name}
    try:
        adapter = method.attach(dit, 0)
        plain = one(LENGTHS[0])
        adapter.detach()
        rows, cols = (-(-side // 16) for side in experiment.pixel_size)
        tokens = window.known_latents * rows * cols
        put_in_force(choices, dit, vae, features_tokens=tokens, strict=asked.kernels == "triton")
        put_float8_in_force(dit, asked, tokens)
        adapter = method.attach(dit, 0)
        first, again, other = (one(length) for length in LENGTHS)
        adapter.detach()
        row |= {
            "distance_from_plain": _distance(again.pixels, plain.pixels),
            "latents_from_plain": _distance(again.latents, plain.latents),
            "losses": [plain.trace.losses, again.trace.losses],
            "same_bits_twice": bool(torch.equal(first.latents, again.latents)),
            "seconds": {"plain": plain.seconds, "first": first.seconds, "second": again.seconds},
            "graphs": [outcome.compiled["graphs"] for outcome in (first, again, other)],
            "graph_breaks": [outcome.compiled["graph_breaks"] for outcome in (first, again, other)],
            "ways": first.ways,
            "peak_bytes": {"plain": plain.peak_memory_bytes, "chosen": again.peak_memory_bytes},
        }
    except Exception as error:  # the other methods are tried all the same
        row["error"] = f"{type(error).__name__}: {error}"[:500]
    finally:
        use_float8(dit, None)
        use_paths(dit, None)
        use_plain(vae)
    row["restored"] = state_hash(dit) == before
    return row


def _distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2."""
    return ((found.float() - truth.float()).norm() / truth.float().norm()).item()


def main(words: list[str] | None = None) -> None:
    kinds = get_type_hints(ModelSettings)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two layers in float32, for a CPU")
    parser.add_argument("--out", type=Path, help="write what was found as JSON, after each method")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--nondeterministic", action="store_true", help="as model.deterministic: false")
    for key in ("kernels", "compile", "attention", "float8"):
        default = getattr(ModelSettings(), key)
        parser.add_argument(f"--{key}", choices=get_args(kinds[key]), default=default, help=f"as model.{key}")
    arguments = parser.parse_args(words)
    if not arguments.nondeterministic:
        make_deterministic()
    device = torch.device("cpu" if arguments.small else "cuda")
    experiment = build(device, arguments.small)
    given = {key: getattr(arguments, key) for key in ("kernels", "compile", "attention", "float8")}
    asked = ModelSettings(**given, dtype="float32" if arguments.small else "bfloat16")
    found: dict[str, Any] = {"environment": describe_environment(device), "asked": asdict(asked), "methods": []}
    with tempfile.TemporaryDirectory() as folder:
        choices = choose_paths(
            asked,
            experiment,
            Path(folder),
            methods=[METHODS[name][0] for name in arguments.methods],
            diagnostics=False,
            describe=lambda choices: {"device": device_name(device), **choices.to_json()},
            say=lambda text: print(text, flush=True),
        )
        path = Path(folder, "choices.json")
        found["choices"] = json.loads(path.read_text()) if path.exists() else choices.to_json()
    print(json.dumps(found["choices"], indent=1), flush=True)
    for name in arguments.methods:
        row = try_method(experiment, name, choices, asked)
        print(json.dumps(row), flush=True)
        found["methods"].append(row)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1))
    if bad := [row["method"] for row in found["methods"] if "error" in row or not row["restored"]]:
        raise SystemExit(f"failed: {', '.join(bad)}")


if __name__ == "__main__":
    main()
