"""How a continuation is scored, and what every method is seen against: repeating the last known frame, and the autoencoder alone."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .metrics.lpips import LPIPS
from .metrics.optical_flow import FlowName, begin_flow
from .metrics.score import begin_motion, score_frames
from .models.vae import VAE
from .window import Window

Scores = dict[str, dict[str, Any]]

REFERENCES = {"copy_last_frame": "copy last frame", "vae_ceiling": "VAE ceiling"}


@torch.no_grad()
def begin_reference_scores(
    vae: VAE,
    pixels_3FHW: Tensor,
    truth_flow: Tensor | None,
    window: Window,
    lpips: LPIPS | None,
    lpips_reason: str | None,
    flow: FlowName | Literal["none"] = "none",
) -> Callable[[int], dict[str, Scores]]:
    """Scores of both references on the scored frames, begun as `begin_scores` says.

    copy_last_frame: the last known frame, held. vae_ceiling: the real clip encoded and decoded, the best a generator in this
    latent space could do; it sees the frames to predict, which is why it is a ceiling and not a method.
    """
    generated = pixels_3FHW[:, window.generated.start : window.generated.stop]
    last = pixels_3FHW[:, window.known_frames - 1 : window.known_frames].expand_as(generated)
    missing = (1 - pixels_3FHW.shape[1]) % 4  # the VAE drops frames beyond 4 k + 1: hold the last one
    padded = torch.cat([pixels_3FHW, pixels_3FHW[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    latents = vae.encode(padded[None])
    rebuilt = vae.decode(latents, window.generated)[0].float()
    begun = {
        name: begin_scores(made, pixels_3FHW, truth_flow, window, lpips=lpips, lpips_reason=lpips_reason, flow=flow)
        for name, made in (("copy_last_frame", last), ("vae_ceiling", rebuilt))
    }
    return lambda processors: {name: finish(processors) for name, finish in begun.items()}


def begin_scores(
    generated_3FHW: Tensor,
    pixels_3FHW: Tensor,
    truth_flow: Tensor | None,
    window: Window,
    *,
    lpips: LPIPS | None,
    lpips_reason: str | None,
    flow: FlowName | Literal["none"],
) -> Callable[[int], Scores]:
    """Every score of a continuation: of the scored frames, and of how all generated ones move on from the last known one.

    generated: every frame after the known ones; pixels: the real clip; truth_flow: of `begin_truth_flow`. What needs the device is done
    now; the rest, (processors) -> scores, touches no device and holds none of its memory.
    """
    known, first = window.known_frames, window.scored.start - window.generated.start
    last = pixels_3FHW[:, known - 1 : known]
    frames = score_frames(
        generated_3FHW[:, first:], pixels_3FHW[:, window.scored.start :], lpips=lpips, lpips_reason=lpips_reason
    )
    motion = begin_motion(
        torch.cat([last, generated_3FHW], dim=1),
        pixels_3FHW[:, known - 1 :],
        truth_flow,
        chunk_seams=[seam - known + 1 for seam in window.chunk_seams],
        flow=flow,
    )
    return lambda processors: frames | motion(processors)


def begin_truth_flow(
    pixels_3FHW: Tensor, window: Window, flow: FlowName | Literal["none"]
) -> Callable[[int], Tensor] | None:
    """The flow of the real frames from the last known one on, which all scores of a clip share, begun as `begin_scores` says; None
    where no flow is asked for."""
    if flow == "none":
        return None
    return begin_flow(flow, pixels_3FHW[:, window.known_frames - 1 :])


def means(scores: Scores) -> dict[str, float | None]:
    """The mean of each score, without its frames."""
    return {name: score.get("mean") for name, score in scores.items()}
