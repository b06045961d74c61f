"""Training of the small transformer, and of its table of words, on the continuation of familiar clips.

The objective is v1.3's: rectified flow with logit-normal, transformed timesteps; all frames noised at the same t; known frames given
as condition, their text null; a clip in twenty each without text, without condition, without both. Two things differ from the
official training, as they do in the engine's adaptation: only frames to predict count, and the known frames are encoded alone,
as they are when a clip is continued.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..flow import NUM_TIMESTEPS, add_noise, timestep_transform, training_loss
from ..models.geometry import Geometry
from ..models.stdit3 import Caption, Condition, STDiT3
from ..models.vae import VAE, latent_stats
from ..seeds import generator_for
from ..text.encoder import TABLE_ROWS, word_rows
from .train_vae import FPS, HEIGHT, WIDTH
from .training import Cards, Plan, Trainer
from .world import DOMAINS, build_scene, captions, clip_numbers, render

FRAMES = 49
WORDS = 48
"""Longest caption of the world, in words."""
CLIP, ADAPTATION = (15, 7), (7, 3)
"""Latent frames and how many of them are known: of a clip, and of its adaptation."""
SHAPES = (CLIP, ADAPTATION, CLIP) * 8 + ((15, 9),)
"""What the steps train in turn: mostly these two, now and then 32 known frames."""
DROP = 0.05
"""Share of clips without text; of those without condition; of those without both."""
RENEWED = 96
"""Steps after which new clips join the bank, in the oldest ones' place once it is full."""


@dataclass(frozen=True)
class Bank:
    """Encoded clips on the card. whole: [n, C, 15, h, w], 49 frames; alone: [n, C, 2, h, w], latent frames 5 and 6 of frames 17-21
    encoded alone; rows: of the word table, [n, WORDS], -1 where the caption has ended."""

    whole: Tensor
    alone: Tensor
    rows: Tensor

    def replace(self, at: int, other: "Bank") -> None:
        for mine, new in ((self.whole, other.whole), (self.alone, other.alone), (self.rows, other.rows)):
            mine[at : at + len(new)] = new


@torch.no_grad()
def encode_clips(vae: VAE, indices: range, cards: Cards) -> Bank:
    """Familiar training clips, drawn and encoded as one batch."""
    scene = build_scene(DOMAINS["familiar"], clip_numbers("familiar", "training", indices).to(cards.device))
    pixels = render(scene, torch.arange(FRAMES) / FPS, HEIGHT, WIDTH)
    centre, spread = latent_stats(cards.device)
    with cards.autocast():
        parts = [
            vae.encoder(pixels[:, :, a:b]).float().chunk(2, 1)[0] for a, b in ((0, 17), (16, 33), (32, 49), (16, 21))
        ]
    whole, alone = ((p - centre) / spread for p in (torch.cat(parts[:3], dim=2), parts[3]))
    rows = torch.full((len(indices), WORDS), -1, dtype=torch.long)
    for row, caption in zip(rows, captions(scene), strict=True):
        words = torch.tensor(word_rows(caption, WORDS))
        row[: len(words)] = words
    return Bank(whole.bfloat16(), alone.bfloat16(), rows.to(cards.device))


def initialise(dit: STDiT3) -> None:
    """The official start: Xavier-uniform linear layers, no biases, no condition; and an output of zero."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    names = ["x_embedder_cond.proj", "x_embedder_cond_mask.proj", "fps_embedder.mlp.2", "final_layer.linear"]
    names += [
        f"temporal_blocks.{k}.{part}"
        for k in range(dit.config.depth)
        for part in ("attn.proj", "cross_attn.proj", "mlp.fc2")
    ]
    for name in names:
        for tensor in dit.get_submodule(name).parameters():
            nn.init.zeros_(tensor)


def continuation_loss(
    dit: STDiT3,
    table: Tensor,
    geometry: Geometry,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    drop: Tensor,
    rows: Tensor,
) -> Tensor:
    """Mean squared error of the velocity over the frames to predict. latents, noise: [B, C, T, h, w] float32; t: [B], 0..1000; drop:
    [B] uniform numbers that decide what is dropped; rows: [B, WORDS]."""
    known, here = geometry.known, rows >= 0
    no_text, no_condition = drop < 2 * DROP, (drop >= DROP) & (drop < 3 * DROP)
    embedding = table[rows.clamp(min=0)]
    null = dit.null_caption(Caption(embedding, here))
    prompt = Caption(torch.where(no_text[:, None, None], null.embedding, embedding), here)
    mask = torch.zeros_like(latents)
    mask[:, :, :known] = 1
    given = torch.where(no_condition[:, None, None, None, None], 0, latents * mask)
    fps = torch.full_like(t, FPS)
    x_t = add_noise(latents, noise, t)
    velocity = dit(x_t, t, fps, dit.text_states(prompt), dit.text_states(null), geometry, Condition(given, mask))
    return training_loss(*(x[:, :, known:] for x in (velocity, latents, noise)))


class Batches:
    """Batches of one card from a bank of encoded clips that new clips pass through; every draw on the card has a named seed.

    A quarter of the bank is filled before the first step, the rest while the training goes on.
    """

    def __init__(self, vae: VAE, plan: Plan, cards: Cards, size: int) -> None:
        self.vae, self.plan, self.cards = vae, plan, cards
        self.part = min(64, size)
        self.places = max(1, size // self.part)
        self.drawn = 0
        first = self._new()
        self.bank = Bank(*(t.repeat(self.places, *[1] * (t.ndim - 1)) for t in (first.whole, first.alone, first.rows)))
        while self.drawn < self.places // 4:
            self._renew()
        self.generator = torch.Generator(cards.device).manual_seed(
            generator_for(0, "dit", "batches", cards.rank).initial_seed()
        )

    def _new(self) -> Bank:
        first = (self.drawn * self.cards.count + self.cards.rank) * self.part
        self.drawn += 1
        return encode_clips(self.vae, range(first, first + self.part), self.cards)

    def _renew(self) -> None:
        self.bank.replace(self.drawn % self.places * self.part, self._new())

    def take(self, step: int, frames: int, known: int) -> tuple[Tensor, ...]:
        """latents, noise, t, drop and rows for `continuation_loss`."""
        if step % RENEWED == RENEWED - 1:
            self._renew()
        device, generator = self.cards.device, self.generator
        B = self.plan.batch * (2 if frames == ADAPTATION[0] else 1)  # about as many tokens in every step
        held = min(self.drawn, self.places) * self.part
        at = torch.randint(held, (B,), device=device, generator=generator)
        latents = self.bank.whole[at, :, :frames].float()
        if known in (3, 7):  # windows that end inside a chunk: its known part was encoded alone
            latents[:, :, 5:7] = self.bank.alone[at].float()
        noise = torch.randn(latents.shape, device=device, generator=generator)
        t = torch.randn(B, device=device, generator=generator).sigmoid() * NUM_TIMESTEPS
        drop = torch.rand(B, device=device, generator=generator)
        return latents, noise, timestep_transform(t, HEIGHT, WIDTH, FRAMES), drop, self.bank.rows[at]


def train_dit(
    dit: STDiT3,
    table: nn.Parameter,
    vae: VAE,
    plan: Plan,
    cards: Cards,
    log: Callable[[int, dict[str, float]], None],
    bank: int,
) -> None:
    """Train the transformer and the word table [TABLE_ROWS + 1, channels] in place; afterwards they are the running averages.

    The layers' matrices take Muon's steps, all else AdamW's. On a card the layers are compiled and a step of each of SHAPES recorded.

    bank: clips that are held encoded, a card. log(step, figures) every 100 steps or so: the mean loss of each shape since the last.
    """
    assert len(table) == TABLE_ROWS + 1, table.shape
    dit.requires_grad_(True).train()
    dit.rope.freqs.requires_grad_(False)
    if cards.device.type == "cuda":
        for layer in dit.layers:
            layer.compile(dynamic=False)  # spatial and temporal layers share one graph each, a shape
    linears = [m for layer in dit.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    matrices = [p for m in linears for p in m.parameters() if p.ndim == 2]
    trainer = Trainer([table, *(p for p in dit.parameters() if p.requires_grad)], plan, cards, matrices)
    batches = Batches(vae, plan, cards, bank)
    latent_size = (HEIGHT // 8, WIDTH // 8)
    geometries = {
        (T, known): dit.geometry(T, latent_size, (HEIGHT, WIDTH), tuple(range(known))) for T, known in set(SHAPES)
    }
    losses: dict[tuple[int, int], list[Tensor]] = {}
    more = True
    while more:
        shape = SHAPES[trainer.taken % len(SHAPES)]
        loss = partial(continuation_loss, dit, table, geometries[shape])
        value = trainer.backward(shape, lambda *batch, loss=loss: (loss(*batch),), *batches.take(trainer.taken, *shape))
        more = trainer.step()
        losses.setdefault(shape, []).append(value)
        if trainer.taken % 100 == 2 or not more:
            means = {f"loss_{T}_{known}": torch.stack(v).mean().item() for (T, known), v in losses.items()}
            log(trainer.taken, means | {"clips": batches.drawn * batches.part * cards.count})
            losses = {}
    trainer.take_averages()
    dit.requires_grad_(False).eval()
