"""What every method promises: nothing computes otherwise until it adapts, and afterwards the network is bit for bit as before."""

import dataclasses
from functools import cache
from typing import get_args

import pytest
import torch
from torch import Tensor
from vidtta.engine.errors import Interrupted
from vidtta.engine.methods import (
    METHODS,
    AnyMethod,
    Delta,
    DeltaClosedForm,
    FullFineTuning,
    LoRA,
    MoreSampling,
    NoAdaptation,
)
from vidtta.engine.methods.lora import Target
from vidtta.engine.methods.optimize import Trace
from vidtta.engine.methods.protocol import Adapter, Change
from vidtta.engine.models.checkpoint import state_hash
from vidtta.engine.models.stdit3 import STDiT3

from .tiny import DTYPES, FIXED_DRAWS, tiny_dit, tiny_task

CASES: dict[str, AnyMethod] = {
    "none": NoAdaptation(),
    "more sampling": MoreSampling(sampling_steps=6),
    "full": FullFineTuning(steps=2, lr=1e-2),
    "lora": LoRA(steps=2, lr=1e-2, rank=2),
    "lora all targets": LoRA(steps=2, lr=1e-2, rank=2, targets=get_args(Target)),
    "lora kv_linear": LoRA(steps=2, lr=1e-2, rank=2, targets=("cross_attn.kv_linear",), last_layers=1),
    "lora cached prefix": LoRA(steps=4, lr=1e-2, rank=2, last_layers=1, cache_prefix=True),
    "lora svd": LoRA(steps=2, lr=1e-2, rank=2, start="svd"),
    "delta post": Delta(steps=2, site="post"),
    "delta mid": Delta(steps=2, site="mid", ranges=2),
    "delta pre": Delta(steps=2, site="pre", ridge=1e-3),
    "closed form post": DeltaClosedForm(site="post", ridge=0.0),
    "closed form mid": DeltaClosedForm(site="mid", ranges=2),
}
STILL = ("none", "more sampling")  # they leave the network as it is
each_method = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def network(dtype: torch.dtype) -> STDiT3:
    return tiny_dit(dtype, depth=1)


def ignore(step: int, loss: float) -> None:
    pass


def output(model: STDiT3) -> Tensor:
    """The network's output on draw 0 of the task, its captions computed anew."""
    task = tiny_task(model)
    with torch.no_grad():
        state = model.run_layers(task.embed(task.draw(0)), *task.captions(), task.geometry)
        return model.head(state, task.geometry)


def tensors(model: STDiT3) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def adapt(adapter: Adapter, model: STDiT3, clip_id: str = "clip") -> tuple[Trace, dict[str, Tensor]]:
    return adapter.adapt(tiny_task(model, clip_id=clip_id), ignore), adapter.state()


@cache
def on_a_new_network(name: str, dtype: torch.dtype) -> tuple[Trace, dict[str, Tensor]]:
    """What a method makes of the clip as the first thing that ever happens to a network; its state outlives a restore."""
    model = network(dtype)
    adapter = CASES[name].attach(model, 0)
    trace, state = adapt(adapter, model)
    adapter.restore()
    return trace, state


def assert_as_on_a_new_network(name: str, dtype: torch.dtype, trace: Trace, state: dict[str, Tensor]) -> None:
    expected_trace, expected_state = on_a_new_network(name, dtype)
    assert trace == expected_trace
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[key], expected_state[key]) for key in state)
    assert any(tensor.any() for tensor in state.values()) == (name not in STILL)


@each_method
@each_dtype
def test_restore_is_bit_identical_in_the_same_storage_and_detach_leaves_no_trace(name, dtype):
    model = network(dtype)
    base_hash, base_output, base_tensors = state_hash(model), output(model), tensors(model)
    modules = [(path, type(module)) for path, module in model.named_modules()]

    adapter = CASES[name].attach(model, 0)
    attached_hash = state_hash(model)
    storage = {key: tensor.data_ptr() for key, tensor in tensors(model).items()}
    assert torch.equal(output(model), base_output)
    adapt(adapter, model, "another clip")
    assert (state_hash(model) != attached_hash) == (name not in STILL)
    assert torch.equal(output(model), base_output) == (name in STILL)
    adapter.restore()
    assert state_hash(model) == attached_hash
    assert {key: tensor.data_ptr() for key, tensor in tensors(model).items()} == storage
    assert torch.equal(output(model), base_output)

    torch.manual_seed(1)
    assert_as_on_a_new_network(name, dtype, *adapt(adapter, model))
    adapter.detach()
    assert state_hash(model) == base_hash
    now = tensors(model)
    assert list(now) == list(base_tensors)
    assert all(now[key] is tensor for key, tensor in base_tensors.items())
    assert [(path, type(module)) for path, module in model.named_modules()] == modules
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


@each_method
@each_dtype
def test_only_what_is_trained_changes_and_each_step_is_reported(name, dtype):
    model, method, calls = network(dtype), CASES[name], []
    base = tensors(model)
    before = {key: tensor.clone() for key, tensor in base.items()}
    adapter = method.attach(model, 0)
    trained = adapter.change().trained
    assert adapter.change() == Change(0.0, 0.0, 0, trained)

    trace = adapter.adapt(tiny_task(model), lambda step, loss: calls.append((step, loss)))
    steps = 0 if name in STILL else getattr(method, "steps", 1)
    assert trace.steps == adapter.steps == steps
    assert [step for step, _ in calls] == list(range(steps))
    assert [loss for _, loss in calls] == trace.losses[:steps]
    assert len(trace.zero_losses) == len(trace.losses)

    # Of the network's own tensors full fine-tuning alone changes any: all but the rotary frequencies and the null caption.
    changed = {key for key, tensor in base.items() if not torch.equal(tensor, before[key])}
    assert changed == (set(base) - {"rope.freqs", "y_embedder.y_embedding"} if name == "full" else set())
    change = adapter.change()
    assert change.trained == trained
    assert (change.master > 0, change.effective > 0, 0 < change.changed <= trained) == (name not in STILL,) * 3
    adapter.restore()
    assert adapter.change() == Change(0.0, 0.0, 0, trained)


@each_method
@each_dtype
def test_the_first_loss_is_that_of_the_unadapted_network(name, dtype):
    trace, _ = on_a_new_network(name, dtype)
    if name in STILL:
        assert trace == Trace()
        return
    task = tiny_task(network(dtype))
    # Deltas take all draws in one step, the other methods one.
    draws = [task.draw(k) for k in (range(3) if isinstance(CASES[name], Delta | DeltaClosedForm) else range(1))]
    with torch.no_grad():
        loss = torch.stack([task.loss(draw) for draw in draws]).mean().item()
        zero = torch.stack([task.zero_loss(draw) for draw in draws]).mean().item()
    assert trace.losses[0] == pytest.approx(loss, rel=1e-5)
    assert trace.zero_losses[0] == pytest.approx(zero, rel=1e-5)


@each_method
@each_dtype
def test_suspended_computes_with_the_base_weights_and_then_with_the_adapted_ones_again(name, dtype):
    model = network(dtype)
    base_output = output(model)
    adapter = CASES[name].attach(model, 0)
    adapt(adapter, model)
    adapted_output, adapted_hash = output(model), state_hash(model)
    with adapter.suspended():
        assert torch.equal(output(model), base_output)
    assert torch.equal(output(model), adapted_output)
    with pytest.raises(Interrupted), adapter.suspended():
        raise Interrupted
    assert torch.equal(output(model), adapted_output)
    assert state_hash(model) == adapted_hash
    with adapter.suspended():
        assert torch.equal(output(model), base_output)
    adapter.restore()
    with adapter.suspended():
        assert torch.equal(output(model), base_output)
    assert torch.equal(output(model), base_output)


@each_method
@each_dtype
def test_an_interruption_while_adapting_is_undone(name, dtype):
    model, last = network(dtype), getattr(CASES[name], "steps", 1) - 1
    base_hash = state_hash(model)
    adapter = CASES[name].attach(model, 0)
    attached_hash = state_hash(model)

    def interrupt(step: int, loss: float) -> None:
        if step == min(1, last):
            raise Interrupted

    if name not in STILL:  # which takes no step that could be stopped
        with pytest.raises(Interrupted):
            adapter.adapt(tiny_task(model, clip_id="another clip"), interrupt)
        assert state_hash(model) != attached_hash
    adapter.restore()
    assert state_hash(model) == attached_hash
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_as_on_a_new_network(name, dtype, *adapt(adapter, model))
    adapter.detach()
    assert state_hash(model) == base_hash


@each_method
@each_dtype
def test_a_placebo_is_a_random_change_of_equal_norm(name, dtype):
    model = network(dtype)
    base_output = output(model)
    adapter = CASES[name].attach(model, 0)
    attached_hash, states = state_hash(model), []
    for seed in (1, 1, 2):
        _, adapted = adapt(adapter, model)
        change = adapter.change()
        adapter.randomize(torch.Generator().manual_seed(seed))
        assert adapter.change().master == pytest.approx(change.master, rel=1e-5)
        assert torch.equal(output(model), base_output) == (name in STILL)
        states.append(adapter.state())
        assert all(torch.equal(states[-1][key], adapted[key]) == (key == "edges") for key in adapted)
        adapter.restore()
        assert state_hash(model) == attached_hash
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(torch.equal(states[0][key], states[2][key]) == (key == "edges") for key in states[0])
    assert_as_on_a_new_network(name, dtype, *adapt(adapter, model))


@each_dtype
def test_methods_attached_one_after_the_other_do_not_meet(dtype):
    model = network(dtype)
    base_hash = state_hash(model)
    # Every second method, then the others: neighbours are of different kinds.
    for name in [*list(CASES)[1::2], *list(CASES)[::2]]:
        adapter = CASES[name].attach(model, 0)
        assert_as_on_a_new_network(name, dtype, *adapt(adapter, model))
        adapter.detach()
        assert state_hash(model) == base_hash


@each_method
def test_settings_are_frozen_and_found_by_their_kind(name):
    method = CASES[name]
    assert METHODS[method.kind] is type(method)
    assert method.check(FIXED_DRAWS) is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.kind = "other"  # type: ignore[misc,assignment]


def test_every_kind_is_tested():
    assert {method.kind for method in CASES.values()} == set(METHODS)
