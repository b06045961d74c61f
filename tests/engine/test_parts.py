"""Penalties, schedules and early stopping around the steps of any gradient method."""

import math

import pytest
import torch
from torch import nn
from vidtta.engine.adaptation import AdaptationSettings
from vidtta.engine.fisher import empirical_fisher
from vidtta.engine.methods import Delta, FullFineTuning, LoRA
from vidtta.engine.methods.optimize import AdamW, Masters, optimize
from vidtta.engine.methods.parts import EWC, EarlyStopping, Fisher, L2ToStart, Parts

from .tiny import noise, tiny_dit, tiny_task

METHODS = {"full": FullFineTuning, "lora": LoRA, "delta": Delta}
each_method = pytest.mark.parametrize("kind", METHODS)


def adapted(kind, fisher=None, **settings):
    model = tiny_dit(depth=1)
    own = {"rank": 2} if kind == "lora" else {}
    adapter = METHODS[kind](steps=4, lr=1e-2, **own, **settings).attach(model, 0)
    adapter.fisher = fisher(adapter) if fisher else None
    trace = adapter.adapt(tiny_task(model), lambda step, loss: None)
    return adapter, trace


@each_method
def test_the_distance_falls_as_the_penalty_grows_and_vanishes_with_a_proximal_step(kind):
    free = adapted(kind)[0].change().master
    for step, weights in (("gradient", (1e-3, 0.3, 10.0)), ("proximal", (1e-3, 10.0, 1e3))):
        distances = [adapted(kind, l2=L2ToStart(weight=w, step=step))[0].change().master for w in weights]
        assert free * 1.001 >= distances[0] > distances[1] > distances[2], step
    assert adapted(kind, l2=L2ToStart(weight=1e9, step="proximal"))[0].change().master < 1e-5 * free


def test_the_proximal_step_is_the_minimum_it_stands_for():
    start, weight, lr, pull = noise(0, 6), nn.Parameter(noise(1, 6)), 0.1, 3.0
    plain = nn.Parameter(weight.detach().clone())
    settings = {"steps": 1, "lr": lr, "gradient_clip": 0.0}
    optimize(Masters([plain]), AdamW(**settings), lambda step: plain.square().sum())
    optimize(
        Masters([weight]),
        AdamW(**settings, l2=L2ToStart(weight=pull, step="proximal")),
        lambda step: weight.square().sum(),
        start=[start],
    )
    # d/dw of pull / 2 |w - start|^2 + |w - plain|^2 / (2 lr)
    assert torch.allclose(pull * (weight - start) + (weight - plain) / lr, torch.zeros(6), atol=1e-5)


def test_penalty_gradients_are_those_of_the_penalties():
    weight, start, diagonal = nn.Parameter(noise(0, 5)), noise(1, 5), noise(2, 5).square()
    settings = AdamW(
        steps=1, gradient_clip=0.0, lr=1.0, l2=L2ToStart(weight=0.7), ewc=EWC(clips="x", weight=3.0), betas=(0.0, 0.0)
    )
    leaf = weight.detach().double().requires_grad_()
    away = leaf - start.double()
    value = 0.7 / 2 * away.square().sum() + 3 / (2 * 10) * (diagonal.double() * away.square()).sum()
    (expected,) = torch.autograd.grad(value, leaf)
    trace = optimize(
        Masters([weight]), settings, lambda step: (0 * weight).sum(), start=[start], fisher=Fisher([diagonal], 10)
    )
    assert trace.penalties == [pytest.approx(value.item(), rel=1e-6)]
    assert trace.gradient_norms == [pytest.approx(expected.norm().item(), rel=1e-6)]


@each_method
def test_ewc_pulls_back_what_the_base_depends_on(kind):
    def fisher(adapter):
        return empirical_fisher(adapter.masters.parameters, [tiny_task(adapter.model, clip_id="other")], 3)

    free = adapted(kind)[0].change().master
    held = [adapted(kind, fisher, ewc=EWC(clips="x", weight=w))[0].change().master for w in (1e-6, 1e3)]
    assert free * 1.001 >= held[0] > held[1]


def test_ewc_without_its_information_is_refused():
    with pytest.raises(ValueError, match="ewc needs the Fisher information"):
        adapted("full", ewc=EWC(clips="x"))


@each_method
def test_early_stopping_goes_back_to_the_best_step(kind):
    """A rate that overshoots: the held-out loss rises, adapting ends, and the state is that of the best step."""
    early = EarlyStopping(every=1, patience=2, draws=2)
    own = {"rank": 2} if kind == "lora" else {}
    model = tiny_dit(depth=1)
    rate = {"full": 2e-3, "lora": 0.05, "delta": 0.5}[kind]
    adapter = METHODS[kind](steps=12, lr=rate, early_stopping=early, **own).attach(model, 0)
    task, states = tiny_task(model), {}
    trace = adapter.adapt(task, lambda step, loss: states.update({step + 1: adapter.state()}))
    steps, losses = zip(*trace.held_out, strict=True)
    assert steps == tuple(range(trace.steps + 1))
    assert trace.kept_step == losses.index(min(losses))
    assert trace.steps == 12 or trace.steps == trace.kept_step + 2
    state = adapter.state()
    assert trace.kept_step > 0 and all(torch.equal(state[k], states[trace.kept_step][k]) for k in state)
    with torch.no_grad():
        assert task.held_out_loss(2).item() == pytest.approx(min(losses), rel=1e-5)


def test_early_stopping_keeps_the_start_where_every_step_harms():
    model = tiny_dit(depth=1)
    wild = FullFineTuning(steps=5, lr=0.3, early_stopping=EarlyStopping(patience=2)).attach(model, 0)
    trace = wild.adapt(tiny_task(model), lambda step, loss: None)
    assert (trace.kept_step, trace.steps) == (0, 2)
    assert wild.change().changed == 0


def test_held_out_draws_are_none_that_are_trained_on():
    task = tiny_task(tiny_dit(depth=1), AdaptationSettings())
    for k in range(3):
        assert not torch.equal(task.draw(k).noise, task.held_out_draw(k).noise)
        assert torch.equal(task.held_out_draw(k).noise, task.held_out_draw(k).noise)


def test_schedules():
    def rates(**settings):
        return [round(Parts(**settings).rate(step, 4), 4) for step in range(4)]

    assert rates() == [1.0] * 4
    assert rates(schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(schedule="cosine") == [1.0, round(0.5 + math.sqrt(0.125), 4), 0.5, round(0.5 - math.sqrt(0.125), 4)]
    assert rates(warmup=2) == [0.5, 1.0, 1.0, 1.0]
    weights = []
    for schedule in ("constant", "linear"):
        weight = nn.Parameter(torch.zeros(1))
        settings = AdamW(steps=4, lr=1.0, schedule=schedule, gradient_clip=0.0, eps=1e-12)
        optimize(Masters([weight]), settings, lambda step, weight=weight: weight.sum())
        weights.append(-weight.item())
    assert weights == pytest.approx([4.0, 2.5])


def test_the_temporal_loss_compares_neighbours_inside_a_chunk():
    """Known latent frames 0-6: chunks 0-4 and 5-6; with 3 that condition, 3-4 and 5-6 are pairs, and 4-5 is a seam."""
    settings = AdaptationSettings(draws=3, temporal=2.0)
    task = tiny_task(tiny_dit(depth=1), settings)
    assert task.pairs.tolist() == [3, 5]
    draw, latents = task.draw(1), task.latents.float()
    s = draw.t.item() / 1000
    velocity = noise(5, *latents.shape)
    clean = (1 - s) * latents + s * draw.noise + s * velocity
    moved = [(clean[:, :, k + 1] - clean[:, :, k]) - (latents[:, :, k + 1] - latents[:, :, k]) for k in (3, 5)]
    expected = torch.stack(moved).square().mean()
    assert torch.allclose(task.temporal_error(velocity, draw), expected, rtol=1e-4)
    exact = latents - draw.noise  # the true velocity predicts the clean latents
    assert task.temporal_error(exact, draw).item() < 1e-10
    with torch.no_grad():
        plain = tiny_task(task.model, AdaptationSettings(draws=3)).loss(draw)
        assert task.velocity_loss(draw).item() == plain.item() < task.loss(draw).item()


def test_temporal_needs_a_pair():
    with pytest.raises(ValueError, match="two predicted latent frames in one chunk"):
        tiny_task(tiny_dit(depth=1), AdaptationSettings(temporal=1.0, context_latents=6))
