"""Training of the small autoencoder: chunks of the familiar world in, the same chunks out.

Loss: a Huber error of the pixels (quadratic up to 0.05), a weak KL divergence to the standard normal, so that the decoder bears the
noise that sampling leaves, and the latents' mean and spread a channel held at the constants of v1.3's normalisation, so that the
transformer meets latents near N(0, 1). Half of the clips are recoloured at random: the palettes of other worlds must pass too.
When a clip is continued, a chunk's first latents come from known frames that were encoded alone. Half of the chunks are decoded
from such latents, and they are drawn towards those of the whole chunk.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.vae import CHUNK_FRAMES, VAE, latent_stats
from ..seeds import generator_for
from .training import Cards, Plan, Trainer
from .world import DOMAINS, build_scene, clip_numbers, render

HEIGHT, WIDTH, FPS = 96, 128, 24
KL_WEIGHT = 2e-3
MOMENT_WEIGHT = 0.05
DRAWN = 8
"""Steps whose clips are drawn together, which saves launches."""
KNOWN_FRAMES, KNOWN_LATENTS = 5, 2
"""The part of a chunk that 22 known frames leave; it is encoded alone when a clip is continued."""
AGREEMENT_WEIGHT = 0.02


def chunks(plan: Plan, cards: Cards) -> Iterator[Tensor]:
    """Batches of chunks, float32 [B, 3, n, H, W] in [-1, 1], endless."""
    for group in count():
        first = (group * cards.count + cards.rank) * plan.batch * DRAWN
        numbers = clip_numbers("familiar", "training", range(first, first + plan.batch * DRAWN)).to(cards.device)
        start = torch.rand((), generator=generator_for(0, "vae", "start", first)).item() * 32 / FPS
        time = start + torch.arange(CHUNK_FRAMES) / FPS
        drawn = recolour(render(build_scene(DOMAINS["familiar"], numbers), time, HEIGHT, WIDTH), first)
        for batch in drawn.split(plan.batch):
            yield batch.contiguous()


def recolour(pixels_BCFHW: Tensor, seed: int) -> Tensor:
    """Mix the colour channels of every second clip by a random matrix with rows that sum to one, and shift its brightness."""
    generator = generator_for(0, "vae", "colour", seed)
    half = pixels_BCFHW[::2]
    mix = torch.eye(3) + 0.5 * torch.randn(len(half), 3, 3, generator=generator)
    mix = mix / mix.sum(-1, keepdim=True).clamp(min=0.5)
    shift = 0.3 * torch.randn(len(half), 1, 1, 1, 1, generator=generator)
    mixed = torch.einsum("bij,bj...->bi...", mix.to(half), half) + shift.to(half)
    pixels_BCFHW[::2] = mixed.clamp(-1, 1)
    return pixels_BCFHW


def vae_loss(vae: VAE, stats: tuple[Tensor, Tensor], pixels_BCFHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and for the log the mean squared error of the pixels, that of the half whose first latents come from known frames
    alone, and the mean squared distance of those latents from the whole chunk's, normalised. stats: `latent_stats`."""
    mean, logvar = vae.encoder(pixels_BCFHW).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    alone = vae.encoder(pixels_BCFHW[:, :, :KNOWN_FRAMES]).float().chunk(2, dim=1)[0]
    half = len(mean) // 2
    given = torch.cat((torch.cat((mean[:half, :, :KNOWN_LATENTS], alone[half:])), mean[:, :, KNOWN_LATENTS:]), dim=2)
    rebuilt = vae.decoder(given + torch.exp(0.5 * logvar) * torch.randn_like(mean)).float()
    error = rebuilt - pixels_BCFHW
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    centre, spread = stats
    agreement = ((alone - mean[:, :, :KNOWN_LATENTS]) / spread).square().mean()
    normal = ((mean - centre) / spread).transpose(0, 1).flatten(1)
    moments = normal.mean(1).square().mean() + (normal.std(1) - 1).square().mean()
    huber = F.smooth_l1_loss(rebuilt, pixels_BCFHW, beta=0.05)
    loss = huber + KL_WEIGHT * kl + MOMENT_WEIGHT * moments + AGREEMENT_WEIGHT * agreement
    return loss, error.square().mean(), error[half:].square().mean(), agreement


def train_vae(vae: VAE, plan: Plan, cards: Cards, log: Callable[[int, dict[str, float]], None]) -> None:
    """Train in place; afterwards the weights are the running average. log(step, figures) every 50 steps or so."""
    vae.requires_grad_(True).train()
    trainer, more = Trainer(vae.parameters(), plan, cards), True
    loss = partial(vae_loss, vae, latent_stats(cards.device))
    for pixels in chunks(plan, cards):
        values = trainer.backward("chunk", loss, pixels)
        more = trainer.step()
        if trainer.taken % 50 == 1 or not more:
            total, error, hybrid_error, agreement = values.tolist()
            decibels = {"psnr_db": 10 * math.log10(4 / error), "hybrid_psnr_db": 10 * math.log10(4 / hybrid_error)}
            log(trainer.taken, {"loss": total, **decibels, "agreement": agreement})
        if not more:
            break
    trainer.take_averages()
    vae.requires_grad_(False).eval()
