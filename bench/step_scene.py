"""What the rows of `bench.steps` run on: networks with random weights at one set of shapes, and the paths they compute by."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..engine.adaptation import AdaptationSettings
from ..engine.clip import Experiment, Known, encode_known
from ..engine.models.paths import Paths
from ..engine.models.stdit3 import Caption, STDiT3, STDiT3Config
from ..engine.models.vae import VAE, VAEConfig
from ..engine.sampler import SamplerSettings
from ..engine.window import Window
from ..kernels.attention import Choice
from ..kernels.windows import Grid
from .stopwatch import Stopwatch
from .timing import Ceilings
from .work import Work

LENGTHS = (17, 60, 101, 203, 300)
"""Caption lengths in tokens, over which nothing may compile anew."""
LENGTH = 60
FLOAT8 = ", float8"
"""At the end of a path's name: with the frozen linear layers in float8, in all work."""


@dataclass
class Scene:
    """One clip at one set of shapes, with random weights. compiler: torch.compile's back end."""

    experiment: Experiment
    pixels: Tensor
    watch: Stopwatch
    compiler: str | Callable[..., Any] = "inductor"
    lengths: tuple[int, ...] = LENGTHS
    length: int = LENGTH
    delta_steps: int = 100
    training_steps: int | None = None
    """Steps of a training row; its own number by default."""
    choice: Choice | None = None
    truth: dict[str, Any] = field(default_factory=dict)
    """What the first row of a kind computed, which the others are held against."""

    @property
    def device(self) -> torch.device:
        return self.experiment.dit.device

    @cached_property
    def known(self) -> Known:
        return Known("bench", encode_known(self.experiment.vae, self.pixels, self.experiment.window), self.caption())

    def set_known(self, latents: Tensor) -> None:
        """Take these latents as the known ones, without encoding any."""
        self.__dict__["known"] = Known("bench", latents, self.caption())

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured once, in this run."""
        return self.watch.ceilings()

    def rates(self, milliseconds: float, work: Work) -> dict[str, Any]:
        """The declared work, GB/s and TFLOP/s, and their shares of this run's ceilings."""
        return self.ceilings.figures(milliseconds, *work)

    @property
    def size(self) -> int:
        """Bytes of a number of the networks."""
        return self.experiment.dit.dtype.itemsize

    def caption(self, length: int | None = None) -> Caption:
        channels = self.experiment.dit.config.caption_channels
        generator = torch.Generator().manual_seed(length or self.length)
        return Caption(torch.randn(1, length or self.length, channels, generator=generator).to(self.device))

    def grid(self, frames: int) -> Grid:
        rows, cols = (-(-side // 16) for side in self.experiment.pixel_size)
        return Grid(frames, rows, cols)

    def paths(self, name: str) -> Paths | None:
        """eager: the plain path; compiled: the plain code through torch.compile; fused: the kernels, compiled around."""
        name = name.removesuffix(FLOAT8)
        if name == "eager":
            return None
        attention = {"attention": self.choice, "cross": "flash" if self.device.type == "cuda" else None}
        plain = Paths(compiled=True, compiler=self.compiler)
        if self.device.type == "cpu" and name.startswith("fused"):
            plain = replace(plain, compiled=False)  # Triton's interpreter cannot be traced
        kernels = Paths(kernels="triton", gelu_in_product=True, **attention)
        fused = replace(plain, kernels="triton", gelu_in_product=True, **attention)
        return {
            "compiled": plain,
            "compiled + attention": replace(plain, **attention),
            "fused": fused,
            "fused, launched": replace(fused, recorded=False),
            "fused, not compiled": kernels,
            "fused, not compiled, rotation again": replace(kernels, remade=("rotation",)),
            "fused, not compiled, half hidden again": replace(kernels, remade=("half_hidden",)),
            "fused, not compiled, hidden again": replace(kernels, remade=("hidden",)),
            "fused, half hidden again": replace(fused, remade=("half_hidden",)),
            "fused - gelu": replace(plain, kernels="triton", **attention),
            "fused - attention": replace(plain, kernels="triton", gelu_in_product=True),
        }[name]


def describe(scene: Scene, name: str) -> str:
    """Which code a path's name stands for, in a few words."""
    return describe_path(scene.paths(name)) + (", frozen linears in float8" if name.endswith(FLOAT8) else "")


def describe_path(paths: Paths | None) -> str:
    """Which code computes the layers, in a few words."""
    if paths is None:
        return "plain PyTorch"
    parts = ["Triton kernels" if paths.kernels == "triton" else "plain code"]
    parts += [f"torch.compile ({paths.compiler})"] if paths.compiled else ["not compiled"]
    parts += ["steps recorded"] if paths.recorded else []
    if paths.attention is not None:
        chosen = sorted({*paths.attention.forward.values(), *paths.attention.training.values()})
        parts.append(f"attention {paths.attention.pinned or '/'.join(chosen)}")
    parts += ["gelu in the product"] if paths.gelu_in_product else []
    parts += [f"{' and '.join(paths.remade)} computed again"] if paths.remade else []
    return ", ".join(parts)


def real_scene(device: torch.device) -> Scene:
    """XL/2 and the published VAE's sizes, random bfloat16 weights."""
    return _scene(device, STDiT3Config(), VAEConfig(), (480, 640), torch.bfloat16, Stopwatch(device))


def small_scene(device: torch.device) -> Scene:
    """The same rows on a network of two layers, traced but not compiled to machine code; float32."""
    config = STDiT3Config(hidden_size=48, depth=1, num_heads=4, caption_channels=16, model_max_length=8)
    scene = _scene(
        device, config, VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1), (16, 32), torch.float32,
        Stopwatch(device, 2),
    )  # fmt: skip
    scene.compiler, scene.lengths, scene.length = "aot_eager", (3, 8), 4
    scene.delta_steps = scene.training_steps = 3
    scene.experiment = replace(scene.experiment, sampler=SamplerSettings(steps=4, force_steps=2))
    return scene


def _scene(
    device: torch.device,
    dit: STDiT3Config,
    vae: VAEConfig,
    size: tuple[int, int],
    dtype: torch.dtype,
    watch: Stopwatch,
) -> Scene:
    torch.manual_seed(0)
    with device:
        network = STDiT3(dit).to(dtype).eval().requires_grad_(False)
        coder = VAE(vae).to(dtype).eval().requires_grad_(False)
    experiment = Experiment(network, coder, Window(), size, SamplerSettings(), AdaptationSettings(), 0)
    pixels = torch.rand(3, 45, *size, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)
    return Scene(experiment, pixels, watch)
