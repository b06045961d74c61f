"""The network of one clip: its shape, condition and caption fixed, ready to give the velocities that guidance combines.

Keys and values of the captions are computed once for the weights in force when the denoiser is made, so it is made after
adapting. The three branches of continuation (fact: the mask stays 1 in the branch without condition):

    branch          text      known latents   text of the known frames
    prompt          prompt    given           null
    null            null      given           null
    unconditional   null      zero            null

A feature cache, where one is given, spans the calls of one denoiser: each call is a step, and nothing outlives the continuation.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from .feature_cache import FeatureCache
from .models.attention import TextStates, apart, joined
from .models.geometry import Geometry
from .models.stdit3 import Caption, Condition, STDiT3, Through
from .recorded import Records


def _join(*states: TextStates) -> TextStates:
    """Several captions' states as one batch; they must be of one length and mask."""
    first = states[0]
    return TextStates(
        tuple(torch.cat(rows) for rows in zip(*(s.keys for s in states), strict=True)),
        tuple(torch.cat(rows) for rows in zip(*(s.values for s in states), strict=True)),
        None if first.mask is None else first.mask.repeat(len(states), 1, 1, 1),
    )


PROMPT, REST, ALL = slice(0, 1), slice(1, 3), slice(0, 3)
"""Branches, in the order of the table above."""


def velocities_of(model: STDiT3, geometry: Geometry, fps: float) -> Callable[..., Tensor]:
    """Velocities [B, C, T, h, w] float32 as a function of all that differs from step to step and from clip to clip: the latent
    [1, C, T, h, w], the timestep (scalar), the condition's latents and mask [B, C, T, h, w], and the text's tensors (`joined`). through: as
    the network takes it."""
    layers, fps_1 = len(model.layers), torch.full((1,), fps, device=model.device)

    def compute(
        z: Tensor, t: Tensor, latents: Tensor, mask: Tensor, *text: Tensor, through: Through | None = None
    ) -> Tensor:
        B = latents.shape[0]
        own, known = apart(text, layers)
        x = z.expand(B, -1, -1, -1, -1)
        return model(x, t.expand(B), fps_1.expand(B), own, known, geometry, Condition(latents, mask), through)

    return compute


class Denoiser:
    """Velocities of one clip's continuation branches, [1, C, T, h, w] float32 each; see `ContinuationVelocity`.

    base_weights: a context inside which the model computes with its unadapted weights. Given, only the prompt branch uses the
    adapted weights (`adapted_branches: conditional`); None, all branches do. records: of `velocities_of` this network, for the
    weights' storage and the modules that are in it now; None, each step is launched. cache: new, and this denoiser's alone; None,
    every layer is run at every step. One of both.
    """

    def __init__(
        self,
        model: STDiT3,
        geometry: Geometry,
        fps: float,
        prompt: Caption,
        condition: Condition,
        *,
        null: Caption | None = None,
        base_weights: Callable[[], AbstractContextManager[None]] | None = None,
        records: Records | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        self.model = model
        self.base_weights = base_weights
        assert records is None or cache is None, "a step with a feature cache is not recorded"
        self.compute = records or velocities_of(model, geometry, fps)
        self.cache = cache
        null = null or model.null_caption(prompt)
        self.prompt_text = model.text_states(prompt)
        self.null_text = model.text_states(null)
        without = torch.zeros_like(condition.latents)
        self.given = condition
        if base_weights is None:
            self.rest_text = self.null_text
            self.all_text = _join(self.prompt_text, self.null_text, self.null_text)
            self.all_conditions = Condition(
                torch.cat([condition.latents, condition.latents, without]), condition.mask.repeat(3, 1, 1, 1, 1)
            )
        else:
            with base_weights():
                self.rest_text = model.text_states(null)
            self.all_text = _join(self.rest_text, self.rest_text)
            self.all_conditions = Condition(
                torch.cat([condition.latents, without]), condition.mask.repeat(2, 1, 1, 1, 1)
            )

    def _velocity(
        self,
        branches: slice,
        z: Tensor,
        t: Tensor,
        text: TextStates,
        known_text: TextStates,
        condition: Condition,
    ) -> tuple[Tensor, ...]:
        if self.model.float8 is not None:
            self.model.float8.refresh()  # a record does not look whether the weights are those that it was made with
        through = {} if self.cache is None else {"through": partial(self.cache.run, branches)}
        found = self.compute(z, t, condition.latents, condition.mask, *joined((text, known_text)), **through)
        return found.clone().split(1)  # the next record may lie there

    def __call__(self, z: Tensor, t: Tensor, *, all_branches: bool) -> tuple[Tensor, ...]:
        if self.cache is not None:
            self.cache.next_step()
        if not all_branches:
            return self._velocity(PROMPT, z, t, self.prompt_text, self.null_text, self.given)
        if self.base_weights is None:
            return self._velocity(ALL, z, t, self.all_text, self.null_text, self.all_conditions)
        prompt = self._velocity(PROMPT, z, t, self.prompt_text, self.null_text, self.given)
        with self.base_weights():
            return *prompt, *self._velocity(REST, z, t, self.all_text, self.rest_text, self.all_conditions)


class TextDenoiser:
    """Velocities of text to video, (prompt, null); no condition is embedded, as in the official text-to-video sampling."""

    def __init__(
        self, model: STDiT3, geometry: Geometry, fps: float, prompt: Caption, null: Caption | None = None
    ) -> None:
        self.model = model
        self.geometry = geometry
        self.fps = torch.full((2,), fps, device=model.device)
        self.text = _join(model.text_states(prompt), model.text_states(null or model.null_caption(prompt)))

    def __call__(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = z.expand(2, -1, -1, -1, -1)
        prompt, null = self.model(x, t.expand(2), self.fps, self.text, None, self.geometry, None).split(1)
        return prompt, null
