"""What a method is given to adapt on: one clip's known latents, a network, and a loss for draw k.

Draw k (a timestep and noise) depends on (recipe seed, clip, k) alone, so every method and every resume sees the same draws. The
noised latents, the condition and the caption go in; the clean latents of the frames to predict enter the loss only.
"""

from copy import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .flow import (
    NUM_TIMESTEPS,
    add_noise,
    logit_normal_timestep,
    sampling_timesteps,
    timestep_transform,
    velocity_target,
)
from .models.attention import TextStates
from .models.stdit3 import Caption, Condition, Embedded, STDiT3
from .models.vae import CHUNK_LATENTS
from .seeds import generator_for
from .transfer import send

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings:
    """The self-supervised task on the known latent frames."""

    objective: Literal["continuation", "denoise", "official"] = "continuation"
    """continuation: the first known latents condition, the others are predicted and alone count; denoise: none conditions,
    all count; official: as continuation, but all count (the loss of v1.3's training)."""
    context_latents: int = 3
    """Known latent frames that condition while adapting; the remaining known ones are predicted. Not used by denoise."""
    timesteps: Literal["logit_normal", "sampler"] = "logit_normal"
    """logit_normal: as v1.3 was trained; sampler: points spread evenly over the sampler's own grid."""
    draws: int | Literal["fresh"] = "fresh"
    """How many different (timestep, noise) draws to cycle through; fresh: a new one each step."""
    adapted_branches: Literal["all", "conditional"] = "all"
    """Which guidance branches of the sampler use the adapted weights; conditional: the prompt branch alone."""
    temporal: float = 0.0
    """Weight of the temporal-consistency loss: squared error of the differences between neighbouring predicted clean latent
    frames of one chunk of the VAE, beside the velocity's."""
    reset: int | Literal["clip", "never"] = "clip"
    """When the weights go back to the base: after every clip (episodic), never, or after every so many clips of the list
    (continual: a clip's result then depends on the clips before it, and is marked)."""

    def __post_init__(self) -> None:
        if self.context_latents < 1:
            raise ValueError(
                f"context_latents must be at least 1, was {self.context_latents}; for none use objective: denoise"
            )
        if isinstance(self.draws, int) and self.draws < 1:
            raise ValueError(f"draws must be at least 1 or fresh, was {self.draws}")
        if self.temporal < 0:
            raise ValueError(f"temporal must not be negative, was {self.temporal}")
        if isinstance(self.reset, int) and self.reset < 2:
            raise ValueError(f"reset must be clip, never or a number of clips of at least 2, was {self.reset}")


class Draw(NamedTuple):
    """One timestep, [1] float32 0..1000, and noise of the latents' shape in float32."""

    t: Tensor
    noise: Tensor


class Task:
    """One clip's adaptation task.

    latents: the known latents [1, C, K, h, w] on the model's device. pixel_size: height, width. sampled_frames and
    sampling_steps: of the sampler, so that noise levels are those that sampling will meet.
    """

    def __init__(
        self,
        model: STDiT3,
        latents: Tensor,
        prompt: Caption,
        settings: AdaptationSettings,
        *,
        recipe_seed: int,
        clip_id: str,
        pixel_size: tuple[int, int],
        fps: float,
        sampled_frames: int,
        sampling_steps: int,
    ) -> None:
        self.model = model
        self.latents = latents
        self.prompt = prompt
        self.settings = settings
        self.recipe_seed = recipe_seed
        self.clip_id = clip_id
        known = latents.shape[2]
        context = 0 if settings.objective == "denoise" else settings.context_latents
        if context >= known:
            raise ValueError(
                f"context_latents must leave a known latent frame to predict: it was {context} of {known} known latent frames"
            )
        self.geometry = model.geometry(known, (latents.shape[3], latents.shape[4]), pixel_size, tuple(range(context)))
        mask = torch.zeros_like(latents)
        mask[:, :, :context] = 1
        self.condition = Condition(latents * mask, mask)
        self.first_counted = 0 if settings.objective in ("denoise", "official") else context
        self.fps = torch.full((1,), fps, device=model.device)
        self._size = (*pixel_size, sampled_frames)
        first = torch.arange(self.first_counted, known - 1)
        pairs = first[first % CHUNK_LATENTS < CHUNK_LATENTS - 1]
        self.pairs = pairs.to(latents.device)  # latent frames whose next one shares their chunk
        if settings.temporal and not len(self.pairs):
            raise ValueError(
                "temporal needs two predicted latent frames in one chunk of the VAE; lower context_latents"
            )
        self.grid = sampling_timesteps(sampling_steps, *self._size, size_dtype=model.dtype)
        self._drawn: dict[int, Draw] = {}

    def of(self, latents: Tensor, prompt: Caption | None = None) -> "Task":
        """The same task on other known latents of the same shape, and with another caption where one is given. Only for draws that
        are made already: it makes none of that clip."""
        if latents.shape != self.latents.shape:
            raise ValueError(f"latents must be {list(self.latents.shape)} as the task's, were {list(latents.shape)}")
        other, mask = copy(self), self.condition.mask
        other.latents, other.condition, other.prompt = latents, Condition(latents * mask, mask), prompt or self.prompt
        return other

    def draw(self, k: int) -> Draw:
        """Draw k, cycling through `settings.draws` of them; on the model's device. The last two drawn are kept."""
        if self.settings.draws != "fresh":
            k = k % self.settings.draws
        if k not in self._drawn:
            self._drawn = dict([*self._drawn.items()][-1:]) | {k: self._draw(k, "adaptation")}
        return self._drawn[k]

    def held_out_draw(self, k: int) -> Draw:
        """Draw k of those that no step trains on, of the same distribution."""
        return self._draw(k, "held out")

    def held_out_loss(self, draws: int, text: tuple[TextStates, TextStates] | None = None) -> Tensor:
        """The mean loss over so many held-out draws, under the weights in force."""
        return torch.stack([self.loss(self.held_out_draw(k), text) for k in range(draws)]).mean()

    def _draw(self, k: int, purpose: str) -> Draw:
        generator = generator_for(self.recipe_seed, self.clip_id, purpose, k)
        if self.settings.timesteps == "sampler":
            # A golden-ratio sequence from a start of the clip's own: any few draws spread evenly over the grid.
            start = torch.rand((), generator=generator_for(self.recipe_seed, self.clip_id, f"{purpose} timesteps"))
            place = (start.item() + k * GOLDEN_RATIO) % 1
            t = self.grid[int(place * len(self.grid))].reshape(1)
        else:
            t = timestep_transform(logit_normal_timestep(generator), *self._size, size_dtype=self.model.dtype)
        noise = torch.randn(self.latents.shape, generator=generator)
        return Draw(*(send(tensor, self.latents.device, tensor.dtype) for tensor in (t, noise)))

    def captions(self) -> tuple[TextStates, TextStates]:
        """Text states of the prompt and the null caption under the weights in force."""
        return self.model.text_states(self.prompt), self.model.text_states(self.model.null_caption(self.prompt))

    def embed(self, draw: Draw) -> Embedded:
        """The noised latents inside the network, before the first layer."""
        x_t = add_noise(self.latents, draw.noise, draw.t)
        return self.model.embed(x_t, draw.t, self.fps, self.geometry, self.condition)

    def loss(self, draw: Draw, text: tuple[TextStates, TextStates] | None = None) -> Tensor:
        """What adapting lowers: the velocity's mean squared error over the frames that count, plus the temporal loss where it has a
        weight. text: the captions' states, if they are not trained."""
        return self.loss_from(self.embed(draw), draw, 0, text or self.captions())

    def loss_from(self, state: Embedded, draw: Draw, start: int, text: tuple[TextStates, TextStates]) -> Tensor:
        """The loss, given the state before layer `start`."""
        state = self.model.run_layers(state, *text, self.geometry, start)
        output = self.model.head(state, self.geometry)
        error = self.error(output, draw)
        return error + self.settings.temporal * self.temporal_error(output, draw) if self.settings.temporal else error

    def temporal_error(self, output: Tensor, draw: Draw) -> Tensor:
        """Mean squared error of the differences between neighbouring predicted clean latent frames.

        x0 = x_t + s v follows from the predicted velocity. Only pairs inside one chunk of the VAE and among the frames that
        count: across a chunk's seam latent frames are not a time step apart (the chunks share a pixel frame).
        """
        velocity = output[:, : self.latents.shape[1]].float()
        clean = add_noise(self.latents, draw.noise, draw.t) + draw.t / NUM_TIMESTEPS * velocity
        apart = clean - self.latents.float()  # the error of x0; a difference of errors is the error of the difference
        return (apart[:, :, self.pairs + 1] - apart[:, :, self.pairs]).square().mean()

    def velocity(self, draw: Draw, text: tuple[TextStates, TextStates] | None = None) -> Tensor:
        """The predicted velocity on the frames that count, float32."""
        state = self.model.run_layers(self.embed(draw), *(text or self.captions()), self.geometry)
        return self._counted(self.model.head(state, self.geometry))

    def velocity_loss(self, draw: Draw, text: tuple[TextStates, TextStates] | None = None) -> Tensor:
        """Mean squared error of the velocity alone, whatever adapting also lowers."""
        return (self.velocity(draw, text) - self.target(draw)).square().mean()

    def error(self, output: Tensor, draw: Draw) -> Tensor:
        """Mean squared error of the network's output [1, at least C, K, h, w] over the frames that count."""
        return (self._counted(output) - self.target(draw)).square().mean()

    def _counted(self, output: Tensor) -> Tensor:
        return output[:, : self.latents.shape[1], self.first_counted :].float()

    def target(self, draw: Draw) -> Tensor:
        """x0 - noise on the frames that count, float32."""
        target = velocity_target(self.latents.float(), draw.noise)
        return target[:, :, self.first_counted :]

    def zero_loss(self, draw: Draw) -> Tensor:
        """The loss of predicting zero: what any trained network must beat."""
        return self.target(draw).square().mean()
