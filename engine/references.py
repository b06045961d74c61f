"""What every method is seen against: repeating the last known frame, and the autoencoder alone."""

from typing import Any

import torch
from torch import Tensor

from .metrics.lpips import LPIPS
from .metrics.score import score_frames
from .models.vae import VAE
from .window import Window

REFERENCES = {"copy_last_frame": "copy last frame", "vae_ceiling": "VAE ceiling"}


@torch.no_grad()
def reference_scores(
    vae: VAE, pixels_3FHW: Tensor, window: Window, lpips: LPIPS | None, lpips_reason: str | None
) -> dict[str, dict[str, Any]]:
    """Scores of both references on the scored frames.

    copy_last_frame: the last known frame, held. vae_ceiling: the real clip encoded and decoded, the best a generator in this
    latent space could do; it sees the frames to predict, which is why it is a ceiling and not a method.
    """
    truth = pixels_3FHW[:, window.scored.start : window.scored.stop]
    last = pixels_3FHW[:, window.known_frames - 1 : window.known_frames].expand_as(truth)
    missing = (1 - pixels_3FHW.shape[1]) % 4  # the VAE drops frames beyond 4 k + 1: hold the last one
    padded = torch.cat([pixels_3FHW, pixels_3FHW[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    latents = vae.encode(padded[None])
    rebuilt = vae.decode(latents, window.scored)[0].float()
    return {
        "copy_last_frame": score_frames(last, truth, lpips=lpips, lpips_reason=lpips_reason),
        "vae_ceiling": score_frames(rebuilt, truth, lpips=lpips, lpips_reason=lpips_reason),
    }
