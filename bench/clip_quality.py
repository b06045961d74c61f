"""What a path does to quality: clips of the small trained model, adapted and continued by the same method on the same path.

Full-size rows have random weights and say nothing of quality, so each stands beside this: PSNR and SSIM of the generated frames, how
far their change from frame to frame is from the real one's (`temporal_error`, dB), and the PSNR between a path's frames and the
plain path's that runs every layer (`psnr_to_exact`; 100 stands for the same bits). Clips are the shifted tuning clips of the world made
by code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..engine.adaptation import AdaptationSettings
from ..engine.clip import Experiment, Known, continue_clip, encode_known
from ..engine.data.video import to_model
from ..engine.demo.world import DOMAINS, build_scene, captions, clip_numbers, frames_of
from ..engine.methods import AnyMethod, Delta, DeltaClosedForm, FullFineTuning, LoRA, NoAdaptation
from ..engine.metrics.psnr import psnr
from ..engine.metrics.score import score_frames
from ..engine.metrics.temporal import frame_changes
from ..engine.models.load import EMBEDDED, load_dit, load_vae
from ..engine.models.stdit3 import Caption
from ..engine.sampler import SamplerSettings
from ..engine.text.encoder import TRAINED_TABLE, EmbeddedText
from ..engine.window import Window
from .step_rows import attention, channels, on
from .step_scene import Scene
from .stopwatch import Stopwatch

SIZE, SHORT_SIZE = (96, 128), (32, 48)
FIXED = AdaptationSettings(timesteps="sampler", draws=16)
METHODS: dict[str, tuple[AnyMethod, AdaptationSettings]] = {
    "none": (NoAdaptation(), FIXED),
    "full": (FullFineTuning(steps=20, lr=3e-5), FIXED),
    "lora": (LoRA(steps=20, lr=3e-4, rank=8, alpha=8.0), FIXED),
    "lora_last_14": (
        LoRA(steps=20, lr=3e-4, rank=8, alpha=8.0, last_layers=3, cache_prefix=True),
        replace(FIXED, draws=4),
    ),
    "delta_pre": (Delta(steps=20, site="pre", lr=1e-2), FIXED),
    "delta_mid_closed": (DeltaClosedForm(site="mid", ridge=1e-1), FIXED),
    "delta_post_closed": (DeltaClosedForm(site="post", ridge=1e-1), FIXED),
}
"""By the name of the full-size row; the last quarter of the layers stands for its last 14 of 56."""
PATHS = {
    "plain": ("eager", "plain"),
    "fast": ("fused, not compiled", "last triton"),
    "compiled": ("compiled", "last compiled"),
    "float8": ("fused, not compiled, float8", "last triton"),
    "float8 alone": ("eager, float8", "plain"),
}
"""How the layers are computed, and in which order the VAE keeps its channels, by the last word of a clip's row. fast: what a run takes
on the cards that were measured (engine/path_table.json)."""


@contextmanager
def path_of(scene: Scene, path: str) -> Iterator[None]:
    """Compute the transformer and the VAE of a scene by one of PATHS for a while."""
    layers, order = PATHS[path]
    with on(scene, layers), channels(scene, order):
        yield


@dataclass(frozen=True)
class Made:
    """One clip, continued. generated, truth: the scored frames, [3, F, H, W]; last: the last known one, [3, 1, H, W]; layers: of the
    outcome."""

    generated: Tensor
    truth: Tensor
    last: Tensor
    layers: dict[str, int]


class Quality:
    """The small model on a device. clips: how many; steps: of sampling, without guidance, or else a sampler of one's own; short: as a
    check, two of its layers on small pictures, and two steps of adaptation."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        clips: int,
        steps: int = 12,
        short: bool = False,
        sampler: SamplerSettings | None = None,
    ) -> None:
        dit, vae = load_dit(str(EMBEDDED / "dit"), device, dtype), load_vae(str(EMBEDDED / "vae"), device, dtype)
        if short:
            dit.spatial_blocks, dit.temporal_blocks = dit.spatial_blocks[:1], dit.temporal_blocks[:1]
        self.short, self.size = short, SHORT_SIZE if short else SIZE
        sampler = sampler or SamplerSettings(steps=steps, text_guidance=1.0, image_guidance=1.0, sdedit=False)
        experiment = Experiment(dit, vae, Window(), self.size, sampler, FIXED, 0)
        self.clips = [self._clip(dit.config.caption_channels, index) for index in range(clips)]
        self.scene = Scene(experiment, self.clips[0][0].to(device), Stopwatch(device))
        self.scene.compiler = "inductor" if device.type == "cuda" else "aot_eager"
        self.exact: dict[str, list[Made]] = {}
        attention(self.scene)

    def _clip(self, channels: int, index: int) -> tuple[Tensor, Caption]:
        """Pixels [3, F, H, W] in [-1, 1], and the caption."""
        window = Window()
        scene = build_scene(DOMAINS["shifted"], clip_numbers("shifted", "tuning", [index]))
        pixels = to_model(frames_of(scene, window.total_frames, window.fps, *self.size)[0])
        text = EmbeddedText(channels, table_file=TRAINED_TABLE).encode(captions(scene))[0]
        return pixels, Caption(text.embedding[None])

    def make(self, name: str, path: str, **cached: int) -> list[Made]:
        """Adapt to every clip by a method and continue it, on a path. cached: the feature cache's keys of the sampler."""
        method, adaptation = METHODS[name]
        if self.short and not isinstance(method, NoAdaptation | DeltaClosedForm):
            method = replace(method, steps=2)
        if self.short and isinstance(method, LoRA) and method.last_layers != "all":
            method = replace(method, last_layers=1)
        adaptation = replace(adaptation, draws=2) if self.short else adaptation
        sampler = replace(self.scene.experiment.sampler, **cached)
        experiment = replace(self.scene.experiment, adaptation=adaptation, sampler=sampler)
        window, made = experiment.window, []
        with path_of(self.scene, path):
            adapter = method.attach(experiment.dit, 0)
            try:
                for index, (pixels, caption) in enumerate(self.clips):
                    pixels, caption = pixels.to(self.scene.device), caption.to(self.scene.device)
                    known = Known(f"shifted-tuning-{index:06d}", encode_known(experiment.vae, pixels, window), caption)
                    outcome = continue_clip(experiment, known, adapter)
                    truth = pixels[:, window.generated.start : window.generated.stop]
                    last = pixels[:, window.known_frames - 1 : window.known_frames]
                    made.append(Made(outcome.pixels, truth, last, outcome.layers))
            finally:
                adapter.detach()
        return made

    def measure(self, name: str, path: str, **cached: int) -> dict[str, Any]:
        """Means over the clips, for the row of a method on a path. cached: as `make` has it."""
        if name not in self.exact:
            self.exact[name] = self.make(name, "plain")
        exact = path == "plain" and not cached
        found = self.exact[name] if exact else self.make(name, path, **cached)
        scores = [score_frames(m.generated, m.truth, lpips=None, lpips_reason="not measured here") for m in found]
        moved = [frame_changes(*(torch.cat([m.last, video], dim=1) for video in (m.generated, m.truth))) for m in found]
        row: dict[str, Any] = {
            "psnr": mean([s["psnr"]["mean"] for s in scores]),
            "ssim": mean([s["ssim"]["mean"] for s in scores]),
            "temporal_error": mean([m["frame_psnr"]["error"] for m in moved]),
            "quality_clips": len(found),
        }
        if cached:
            row["quality_layers_reused"] = mean([reused_share(m.layers) for m in found])
        if not exact:
            pairs = zip(found, self.exact[name], strict=True)
            row["psnr_to_exact"] = mean([psnr(a.generated, b.generated).mean().item() for a, b in pairs])
        return row


def reused_share(layers: dict[str, int]) -> float:
    """Of all evaluations of a layer, those that were reused; 0 without a feature cache."""
    return layers["reused"] / sum(layers.values()) if layers else 0.0


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
