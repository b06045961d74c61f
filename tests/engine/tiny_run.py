"""Whole runs so small that one takes about a second: two clips of 48 x 64 pixels, a network of two layers, weights by rule.

The weights lie on disk in the published layout, so a run loads them as it loads the real ones.
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from vidtta.engine import cli
from vidtta.engine.data.video import write_video
from vidtta.engine.models.rule_weights import fill_by_rule
from vidtta.engine.models.stdit3 import STDiT3, STDiT3Config
from vidtta.engine.models.vae import VAE, VAEConfig

DIT = {"hidden_size": 48, "depth": 1, "num_heads": 2, "caption_channels": 16, "model_max_length": 12}
VAE_SIZES = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
HEIGHT, WIDTH, FRAMES, FPS = 48, 64, 21, 24
CLIPS = ("ball", "wave")


def save_weights(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """A network filled by rule, as config.json and model.safetensors."""
    fill_by_rule(module)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(module.state_dict(), folder / "model.safetensors")


def make_clip(path: Path, seed: int, frames: int = FRAMES + 3) -> Path:
    """A bright disc that moves over a gradient, in colours and a direction that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    colours, speed = torch.rand(2, 3, 1, 1, generator=generator), torch.rand(2, generator=generator) * 2 - 1
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    pictures = []
    for k in range(frames):
        far = ((y - HEIGHT / 2 - k * speed[0]) ** 2 + (x - WIDTH / 2 - k * speed[1]) ** 2).sqrt()
        pictures.append(torch.where(far < 12, colours[0], colours[1] * x / WIDTH))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, (torch.stack(pictures) * 255).to(torch.uint8), FPS)
    return path


class Lab:
    """A folder with weights, clips and a recipe; runs go into folders below it."""

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.root = root
        save_weights(root / "dit", STDiT3(STDiT3Config.from_dict(DIT)), DIT)
        save_weights(root / "vae", VAE(VAEConfig.from_dict(VAE_SIZES)), VAE_SIZES)
        for seed, name in enumerate(CLIPS):
            make_clip(root / "clips" / f"{name}.mp4", seed)
        self.settings = {
            "model": {
                "dit": str(root / "dit"),
                "vae": str(root / "vae"),
                "text": "embedded",
                "dtype": "float32",
                "device": "cpu",
            },
            "data": {"clips": str(root / "clips"), "height": HEIGHT, "width": WIDTH},
            "window": {"total_frames": FRAMES, "known_frames": 13, "model_frames": 33},
            "sampler": {"steps": 2},
            "arms": {"delta": {"kind": "delta", "steps": 2, "lr": 0.1}},
            "adaptation": {"draws": 2, "timesteps": "sampler"},
            "scores": {"lpips": "allow_missing"},
            "keep": ["video", "latents", "adapter"],
        }

    def recipe(self, name: str = "recipe", **changes: Any) -> Path:
        """A recipe file: the settings, with whole sections replaced by `changes`."""
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**self.settings, **changes}, sort_keys=False))
        return path

    def argv(self, output: str, *words: str, **changes: Any) -> list[str]:
        recipe = self.recipe(f"recipe-{output}", **changes)
        return ["run", str(recipe), f"output_dir={self.root / output}", *words]

    def run(self, output: str, *words: str, **changes: Any) -> int:
        """Run in this process; the exit status. words: overrides and options."""
        return cli.main(self.argv(output, *words, **changes))
