"""Time and peak memory of one whole clip at STDiT3-XL/2, each method, on the plain PyTorch path.

Run: python -m vidtta.bench.clip [--out FILE.json] [--methods full lora ...]      (needs a GPU; no weights, no data)

Weights and frames are random: this measures cost, never quality. The clip is 640x480, 45 frames at 24 fps, 22 of them known;
20 steps of adaptation and 30 of sampling, v1.3's defaults. Each method first runs a clip with one step of sampling, so that
what happens once a process (allocator, library handles, autotuning) is not in the figures. After each method the weights must
be bit for bit as before; `--check` also runs each clip twice and compares the latents' bits.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from ..engine.adaptation import AdaptationSettings
from ..engine.clip import Experiment, Known, continue_clip, encode_known, timed
from ..engine.determinism import make_deterministic
from ..engine.environment import describe_environment
from ..engine.memory import peak_memory, reset_peak_memory
from ..engine.methods import AnyMethod, Delta, DeltaClosedForm, FullFineTuning, LoRA, NoAdaptation
from ..engine.models.checkpoint import state_hash
from ..engine.models.stdit3 import Caption, STDiT3, STDiT3Config
from ..engine.models.vae import VAE, VAEConfig
from ..engine.sampler import SamplerSettings
from ..engine.window import Window

FIXED_DRAWS = AdaptationSettings(timesteps="sampler", draws=16)
CASES: dict[str, tuple[AnyMethod, AdaptationSettings]] = {
    "none": (NoAdaptation(), AdaptationSettings()),
    "full": (FullFineTuning(steps=20, lr=1e-5), AdaptationSettings()),
    "lora": (LoRA(steps=20, rank=16), AdaptationSettings()),
    "lora_last_14": (LoRA(steps=20, rank=16, last_layers=14, cache_prefix=True), AdaptationSettings(draws=4)),
    "delta_pre": (Delta(steps=20, site="pre"), FIXED_DRAWS),
    "delta_mid_closed": (DeltaClosedForm(site="mid"), FIXED_DRAWS),
    "delta_post_closed": (DeltaClosedForm(site="post"), FIXED_DRAWS),
}


def build(device: torch.device, seed: int = 0) -> Experiment:
    """XL/2 and the published VAE with random bfloat16 weights, and v1.3's settings."""
    torch.manual_seed(seed)
    with device:
        dit = STDiT3(STDiT3Config()).to(torch.bfloat16).eval().requires_grad_(False)
        vae = VAE(VAEConfig()).to(torch.bfloat16).eval().requires_grad_(False)
    return Experiment(dit, vae, Window(), (480, 640), SamplerSettings(), AdaptationSettings(), seed)


def measure(experiment: Experiment, known: Known, name: str, check: bool) -> dict[str, Any]:
    """Seconds and bytes of one clip."""
    method, adaptation = CASES[name]
    method.check(adaptation)
    experiment = dataclasses.replace(experiment, adaptation=adaptation)
    torch.cuda.empty_cache()
    before = state_hash(experiment.dit)
    start = time.perf_counter()
    adapter = method.attach(experiment.dit, experiment.seed)
    torch.cuda.synchronize()
    attach = time.perf_counter() - start
    short = dataclasses.replace(experiment, sampler=dataclasses.replace(experiment.sampler, steps=1))
    row: dict[str, Any] = {"method": name, "settings": dataclasses.asdict(method), "attach_seconds": attach}
    try:
        continue_clip(short, known, adapter)
        outcome = continue_clip(experiment, known, adapter)
        row |= {
            "seconds": outcome.seconds,
            "seconds_a_step": outcome.seconds["adapt"] / max(outcome.trace.steps, 1),
            "peak_gib": (outcome.peak_memory_bytes or 0) / 2**30,
            "steps": outcome.trace.steps,
            "trained": outcome.change.trained,
            "changed": outcome.change.changed,
            "losses": [outcome.trace.losses[0], outcome.trace.losses[-1]] if outcome.trace.losses else None,
        }
        if check:
            again = continue_clip(experiment, known, adapter)
            row["same_bits_twice"] = bool(torch.equal(again.latents, outcome.latents))
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).split(".")[0]
    adapter.detach()
    row["restored_bit_for_bit"] = state_hash(experiment.dit) == before
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--methods", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--check", action="store_true", help="also run each clip twice and compare bits")
    parser.add_argument("--nondeterministic", action="store_true", help="let torch choose algorithms freely")
    parser.add_argument("--commit", help="the code's commit, where the machine has no checkout to ask")
    arguments = parser.parse_args()
    if not arguments.nondeterministic:
        make_deterministic()
    device = torch.device("cuda")
    environment = describe_environment(device)
    environment["deterministic"] = not arguments.nondeterministic
    environment["commit"] = arguments.commit or environment["commit"]
    print(json.dumps(environment))
    experiment = build(device)
    pixels = torch.rand(3, 45, 480, 640, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)
    vae_row: dict[str, Any] = {}
    encode_known(experiment.vae, pixels, experiment.window)
    reset_peak_memory(device)
    with timed(vae_row, "encode", device):
        latents = encode_known(experiment.vae, pixels, experiment.window)
    vae_row["encode_peak_gib"] = (peak_memory(device) or 0) / 2**30
    print("encode", vae_row, flush=True)
    prompt = torch.randn(1, 60, 4096, generator=torch.Generator().manual_seed(1)).to(device)
    known = Known("bench", latents, Caption(prompt))
    rows = []
    for name in arguments.methods:
        row = measure(experiment, known, name, arguments.check)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({"environment": environment, "vae": vae_row, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
