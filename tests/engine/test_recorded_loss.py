"""A clip's recorded steps: the same bits as launched ones, the first launched, gradients in the record's storage."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from vidtta.engine.adaptation import Draw
from vidtta.engine.methods import recorded_loss as module
from vidtta.engine.methods.optimize import AdamW, Masters, optimize
from vidtta.engine.methods.recorded_loss import RecordedLoss

from . import tiny

DEVICES = [
    pytest.param("cpu", id="stand-in for a record, CPU"),
    pytest.param(
        "cuda",
        id="CUDA graph",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="recording needs a GPU"),
    ),
]


class StandIn:
    """What `Recorded` promises, without a card: one computation on storage of its own, in which its gradients lie too. Recording runs
    the computation here, for the gradients to exist; on a card it runs nothing."""

    parameters: ClassVar[list[nn.Parameter]] = []

    def __init__(self, compute, inputs, *, warm_ups, pool=None):
        assert warm_ups == 0 and all(parameter.grad is None for parameter in self.parameters)
        self.compute, self.inputs, self.pool = compute, [tensor.clone() for tensor in inputs], object()
        compute(*self.inputs)
        self.gradients = [parameter.grad for parameter in self.parameters]

    def __call__(self, *inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        for parameter in self.parameters:
            parameter.grad = None
        value = self.compute(*self.inputs)
        for mine, parameter in zip(self.gradients, self.parameters, strict=True):
            assert mine is not None and parameter.grad is not None
            mine.copy_(parameter.grad)
            parameter.grad = None
        return value


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(module, "Recorded", StandIn)
    return torch.device(request.param)


def draws(device):
    return lambda step: Draw(torch.full((1,), 100.0 * step, device=device), tiny.noise(step, 4, 3).to(device))


def weights(device, dtype=torch.float32):
    StandIn.parameters = [nn.Parameter(tiny.noise(50 + k, 3, 3).to(device, dtype)) for k in range(2)]
    return StandIn.parameters


def loss_of(parameters):
    def loss(draw):
        x = draw.noise.to(parameters[0].dtype)
        return ((x @ parameters[0]).tanh() @ parameters[1]).float().square().mean() * (1 + draw.t.mean() / 1000)

    return loss


@pytest.mark.parametrize("path", ["plain", "fused", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_have_the_bits_of_launched_ones(device, dtype, path):
    settings, found = AdamW(steps=5, lr=1e-2), []
    for recorded in (False, True):
        parameters = weights(device, dtype)
        masters, loss, draw = Masters(parameters, path=path), loss_of(parameters), draws(device)
        descend = RecordedLoss(masters, draw, loss) if recorded else None
        trace = optimize(masters, settings, lambda step, loss=loss, draw=draw: loss(draw(step)), descend=descend)
        found.append((trace.losses, trace.gradient_norms, [m.detach().clone() for m in masters.tensors]))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))
    assert len(set(found[0][0])) == 5


def test_the_next_clip_is_recorded_anew(device):
    """A record reads the clip's own tensors, so another clip's must not be replayed from it."""
    parameters = weights(device)
    masters, settings = Masters(parameters), AdamW(steps=3, lr=1e-2)
    loss = loss_of(parameters)
    records, losses = [], []
    for factor in (1.0, 2.0):
        clip = torch.full((), factor, device=device)
        descend = RecordedLoss(masters, draws(device), lambda draw, clip=clip: loss(draw) * clip)
        losses.append(optimize(masters, settings, lambda step: torch.zeros(()), descend=descend).losses)
        records.append(masters.record)
    assert records[0] is not records[1]
    assert losses[1][1] > 1.5 * losses[0][1]


def test_one_step_records_nothing(device):
    parameters = weights(device)
    masters = Masters(parameters)
    optimize(
        masters,
        AdamW(steps=1),
        lambda step: torch.zeros(()),
        descend=RecordedLoss(masters, draws(device), loss_of(parameters)),
    )
    assert masters.record is None
