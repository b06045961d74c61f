"""How a continuation is scored, and what every method is seen against: repeating the last known frame, and the autoencoder alone."""

from typing import Any, Literal

import torch
from torch import Tensor

from .metrics.lpips import LPIPS
from .metrics.optical_flow import FlowName
from .metrics.score import score_frames, score_motion
from .models.vae import VAE
from .window import Window

REFERENCES = {"copy_last_frame": "copy last frame", "vae_ceiling": "VAE ceiling"}


@torch.no_grad()
def reference_scores(
    vae: VAE,
    pixels_3FHW: Tensor,
    window: Window,
    lpips: LPIPS | None,
    lpips_reason: str | None,
    flow: FlowName | Literal["none"] = "none",
) -> dict[str, dict[str, Any]]:
    """Scores of both references on the scored frames.

    copy_last_frame: the last known frame, held. vae_ceiling: the real clip encoded and decoded, the best a generator in this
    latent space could do; it sees the frames to predict, which is why it is a ceiling and not a method.
    """
    generated = pixels_3FHW[:, window.generated.start : window.generated.stop]
    last = pixels_3FHW[:, window.known_frames - 1 : window.known_frames].expand_as(generated)
    missing = (1 - pixels_3FHW.shape[1]) % 4  # the VAE drops frames beyond 4 k + 1: hold the last one
    padded = torch.cat([pixels_3FHW, pixels_3FHW[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    latents = vae.encode(padded[None])
    rebuilt = vae.decode(latents, window.generated)[0].float()
    return {
        name: score_continuation(made, pixels_3FHW, window, lpips=lpips, lpips_reason=lpips_reason, flow=flow)
        for name, made in (("copy_last_frame", last), ("vae_ceiling", rebuilt))
    }


def score_continuation(
    generated_3FHW: Tensor,
    pixels_3FHW: Tensor,
    window: Window,
    *,
    lpips: LPIPS | None,
    lpips_reason: str | None,
    flow: FlowName | Literal["none"],
) -> dict[str, dict[str, Any]]:
    """Every score of a continuation: of the scored frames, and of how all generated ones move on from the last known one.

    generated: every frame after the known ones; pixels: the real clip.
    """
    known, first = window.known_frames, window.scored.start - window.generated.start
    last = pixels_3FHW[:, known - 1 : known]
    frames = score_frames(
        generated_3FHW[:, first:], pixels_3FHW[:, window.scored.start :], lpips=lpips, lpips_reason=lpips_reason
    )
    return frames | score_motion(
        torch.cat([last, generated_3FHW], dim=1),
        pixels_3FHW[:, known - 1 :],
        chunk_seams=[seam - known + 1 for seam in window.chunk_seams],
        flow=flow,
    )


def means(scores: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The mean of each score, without its frames."""
    return {name: score.get("mean") for name, score in scores.items()}
