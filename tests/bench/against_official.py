"""Hold ours against the official code, where it is installed, at shapes that the rows of `bench.peers` do not have on a CPU.

Run: PYTHONPATH=FOLDER_WITH_OPENSORA:FOLDER_WITH_TIMM_AND_EINOPS python -m tests.bench.against_official [bfloat16]
     (prints a line a check; exits 1 if one is out of tolerance)

153 tokens a frame (from 129 on the official code calls flash-attn), windows with a rest on both sides, heads 72 wide, weights by
rule in every layer, an odd number of valid text tokens, every gradient, a VAE of several chunks and its sampled posterior.
"""

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor
from vidtta.bench import suite
from vidtta.bench.peers.official import Official, load
from vidtta.bench.peers.opensora_rows import ROWS, Pair, Wrapped, relative
from vidtta.bench.step_scene import Scene
from vidtta.bench.stopwatch import Stopwatch
from vidtta.engine.adaptation import AdaptationSettings
from vidtta.engine.clip import Experiment, task_of
from vidtta.engine.models.rule_weights import fill_by_rule
from vidtta.engine.models.stdit3 import STDiT3, STDiT3Config
from vidtta.engine.models.vae import VAE, VAEConfig
from vidtta.engine.sampler import SamplerSettings
from vidtta.engine.window import Window

CPU = torch.device("cpu")
HEIGHT, WIDTH, KNOWN = 144, 272, 7
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Check = tuple[str, Tensor, Tensor, Callable[[], Tensor] | None]
"""What, the official result, ours, and ours in float32."""


def scene_of(dtype: torch.dtype) -> Scene:
    """Two layers of each kind; the known latents are drawn, not encoded."""
    torch.manual_seed(0)
    dit = STDiT3(STDiT3Config(hidden_size=144, depth=2, num_heads=2, caption_channels=32, model_max_length=20))
    vae = VAE(VAEConfig(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=2))
    for model in (dit, vae):
        fill_by_rule(model)
        model.to(dtype).eval().requires_grad_(False)
    settings = AdaptationSettings(objective="official")
    experiment = Experiment(dit, vae, Window(), (HEIGHT, WIDTH), SamplerSettings(), settings, 0)
    scene = Scene(experiment, torch.rand(3, 33, 48, 80).mul(2).sub(1), Stopwatch(CPU, 1), length=13)
    scene.set_known(torch.randn(1, 16, KNOWN, HEIGHT // 8, WIDTH // 8).to(dtype))
    return scene


def all_gradients(pair: Pair) -> tuple[Tensor, Tensor]:
    """Of every trained parameter, one after the other: the official ones, ours."""
    experiment = pair.scene.experiment
    task = task_of(experiment, pair.scene.known)
    draw = task.draw(0)

    def official() -> Tensor:
        about = pair.about(experiment.window.model_frames)
        terms = pair.official.scheduler(1, drop_condition={"keep": 1.0}).training_losses(
            Wrapped(pair.dit), pair.scene.known.latents.clone(), {"y": pair.text.y, "mask": pair.text.mask, **about},
            draw.noise, t=draw.t, mask_index=list(range(experiment.adaptation.context_latents)),
        )  # fmt: skip
        return terms["loss"].mean()

    found = []
    for model, loss in ((pair.dit, official), (experiment.dit, lambda: task.loss(draw))):
        trained = {name: p.requires_grad_(True) for name, p in model.named_parameters() if not name.endswith("freqs")}
        gradients = torch.autograd.grad(loss(), [trained[name] for name in sorted(trained)])
        found.append(torch.cat([g.flatten() for g in gradients]))
        model.requires_grad_(False)
    return found[0], found[1]


def autoencoder(official: Official, scene: Scene, tile: int | None) -> Iterator[Check]:
    """In bfloat16 the official one may lie twice as far from ours as ours from float32 (`Pair.yardstick`)."""
    ours = scene.experiment.vae
    exact = deepcopy(ours).float()
    theirs = official.vae(ours.config, ours.state_dict(), CPU, ours.dtype, tile)
    pixels = scene.pixels[None].to(ours.dtype)
    words = f"convolutions {'tiled' if tile else 'whole'}"
    mode = ours.encode(pixels)

    def drawn(vae: VAE) -> Tensor:
        return vae.encode(pixels, torch.Generator().manual_seed(7))

    found = theirs.encode(pixels, sample_posterior=False)
    yield f"VAE encode, {words}", found, mode, lambda: exact.encode(pixels)
    torch.manual_seed(7)
    yield f"VAE encode, sampled, {words}", theirs.encode(pixels), drawn(ours), lambda: drawn(exact)
    yield f"VAE decode, {words}", theirs.decode(mode), ours.decode(mode), lambda: exact.decode(mode)


def checks(official: Official, scene: Scene) -> Iterator[Check]:
    yield "gradients", *all_gradients(Pair(official, scene)), None
    with torch.no_grad():
        for tile in (None, 4):
            yield from autoencoder(official, scene, tile)


def main(dtype: torch.dtype) -> int:
    official, scene = load(CPU), scene_of(dtype)
    print(official.label, dtype)
    wrong = 0
    for name, found, ours, exact in checks(official, scene):
        distance, allowed = relative(ours, found), TOLERANCE[dtype]
        if dtype != torch.float32 and exact is not None:
            allowed = 2 * relative(ours, exact())
        wrong += not distance <= allowed
        print(f"{name}: relative distance {distance:.2g}, allowed {allowed:.2g}", flush=True)
    names = [f"opensora {kind} official" for kind in ("branches", "sampler", "full")]
    rows = suite.run(ROWS, names, Pair(official, scene), 3600)
    return wrong + sum("against" not in row for row in rows)


if __name__ == "__main__":
    sys.exit(1 if main(getattr(torch, (sys.argv[1:] or ["float32"])[0])) else 0)
