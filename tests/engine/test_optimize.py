"""AdamW on float32 masters, against the algorithm written out in float64."""

import re
import weakref

import pytest
import torch
from torch import Tensor, nn
from vidtta.engine.errors import Interrupted
from vidtta.engine.methods.optimize import AdamW, Masters, Trace, optimize

from .tiny import noise

STEPS = 20


def parameters(*dtypes: torch.dtype) -> list[nn.Parameter]:
    """Weights near 0.03, where bfloat16 numbers lie 1.2e-4 apart."""
    return [nn.Parameter((0.03 * noise(i, 40, 50)).to(dtype)) for i, dtype in enumerate(dtypes)]


def gradients(step: int, count: int) -> list[Tensor]:
    """Gradients with a mean that stays and noise that does not, rounded to bfloat16 so that every dtype holds them."""
    return [(noise(100 + i, 40, 50) + 0.5 * noise(1000 + 10 * step + i, 40, 50)).bfloat16() for i in range(count)]


def linear_loss(weights: list[nn.Parameter], step: int) -> Tensor:
    """A loss whose gradient is `gradients(step)`, whatever the weights are."""
    terms = [(w.float() * g.float()).sum() for w, g in zip(weights, gradients(step, len(weights)), strict=True)]
    return torch.stack(terms).sum()


def adamw_float64(start: Tensor, grads: list[Tensor], settings: AdamW) -> Tensor:
    """arXiv:1711.05101, algorithm 2, with the bias corrections of Adam; no clipping."""
    w, (b1, b2) = start.double(), settings.betas
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for i, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g.double(), b2 * v + (1 - b2) * g.double() ** 2
        w = w * (1 - settings.lr * settings.weight_decay)
        w = w - settings.lr * (m / (1 - b1**i)) / ((v / (1 - b2**i)).sqrt() + settings.eps)
    return w


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).norm().item()


def test_masters_of_bfloat16_weights_reach_what_exact_arithmetic_reaches():
    settings = AdamW(steps=STEPS, lr=1e-5, gradient_clip=0)
    (weight,) = parameters(torch.bfloat16)
    start = weight.detach().clone()
    grads = [gradients(step, 1)[0] for step in range(STEPS)]
    exact = adamw_float64(start, grads, settings)
    moved = distance(exact, start)

    masters = Masters([weight])
    trace = optimize(masters, settings, lambda step: linear_loss([weight], step))
    assert trace.steps == STEPS
    assert masters.tensors[0].dtype == torch.float32
    assert distance(masters.tensors[0], exact) < 1e-4 * moved
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, masters.tensors[0].bfloat16())
    # What the weights lose by one rounding at the end, they lose once.
    assert distance(weight, start) == pytest.approx(moved, rel=0.25)


def test_steps_on_bfloat16_weights_themselves_round_away():
    """Why there are masters: the same steps without them reach a small part of the way, however many are taken."""
    (weight,) = parameters(torch.bfloat16)
    start = weight.detach().clone()
    grads = [gradients(step, 1)[0] for step in range(STEPS)]
    optimizer = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    exact = adamw_float64(start, grads, AdamW(steps=STEPS, lr=1e-5))
    way = (exact - start.double()).flatten()
    reached = (weight.double() - start.double()).flatten() @ way / (way @ way)
    assert reached.item() < 0.25


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16, torch.float32)], ids=str)
def test_steps_are_adamw(dtypes, weight_decay):
    settings = AdamW(steps=7, lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, gradient_clip=0)
    weights = parameters(*dtypes)
    starts = [w.detach().clone() for w in weights]
    masters = Masters(weights)
    optimize(masters, settings, lambda step: linear_loss(weights, step))
    for i, start in enumerate(starts):
        exact = adamw_float64(start, [gradients(step, len(starts))[i] for step in range(7)], settings)
        assert distance(masters.tensors[i], exact) < 1e-5 * distance(exact, start)


def test_a_float32_parameter_is_its_own_master():
    weights = parameters(torch.float32, torch.bfloat16)
    masters = Masters(weights)
    assert masters.tensors[0] is weights[0]
    assert masters.tensors[1] is not weights[1]
    assert torch.equal(masters.tensors[1], weights[1].float())


def test_reset_takes_masters_back_in_place():
    weights = parameters(torch.float32, torch.bfloat16)
    values = [w.detach().clone() for w in weights]
    masters = Masters(weights)
    storage = [t.data_ptr() for t in masters.tensors]
    optimize(masters, AdamW(steps=2, lr=1e-2), lambda step: linear_loss(weights, step))
    assert not any(torch.equal(t, v.float()) for t, v in zip(masters.tensors, values, strict=True))
    masters.reset(values)
    masters.publish()
    assert all(torch.equal(t, v.float()) for t, v in zip(masters.tensors, values, strict=True))
    assert all(torch.equal(w, v) for w, v in zip(weights, values, strict=True))
    assert [t.data_ptr() for t in masters.tensors] == storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_start_from_zero(dtype):
    settings = AdamW(steps=5, lr=1e-3)
    (weight,) = parameters(dtype)
    start, masters = weight.detach().clone(), Masters([weight])

    def run() -> tuple[Trace, Tensor]:
        masters.reset([start])
        masters.publish()
        return optimize(masters, settings, lambda step: linear_loss([weight], step)), masters.tensors[
            0
        ].detach().clone()

    (first_trace, first), (second_trace, second) = run(), run()
    assert torch.equal(first, second)
    assert first_trace == second_trace
    # With moments of zero the first step moves each weight by lr, whatever its gradient.
    masters.reset([start])
    optimize(masters, AdamW(steps=1, lr=1e-3), lambda step: linear_loss([weight], step))
    step = (masters.tensors[0].detach() - start.float()).abs()
    assert step.median().item() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("path", ["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["both", "loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_it_does_harm(kind, dtype, path):
    settings = AdamW(steps=5, lr=1e-2)

    def loss(weights: list[nn.Parameter], step: int) -> Tensor:
        value = linear_loss(weights, step)
        if step < 2:
            return value
        return {
            "both": value * torch.nan,
            "loss": value + torch.inf,
            "gradient": value + (weights[0] - weights[0].detach()).abs().sqrt().sum(),  # the root of zero
        }[kind]

    (weight,) = parameters(dtype)
    masters, steps = Masters([weight], path=path), []
    with pytest.raises(
        FloatingPointError, match=r"^the loss or its gradient is not finite at step 2; a smaller lr may help$"
    ):
        optimize(masters, settings, lambda step: loss([weight], step), on_step=lambda step, value: steps.append(step))
    assert steps == [0, 1]
    assert weight.grad is None and masters.tensors[0].grad is None
    (other,) = parameters(dtype)
    optimize(Masters([other], path=path), AdamW(steps=2, lr=1e-2), lambda step: linear_loss([other], step))
    assert torch.equal(weight, other)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_gradients_are_clipped_over_all_parameters(clip, dtypes):
    weights = parameters(*dtypes)
    starts, masters = [w.detach().clone() for w in weights], Masters(weights)
    # With eps far above the gradients a first step is lr g / eps: it shows the gradient's length, which AdamW else hides.
    settings = AdamW(steps=1, lr=1e6, eps=1e6, gradient_clip=clip)
    trace = optimize(masters, settings, lambda step: linear_loss(weights, step))
    grads = [g.double() for g in gradients(0, 2)]
    norm = torch.cat(grads).norm().item()
    assert trace.gradient_norms == [pytest.approx(norm, rel=1e-5)]  # as it was before clipping
    factor = clip / norm if clip == 0.5 else 1.0
    for master, start, grad in zip(masters.tensors, starts, grads, strict=True):
        assert distance(master, start.double() - factor * grad) < 1e-4 * factor * grad.norm()


def test_a_penalty_pulls_but_is_not_part_of_the_losses():
    (weight,) = parameters(torch.float32)
    settings = AdamW(steps=3, lr=1e-2, gradient_clip=0)
    traces = []
    for penalty in (None, lambda: 1e6 * weight.square().sum()):
        with torch.no_grad():
            weight.copy_(parameters(torch.float32)[0])
        before = weight.detach().norm()
        traces.append(optimize(Masters([weight]), settings, lambda step: linear_loss([weight], step), penalty=penalty))
        shrunk = weight.detach().norm() < before
    assert shrunk
    assert traces[1].losses[0] == traces[0].losses[0]
    assert abs(traces[1].losses[0]) < 1e3 < traces[1].gradient_norms[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_step_follows_every_step_and_may_stop(dtype):
    (weight,) = parameters(dtype)
    masters, calls = Masters([weight]), []

    def on_step(step: int, loss: float) -> None:
        calls.append((step, loss))
        if step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        optimize(masters, AdamW(steps=9), lambda step: linear_loss([weight], step), on_step=on_step)
    assert [step for step, _ in calls] == [0, 1, 2]
    assert weight.grad is None and masters.tensors[0].grad is None


def test_a_step_is_asked_for_before_the_last_ones_numbers_are_read(monkeypatch):
    """So the device does not wait for the host. The weights in force in on_step are still those of its step: what was asked for
    changes none."""
    (weight,), (other,) = parameters(torch.float32), parameters(torch.float32)
    after, events = [], []

    def descend(step: int):
        events.append(f"ask {step}")
        gradient = gradients(step, 1)[0].float()
        value = (weight.detach() * gradient).sum()

        def take() -> Tensor:
            events.append(f"take {step}")
            weight.grad = gradient
            return value

        return take

    def read(numbers):
        values = [number.item() for number in numbers]
        return lambda: events.append("read") or values

    monkeypatch.setattr("vidtta.engine.methods.optimize.on_its_way", read)

    def on_step(step: int, loss: float) -> None:
        events.append(f"on_step {step}")
        assert weight.grad is None and torch.equal(weight, after[step])

    def launched(step: int) -> Tensor:
        return linear_loss([other], step)

    settings = AdamW(steps=3, lr=1e-2)
    truth = optimize(
        Masters([other]), settings, launched, on_step=lambda step, loss: after.append(other.detach().clone())
    )
    events.clear()
    trace = optimize(Masters([weight]), settings, launched, descend=descend, on_step=on_step)
    assert events == [
        "ask 0", "take 0", "ask 1", "read", "on_step 0", "take 1", "ask 2", "read", "on_step 1", "take 2", "read", "on_step 2",
    ]  # fmt: skip
    assert torch.equal(weight, other) and trace.losses == pytest.approx(truth.losses)


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_while_a_step_is_asked_for_leaves_no_gradient(failing):
    """As memory that ends in the middle of a backward pass does; the clip is then tried again, and would add to what is there."""
    (weight,), (other,) = parameters(torch.float32), parameters(torch.float32)

    def descend(step: int):
        weight.grad = gradients(step, 1)[0].float()
        if step == failing:
            raise MemoryError
        gradient, weight.grad = weight.grad, None

        def take() -> Tensor:
            weight.grad = gradient
            return (weight.detach() * gradient).sum()

        return take

    def launched(step: int) -> Tensor:
        return linear_loss([weight], step)

    settings = AdamW(steps=2, lr=1e-2)
    with pytest.raises(MemoryError):
        optimize(Masters([weight]), settings, launched, descend=descend)
    assert weight.grad is None
    with torch.no_grad():
        weight.copy_(other)
    optimize(Masters([weight]), settings, launched)
    optimize(Masters([other]), settings, lambda step: linear_loss([other], step))
    assert torch.equal(weight, other)


@pytest.mark.parametrize("path", ["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_let_go_before_the_next_are_asked_for(dtype, path):
    """Of all parameters they are 2.25 GiB at full size, which would lie beside the record that is then made."""
    (weight,) = parameters(dtype)
    held: list[weakref.ref[Tensor]] = []

    def descend(step: int):
        assert [step for step, gradient in enumerate(held) if gradient() is not None] == []
        gradient = gradients(step, 1)[0].to(dtype)
        held.append(weakref.ref(gradient))

        def take() -> Tensor:
            weight.grad = gradient
            return gradient.float().sum()

        return take

    optimize(Masters([weight], path=path), AdamW(steps=3), lambda step: linear_loss([weight], step), descend=descend)
    assert len(held) == 3


def test_trace_holds_each_step():
    (weight,) = parameters(torch.float32)
    first = linear_loss([weight], 0).item()
    trace = optimize(
        Masters([weight]),
        AdamW(steps=4, lr=1e-3),
        lambda step: linear_loss([weight], step),
        zero_loss=lambda step: torch.tensor(float(step)),
    )
    assert trace.steps == len(trace.losses) == len(trace.gradient_norms) == 4
    assert trace.zero_losses == [0, 1, 2, 3]
    assert trace.losses[0] == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, was 0; to adapt nothing use method kind none"),
        ({"lr": 0.0}, "lr must be positive, was 0.0"),
        ({"lr": float("nan")}, "lr must be positive, was nan"),
        ({"eps": -1.0}, "eps must be positive, was -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must lie in [0, 1), were [0.9, 1.0]"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, was -0.1"),
        ({"gradient_clip": -1.0}, "gradient_clip must not be negative, was -1.0"),
    ],
)
def test_settings_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AdamW(**settings)
