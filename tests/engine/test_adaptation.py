"""The adaptation task: its draws, its losses, and that the frames to predict never enter the network."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from vidtta.engine.adaptation import AdaptationSettings, Draw, Task
from vidtta.engine.models.stdit3 import Condition, STDiT3

from .tiny import CHANNELS, noise, tiny_caption, tiny_dit, tiny_latents, tiny_task

CONTEXT = {"continuation": 3, "official": 3, "denoise": 0}  # frames given as condition
COUNTED_FROM = {"continuation": 3, "official": 0, "denoise": 0}
RATIO_49 = math.sqrt(480 * 640 / 512**2 * (48 // 4))  # 3.75: the timestep shift of 49 frames at 480 x 640


def same(a: Draw, b: Draw) -> bool:
    return torch.equal(a.t, b.t) and torch.equal(a.noise, b.noise)


@pytest.mark.parametrize("timesteps", ["sampler", "logit_normal"])
def test_a_draw_depends_on_seed_clip_and_index_alone(timesteps):
    settings = AdaptationSettings(timesteps=timesteps)
    model = tiny_dit()
    first = tiny_task(model, settings)
    in_order = [first.draw(k) for k in range(4)]
    torch.manual_seed(1)
    elsewhere = AdaptationSettings(timesteps=timesteps, objective="official", context_latents=5)
    other = tiny_task(model, elsewhere, latents=tiny_latents(seed=9))
    for k in (3, 1, 3, 0, 2):
        assert same(other.draw(k), in_order[k])
        assert same(first.draw(k), in_order[k])
    different = [tiny_task(model, settings, recipe_seed=1), tiny_task(model, settings, clip_id="another")]
    draws = [*in_order, *(task.draw(0) for task in different)]
    assert len({tuple(d.noise.flatten().tolist()) for d in draws}) == 6
    assert all(d.noise.shape == (1, CHANNELS, 7, 4, 6) and d.noise.dtype == d.t.dtype == torch.float32 for d in draws)


def test_a_number_of_draws_cycles_and_fresh_ones_do_not():
    model = tiny_dit()
    fresh = tiny_task(model, AdaptationSettings(timesteps="sampler"))
    three = tiny_task(model, AdaptationSettings(timesteps="sampler", draws=3))
    assert all(same(three.draw(k), fresh.draw(k % 3)) for k in range(8))
    assert not any(same(fresh.draw(j), fresh.draw(k)) for j in range(8) for k in range(j))


def test_sampler_timesteps_are_points_of_the_grid_the_sampler_walks():
    task = tiny_task(tiny_dit(torch.bfloat16), AdaptationSettings(timesteps="sampler"))
    grid = task.grid.tolist()
    # The official sampler's timesteps for 49 frames of 480 x 640 in bfloat16, 30 steps: first three and last.
    assert [*grid[:3], grid[-1]] == pytest.approx([1000, 990.926, 981.385, 114.926], abs=1e-3)
    drawn = [task.draw(k).t.item() for k in range(400)]
    assert set(drawn) == set(grid)  # each of 30 points is left out with probability 30 (29/30)^400 = 4e-5
    assert all(task.draw(k).t.shape == (1,) for k in range(2))


def test_logit_normal_timesteps_are_shifted_for_the_sampled_length():
    """The shift multiplies the odds t / (1000 - t) by the ratio, so their logarithm is normal around its logarithm."""
    task = tiny_task(tiny_dit(), AdaptationSettings())
    t = torch.cat([task.draw(k).t for k in range(1000)]).double()
    log_odds = (t / (1000 - t)).log()
    # 49 frames give log 3.75 = 1.32; the 21 known ones would give log 2.42 = 0.88. A mean of 1000 is off by 0.03.
    assert log_odds.mean().item() == pytest.approx(math.log(RATIO_49), abs=0.1)
    assert log_odds.std().item() == pytest.approx(1, abs=0.08)


def expected_loss(task: Task, model: STDiT3, draw: Draw, objective: str) -> Tensor:
    """The loss from its definition, through the network's forward pass alone."""
    x0, context = task.latents, CONTEXT[objective]
    s = draw.t / 1000
    mask = torch.zeros_like(x0)
    mask[:, :, :context] = 1
    caption = tiny_caption()
    velocity = model(
        (1 - s) * x0 + s * draw.noise,
        draw.t,
        torch.tensor([24.0]),
        model.text_states(caption),
        model.text_states(model.null_caption(caption)),
        model.geometry(7, (4, 6), (480, 640), tuple(range(context))),
        Condition(x0 * mask, mask),
    )
    wrong = velocity - (x0 - draw.noise)
    return wrong[:, :, COUNTED_FROM[objective] :].square().mean()


@pytest.mark.parametrize("timesteps", ["sampler", "logit_normal"])
@pytest.mark.parametrize("objective", CONTEXT)
def test_loss_is_its_definition(objective, timesteps):
    model = tiny_dit()
    task = tiny_task(model, AdaptationSettings(objective=objective, timesteps=timesteps))
    for k in range(3):
        draw = task.draw(k)
        expected = expected_loss(task, model, draw, objective)
        assert task.loss(draw).item() == pytest.approx(expected.item(), rel=1e-6)
        assert task.loss(draw, task.captions()).item() == task.loss(draw).item()
        counted = (task.latents - draw.noise)[:, :, COUNTED_FROM[objective] :]
        assert task.zero_loss(draw).item() == pytest.approx(counted.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("objective", CONTEXT)
def test_only_frames_that_count_contribute(objective):
    task = tiny_task(tiny_dit(), AdaptationSettings(objective=objective))
    draw, output = task.draw(0), noise(5, 1, 2 * CHANNELS, 7, 4, 6)
    error, zero = task.error(output, draw).item(), task.zero_loss(draw).item()
    clean = task.latents

    def moved(frame: int) -> bool:
        """Whether the target of a frame enters the loss; checks that the loss of predicting zero agrees."""
        task.latents = clean.clone()
        task.latents[:, :, frame] += 1
        changed = task.error(output, draw).item() != error
        assert (task.zero_loss(draw).item() != zero) == changed
        return changed

    assert [moved(frame) for frame in range(7)] == [frame >= COUNTED_FROM[objective] for frame in range(7)]
    task.latents = clean
    output[:, CHANNELS:] = math.nan  # the network's other channels are no velocity
    assert task.error(output, draw).item() == error


def test_error_of_a_bfloat16_output_is_taken_in_float32():
    task = tiny_task(tiny_dit(torch.bfloat16))
    draw, output = task.draw(0), noise(5, 1, CHANNELS, 7, 4, 6).bfloat16()
    error = task.error(output, draw)
    exact = (output.double() - (task.latents.double() - draw.noise.double()))[:, :, 3:].square().mean()
    assert error.dtype == torch.float32
    assert error.item() == pytest.approx(exact.item(), rel=1e-6)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


class Spy:
    """Passes everything on to a network, and keeps each tensor that it was given."""

    def __init__(self, model: STDiT3) -> None:
        self.model = model
        self.given: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.model, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self.given += [tensor.clone() for tensor in tensors_in([args, list(kwargs.values())])]
            return value(*args, **kwargs)

        return call


@pytest.mark.parametrize("objective", CONTEXT)
def test_the_frames_to_predict_reach_the_network_through_the_noised_latents_alone(objective):
    """Change the clean latents and the noise together so that their mixture stays: the network must not notice."""
    context = CONTEXT[objective]
    # At t = 500 multiples of 1/64 mix without rounding.
    clean, epsilon, shift = ((noise(seed, 1, CHANNELS, 7, 4, 6) * 64).round() / 64 for seed in (1, 2, 3))
    shift[:, :, :context] = 0
    t = torch.tensor([500.0])

    def run(latents: Tensor, added: Tensor) -> tuple[list[Tensor], float]:
        spy = Spy(tiny_dit())
        task = tiny_task(spy, AdaptationSettings(objective=objective), latents=latents)  # type: ignore[arg-type]
        return spy.given, task.loss(Draw(t, added)).item()

    given, loss = run(clean, epsilon)
    given_scrambled, loss_scrambled = run(clean + shift, epsilon - shift)
    assert loss != loss_scrambled
    assert len(given) == len(given_scrambled) >= 10
    assert all(torch.equal(a, b) for a, b in zip(given, given_scrambled, strict=True))
    assert any(torch.equal(tensor, 0.5 * clean + 0.5 * epsilon) for tensor in given if tensor.shape == clean.shape)


@pytest.mark.parametrize("objective", CONTEXT)
def test_the_condition_holds_the_context_and_zeros(objective):
    context = CONTEXT[objective]
    task = tiny_task(tiny_dit(), AdaptationSettings(objective=objective))
    latents, mask = task.condition.latents, task.condition.mask
    assert latents.shape == mask.shape == task.latents.shape
    assert torch.equal(latents[:, :, :context], task.latents[:, :, :context])
    assert torch.equal(mask[:, :, :context], torch.ones_like(mask[:, :, :context]))
    assert not latents[:, :, context:].any() and not mask[:, :, context:].any()
    assert task.geometry.known == context


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_latents": 0}, "context_latents must be at least 1, was 0; for none use objective: denoise"),
        ({"draws": 0}, "draws must be at least 1 or fresh, was 0"),
    ],
)
def test_settings_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AdaptationSettings(**settings)


@pytest.mark.parametrize("context", [7, 8])
def test_a_context_of_every_known_frame_leaves_nothing_to_predict(context):
    message = f"context_latents must leave a known latent frame to predict: it was {context} of 7 known latent frames"
    for objective in ("continuation", "official"):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            tiny_task(tiny_dit(), AdaptationSettings(objective=objective, context_latents=context))
    task = tiny_task(tiny_dit(), AdaptationSettings(objective="denoise", context_latents=context))
    assert task.geometry.known == 0


def test_sampler_draws_spread_evenly_over_the_grid():
    """Sixteen draws of any clip meet each quarter of the grid, so that no range of timesteps is left without one."""
    model = tiny_dit()
    for clip in range(50):
        task = tiny_task(
            model, AdaptationSettings(draws=16, timesteps="sampler"), clip_id=f"clip {clip}", sampling_steps=32
        )
        places = sorted((task.grid == task.draw(k).t).nonzero().item() for k in range(16))
        assert {int(place) // 8 for place in places} == {0, 1, 2, 3}
