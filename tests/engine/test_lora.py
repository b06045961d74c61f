"""Low-rank adaptation: what it adds, its start, its gradients, and the prefix that is kept."""

import re
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vidtta.engine.adaptation import AdaptationSettings
from vidtta.engine.methods.lora import LoRA, LoRAAdapter, LoRALinear, Target
from vidtta.engine.models.stdit3 import STDiT3

from .tiny import DTYPES, FIXED_DRAWS, noise, tiny_dit, tiny_task

ALL_TARGETS = get_args(Target)


def ignore(step: int, loss: float) -> None:
    pass


def attach(model: STDiT3, recipe_seed: int = 0, **settings) -> LoRAAdapter:
    return LoRA(**{"rank": 2, "lr": 1e-2, "steps": 3, **settings}).attach(model, recipe_seed)


def output(model: STDiT3) -> Tensor:
    task = tiny_task(model)
    with torch.no_grad():
        return model.head(model.run_layers(task.embed(task.draw(0)), *task.captions(), task.geometry), task.geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", ["random", "svd"])
def test_before_the_first_step_it_is_the_base(start, dtype):
    base = output(tiny_dit(dtype))
    model = tiny_dit(dtype)
    adapter = attach(model, targets=ALL_TARGETS, start=start)
    assert all(a.A.any() and not a.B.any() for a in adapter.adapters.values())
    assert torch.equal(output(model), base)


def test_the_addition_is_scaled_by_alpha_over_rank():
    base = nn.Linear(10, 6)
    layer = LoRALinear(base, rank=4, alpha=6.0)
    A, B, x = noise(1, 4, 10), noise(2, 6, 4), noise(3, 5, 10)
    with torch.no_grad():
        layer.A.copy_(A)
        layer.B.copy_(B)
        merged = F.linear(x, base.weight + 1.5 * B @ A, base.bias)
        torch.testing.assert_close(layer(x), merged, rtol=1e-5, atol=1e-5)


def test_targets_and_last_layers_choose_what_is_wrapped():
    """Layers run spatial 0, temporal 0, spatial 1, temporal 1; the last three leave out spatial 0."""
    model = tiny_dit()
    adapter = attach(model, targets=("cross_attn.q_linear", "mlp.fc2"), last_layers=3)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    blocks = ("temporal_blocks.0", "spatial_blocks.1", "temporal_blocks.1")
    assert wrapped == {f"{block}.{target}" for block in blocks for target in ("cross_attn.q_linear", "mlp.fc2")}
    assert list(adapter.state())[:2] == ["layers.1.cross_attn.q_linear.A", "layers.1.cross_attn.q_linear.B"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{matrix}" for name in wrapped for matrix in "AB"
    }
    # Rank 2 on a square layer 48 -> 48 and on 192 -> 48, three times each.
    assert adapter.change().trained == 3 * 2 * (48 + 48 + 192 + 48)


def test_every_target_exists_in_every_layer():
    model = tiny_dit()
    adapter = attach(model, targets=ALL_TARGETS)
    linears = {n for n, m in model.layers[0].named_modules() if isinstance(m, LoRALinear)}
    assert linears == set(ALL_TARGETS)
    assert len(adapter.adapters) == 4 * 7


def test_change_measures_what_is_added():
    model = tiny_dit(torch.bfloat16)
    adapter = attach(model, alpha=3.0)
    start = {name: tensor.clone() for name, tensor in adapter.state().items()}
    adapter.adapt(tiny_task(model), ignore)
    state, change = adapter.state(), adapter.change()
    added = [
        1.5 * state[f"{name}.B"].bfloat16().double() @ state[f"{name}.A"].bfloat16().double()
        for name in adapter.adapters
    ]
    assert change.effective == pytest.approx(torch.stack([a.norm() for a in added]).norm().item(), rel=1e-5)
    moves = torch.cat([(state[name] - start[name]).flatten() for name in state])
    assert change.master == pytest.approx(moves.norm().item(), rel=1e-5)
    assert change.changed == sum(int((state[n].bfloat16() != start[n].bfloat16()).sum()) for n in state)


def test_a_random_start_depends_on_the_recipe_seed_and_the_layer_alone():
    every = attach(tiny_dit(), targets=ALL_TARGETS).state()
    last = attach(tiny_dit(), targets=("attn.proj", "attn.qkv"), last_layers=1).state()
    assert len(last) == 4
    assert all(torch.equal(tensor, every[name]) for name, tensor in last.items())
    other = attach(tiny_dit(), recipe_seed=1, targets=ALL_TARGETS).state()
    starts = [t for state in (every, other) for name, t in state.items() if name.endswith("A")]
    assert len({tuple(t.flatten().tolist()) for t in starts}) == 2 * 28
    widest = every["layers.0.mlp.fc2.A"].abs()  # uniform within 1 / sqrt(192)
    assert 0.95 * 192**-0.5 < widest.max().item() <= 192**-0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_svd_start_is_the_leading_right_singular_vectors(dtype):
    adapter = attach(tiny_dit(dtype), rank=5, start="svd", targets=ALL_TARGETS, last_layers=1)
    for name, layer in adapter.adapters.items():
        A = layer.A.detach().double()
        torch.testing.assert_close(A @ A.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
        leading = torch.linalg.svd(layer.base.weight.double()).Vh[:5]
        sign = (A * leading).sum(1, keepdim=True).sign()
        torch.testing.assert_close(A, sign * leading, rtol=0, atol=1e-5, msg=name)
        largest = A.gather(1, A.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()  # the sign is not left to the solver


def test_gradients_of_a_layer_are_exact():
    layer = LoRALinear(nn.Linear(7, 5), rank=3, alpha=2.0).double()
    A, B, x = (noise(i, *shape).double().requires_grad_() for i, shape in enumerate([(3, 7), (5, 3), (4, 7)]))

    def run(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"A": A, "B": B}, (x,))

    assert torch.autograd.gradcheck(run, (A, B, x))


def test_gradients_through_the_network_agree_with_finite_differences(monkeypatch):
    # The network's output and the loss are float32 by design; here nothing may round.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    model = tiny_dit(torch.float64)
    adapter = attach(model, targets=ALL_TARGETS)
    trained = [p.requires_grad_() for p in adapter.masters.parameters]
    directions = []
    with torch.no_grad():
        for i, parameter in enumerate(trained):
            parameter.data = (parameter + 0.1 * noise(i, *parameter.shape)).double()  # B = 0 would hide A's gradient
            directions.append(noise(1000 + i, *parameter.shape).double())
    task = tiny_task(model)
    draw = task.draw(0)
    gradients = torch.autograd.grad(task.loss(draw), trained)

    def loss_at(kind: int, step: float) -> float:
        """The loss after a step along the direction, of all A (0) or all B (1)."""
        with torch.no_grad():
            for parameter, direction in list(zip(trained, directions, strict=True))[kind::2]:
                parameter += step * direction
            value = task.loss(draw).item()
            for parameter, direction in list(zip(trained, directions, strict=True))[kind::2]:
                parameter -= step * direction
        return value

    for kind in (0, 1):
        slope = sum((g * d).sum().item() for g, d in list(zip(gradients, directions, strict=True))[kind::2])
        # Five points: the error is of fourth order in the step.
        h = 1e-4
        far, near = (loss_at(kind, s * h) - loss_at(kind, -s * h) for s in (2, 1))
        assert abs(slope) > 1e-2
        assert (8 * near - far) / (12 * h) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_of_fixed_draws_goes_down(dtype):
    model = tiny_dit(dtype)
    task = tiny_task(model, AdaptationSettings(draws=1, timesteps="sampler"))
    trace = attach(model, steps=20, lr=2e-2, rank=4, targets=ALL_TARGETS).adapt(task, ignore)
    assert trace.losses[-1] < 0.7 * trace.losses[0]


def runs_of(model: STDiT3) -> list[int]:
    """How often each layer has run, counted from now on."""
    counts = [0] * len(model.layers)
    for index, layer in enumerate(model.layers):

        def count(module: nn.Module, args: tuple, index: int = index) -> None:
            counts[index] += 1

        layer.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("targets", [("attn.qkv", "attn.proj"), ALL_TARGETS], ids=["attention", "all"])
@pytest.mark.parametrize("last_layers", [1, 2, 3])
def test_a_kept_prefix_changes_nothing_and_runs_once_a_draw(last_layers, targets):
    """With all targets the captions' keys and values are trained too, of the last layers only."""
    traces, states, counts = [], [], []
    for cached in (False, True):
        model = tiny_dit()
        counts.append(runs_of(model))
        adapter = attach(model, steps=7, targets=targets, last_layers=last_layers, cache_prefix=cached)
        traces.append(adapter.adapt(tiny_task(model), ignore))
        states.append(adapter.state())
    cut = 4 - last_layers
    assert counts[0] == [7] * 4
    assert counts[1] == [FIXED_DRAWS.draws] * cut + [7] * last_layers
    assert traces[1].losses == pytest.approx(traces[0].losses, rel=1e-6)
    assert len(set(traces[0].losses)) == 7
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [("attn.qkv",), ALL_TARGETS], ids=["text fixed", "text trained"])
def test_captions_are_computed_once_unless_they_are_trained(targets, monkeypatch):
    model, calls = tiny_dit(), []
    text_states = model.text_states
    monkeypatch.setattr(model, "text_states", lambda caption: calls.append(1) or text_states(caption))
    attach(model, targets=targets).adapt(tiny_task(model), ignore)
    assert len(calls) == (2 * 3 if targets == ALL_TARGETS else 2)  # the prompt and the null caption


def test_a_kept_prefix_does_not_outlive_its_clip():
    model, new = tiny_dit(), tiny_dit()
    adapter = attach(model, last_layers=1, cache_prefix=True)
    adapter.adapt(tiny_task(model, clip_id="another"), ignore)
    adapter.restore()
    losses = adapter.adapt(tiny_task(model), ignore).losses
    assert losses == attach(new, last_layers=1, cache_prefix=True).adapt(tiny_task(new), ignore).losses


def test_a_kept_prefix_with_fresh_draws_is_refused():
    method = LoRA(last_layers=1, cache_prefix=True)
    message = "cache_prefix needs adaptation.draws to be a number, was fresh: a fresh draw has nothing cached"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method.check(AdaptationSettings(draws="fresh"))
    method.check(AdaptationSettings(draws=1))
    LoRA(last_layers=1).check(AdaptationSettings(draws="fresh"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, was 0"),
        ({"targets": ()}, "targets must name each linear layer once and at least one, was []"),
        (
            {"targets": ("mlp.fc1", "mlp.fc1")},
            "targets must name each linear layer once and at least one, was ['mlp.fc1', 'mlp.fc1']",
        ),
        ({"last_layers": 0}, "last_layers must be at least 1 or all, was 0"),
        (
            {"cache_prefix": True},
            "cache_prefix needs last_layers to be a number: before the first layer there is nothing to keep",
        ),
        ({"lr": 0.0}, "lr must be positive, was 0.0"),
    ],
)
def test_settings_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 49}, "rank must be at most 48 for attn.qkv, was 49"),
        ({"last_layers": 5}, "last_layers must be at most 4 for this network, was 5"),
    ],
)
def test_what_the_network_cannot_hold_is_refused(settings, message):
    model = tiny_dit()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LoRA(**settings).attach(model, 0)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
