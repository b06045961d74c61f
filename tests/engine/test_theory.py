"""What must hold whatever the weights: plain descent lowers its own loss, and the closed form is the least of its objective."""

from dataclasses import replace

import pytest
import torch
from vidtta.engine.methods import Delta, DeltaClosedForm

from .tiny import FIXED_DRAWS, tiny_dit, tiny_task


@pytest.mark.parametrize("objective", ["continuation", "denoise", "official"])
def test_plain_gradient_descent_at_a_small_rate_never_raises_the_loss_on_fixed_draws(objective):
    model = tiny_dit()
    task = tiny_task(model, replace(FIXED_DRAWS, objective=objective))
    weights = [p.requires_grad_(True) for name, p in model.named_parameters() if name != "rope.freqs"]
    descent, losses = torch.optim.SGD(weights, lr=1e-4), []
    for _ in range(12):
        loss = torch.stack([task.loss(task.draw(k)) for k in range(3)]).mean()
        losses.append(loss.item())
        descent.zero_grad()
        loss.backward()
        descent.step()
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False)), losses


@pytest.mark.parametrize("site", ["mid", "post"])
@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
@pytest.mark.parametrize("lr", [1e-3, 1e-2, 1e-1])
def test_the_closed_form_is_never_above_the_iterative_delta(site, ridge, lr):
    """On one objective and the same draws: mean squared error plus ridge times the vector's squared length."""
    found = {}
    for name, method in (
        ("closed", DeltaClosedForm(site=site, ridge=ridge)),
        ("iterative", Delta(site=site, ridge=ridge, steps=60, lr=lr)),
    ):
        model = tiny_dit()
        adapter = method.attach(model, 0)
        task = tiny_task(model)
        adapter.adapt(task, lambda step, loss: None)
        with torch.no_grad():
            found[name] = (adapter.loss(adapter.cache(task)) + ridge * adapter.layer.d.square().sum()).item()
        adapter.detach()
    assert found["closed"] <= found["iterative"] * (1 + 1e-6)
