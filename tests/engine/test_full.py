"""Full fine-tuning: plain AdamW on every weight, and what its numbers mean."""

import math

import pytest
import torch
from torch import Tensor
from vidtta.engine.adaptation import AdaptationSettings
from vidtta.engine.methods.full import FullAdapter, FullFineTuning
from vidtta.engine.methods.protocol import Change
from vidtta.engine.models.stdit3 import STDiT3

from .tiny import DTYPES, FIXED_DRAWS, tiny_dit, tiny_task

FROZEN = "rope.freqs"


def ignore(step: int, loss: float) -> None:
    pass


def trained(model: STDiT3) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name != FROZEN}


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def test_it_is_adamw_on_every_parameter_but_the_rotary_frequencies():
    model, plain = tiny_dit(), tiny_dit()
    FullFineTuning(steps=3, lr=1e-3, gradient_clip=0.5).attach(model, 0).adapt(tiny_task(model), ignore)

    parameters = [p.requires_grad_() for name, p in plain.named_parameters() if name != FROZEN]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    task = tiny_task(plain)
    for step in range(3):
        optimizer.zero_grad()
        task.loss(task.draw(step)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    for (name, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(actual, expected), name
    assert not model.get_parameter(FROZEN).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_change_and_state_measure_the_weights(dtype):
    model = tiny_dit(dtype)
    adapter = FullFineTuning(steps=2, lr=1e-3).attach(model, 0)
    base = trained(model)
    adapter.adapt(tiny_task(model), ignore)
    now = trained(model)
    moves = [now[name].double() - base[name].double() for name in base]
    change = adapter.change()
    assert change.trained == sum(p.numel() for p in model.parameters()) - model.rope.freqs.numel()
    assert change.changed == sum(int((move != 0).sum()) for move in moves)
    assert change.effective == pytest.approx(norm(moves), rel=1e-5)
    masters = [m.detach().double() - b.double() for m, b in zip(adapter.masters.tensors, base.values(), strict=True)]
    assert change.master == pytest.approx(norm(masters), rel=1e-5)
    assert (change.master == change.effective) == (dtype == torch.float32)

    state = adapter.state()
    assert state.keys() == base.keys()
    assert all(difference.dtype == torch.float32 for difference in state.values())
    for name, difference in state.items():
        torch.testing.assert_close((base[name].float() + difference).to(dtype), now[name], rtol=1e-6, atol=1e-8)


def test_steps_too_small_for_bfloat16_move_the_masters_and_no_weight():
    """Weights that are zero take any step; the rule leaves none, so here nothing that computes moves."""
    model = tiny_dit(torch.bfloat16)
    adapter = FullFineTuning(steps=3, lr=1e-9).attach(model, 0)
    base = trained(model)
    adapter.adapt(tiny_task(model), ignore)
    change = adapter.change()
    assert change == Change(change.master, 0.0, 0, change.trained)
    assert 1e-9 < change.master < 3e-9 * math.sqrt(change.trained) * 1.01
    assert all(torch.equal(a, b) for a, b in zip(trained(model).values(), base.values(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_of_fixed_draws_goes_down(dtype):
    model = tiny_dit(dtype)
    task = tiny_task(model, AdaptationSettings(draws=1, timesteps="sampler"))
    trace = FullFineTuning(steps=12, lr=1e-3).attach(model, 0).adapt(task, ignore)
    assert trace.losses[-1] < 0.7 * trace.losses[0]
    assert all(value == trace.zero_losses[0] for value in trace.zero_losses)


def test_attached_storage_serves_every_clip():
    """Base copies and masters are made once: a run's memory does not grow with its clips."""
    model = tiny_dit(torch.bfloat16)
    adapter: FullAdapter = FullFineTuning(steps=1, lr=1e-3).attach(model, 0)
    held = [t.data_ptr() for t in (*adapter.base, *adapter.masters.tensors)]
    for clip in ("a", "b"):
        adapter.adapt(tiny_task(model, FIXED_DRAWS, clip_id=clip), ignore)
        adapter.restore()
    assert [t.data_ptr() for t in (*adapter.base, *adapter.masters.tensors)] == held
    adapter.detach()
    assert adapter.base == [] and adapter.masters.tensors == []
