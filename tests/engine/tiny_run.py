"""Whole runs so small that a clip takes a third of a second: 15 frames of 16 x 24 pixels, a network of two layers.

The weights follow the rule and lie on disk in the published layout, so a run loads them as it loads the real ones.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from vidtta.engine import cli
from vidtta.engine.data.video import read_window, write_video
from vidtta.engine.models.rule_weights import fill_by_rule
from vidtta.engine.models.stdit3 import STDiT3, STDiT3Config
from vidtta.engine.models.vae import VAE, VAEConfig

DIT = {"hidden_size": 48, "depth": 1, "num_heads": 2, "caption_channels": 16, "model_max_length": 12}
SMALL_VAE = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
HEIGHT, WIDTH, FPS = 16, 24, 24
KNOWN, TOTAL = 10, 15
WINDOW = {"total_frames": TOTAL, "known_frames": KNOWN, "model_frames": 17}
CLIPS = ("ball", "wave")
NO_HUB = "/nowhere/hub"
FULL = {"kind": "full", "steps": 2, "lr": 1e-3}
DELTA = {"kind": "delta", "steps": 2, "lr": 0.1}

# Children of a process that has imported everything: a kill then falls into the run and not into the imports.
FORKS = multiprocessing.get_context("forkserver")
IMPORTS = "vidtta.engine.run vidtta.engine.recipe torch._dynamo rich.progress av cv2 ftfy bs4 pytest"
FORKS.set_forkserver_preload([str(name) for name in IMPORTS.split()])


def save_weights(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """A network filled by rule, as config.json and model.safetensors."""
    fill_by_rule(module)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(module.state_dict(), folder / "model.safetensors")


def make_clip(path: Path, seed: int, frames: int = TOTAL + 3) -> Path:
    """A disc that moves over a gradient, in colours and a direction that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    colours, speed = torch.rand(2, 3, 1, 1, generator=generator), torch.rand(2, generator=generator) * 2 - 1
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    pictures = []
    for k in range(frames):
        far = ((y - HEIGHT / 2 - k * speed[0]) ** 2 + (x - WIDTH / 2 - k * speed[1]) ** 2).sqrt()
        pictures.append(torch.where(far < 6, colours[0], colours[1] * x / WIDTH))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, (torch.stack(pictures) * 255).to(torch.uint8), FPS)
    return path


class Lab:
    """A folder with weights and clips; runs go into folders below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        save_weights(root / "dit", STDiT3(STDiT3Config.from_dict(DIT)), DIT)
        save_weights(root / "vae", VAE(VAEConfig.from_dict(SMALL_VAE)), SMALL_VAE)
        for seed, name in enumerate(CLIPS):
            make_clip(root / "clips" / f"{name}.mp4", seed)
        model = {"dit": str(root / "dit"), "vae": str(root / "vae"), "text": "embedded", "dtype": "float32"}
        self.settings = {
            "model": {**model, "device": "cpu", "allow_untrained": True},
            "data": {"clips": str(root / "clips"), "height": HEIGHT, "width": WIDTH},
            "window": WINDOW,
            "sampler": {"steps": 2},
            "adaptation": {"context_latents": 2, "draws": 2, "timesteps": "sampler"},
            "arms": {"delta": DELTA},
            "scores": {"lpips": "allow_missing"},
            "keep": ["video", "latents", "adapter"],
        }

    def argv(self, output: str, *words: str, **sections: Any) -> list[str]:
        """The command line of a run into the folder `output`. words: overrides, options; sections replace the recipe's."""
        path = self.root / "recipe.yaml"
        settings = {"output_dir": str(self.root / output), **self.settings, **sections}
        kept = {key: value for key, value in settings.items() if value is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return ["run", str(path), "--quiet", *words]

    def run(self, output: str, *words: str, **sections: Any) -> int:
        """Run in this process; the exit status."""
        return cli.main(self.argv(output, *words, **sections))

    def read(self, output: str, *parts: str) -> Any:
        """A JSON file of a run."""
        return json.loads(Path(self.root, output, *parts).read_text())

    def result(self, output: str, arm: str, clip: str) -> dict[str, Any]:
        return self.read(output, "arms", arm, "clips", clip, "result.json")

    def results(self, output: str) -> dict[str, dict[str, Any]]:
        """All results of a run but for what they cost and which commit made them (and the checksum of all), by arm/clip."""
        found = {}
        for path in sorted((self.root / output / "arms").glob("*/clips/*/result.json")):
            result = json.loads(path.read_text())
            del result["cost"], result["paths"]["vidtta"], result["checksum"]
            found[f"{path.parts[-4]}/{path.parts[-2]}"] = result
        return found

    def frames(self, clip: str, total: int = TOTAL) -> Tensor:
        """The clip as a run reads it, uint8 [F, 3, H, W]."""
        path = self.root / "clips" / f"{clip}.mp4"
        return read_window(path, frames=total, fps=FPS, height=HEIGHT, width=WIDTH)


@contextmanager
def tiny_lab(root: Path) -> Iterator[Lab]:
    """A lab on one thread, where LPIPS has no weights; what a run switches on for the whole process is switched back."""
    torch.set_num_threads(1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", NO_HUB)  # one for all labs: children keep the environment of the first
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        yield Lab(root)
    torch.use_deterministic_algorithms(deterministic)


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on standard error, which a command that failed leaves."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def run_in_child(argv: list[str], log: str = os.devnull) -> None:
    """What a forked process does: a run, its standard error in `log`, its exit status the process's own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    sys.exit(cli.main(argv))


def wait_for(pattern: str, folder: Path, alive: Callable[[], bool]) -> None:
    """Until the run directory `folder` holds a file of this pattern."""
    deadline = time.monotonic() + 60
    while not list(folder.glob(pattern)) and alive() and time.monotonic() < deadline:
        time.sleep(0.01)
