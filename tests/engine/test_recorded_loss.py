"""Recorded steps and features: the bits of launched ones, for every clip that a record serves."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from vidtta.engine import recorded
from vidtta.engine.adaptation import AdaptationSettings
from vidtta.engine.clip import Known, continue_clip, encode_known
from vidtta.engine.methods import Delta, DeltaClosedForm, FullFineTuning, LoRA, NoAdaptation
from vidtta.engine.models import paths
from vidtta.engine.models.paths import Paths, PathsByWork, use_paths
from vidtta.engine.models.stdit3 import Caption
from vidtta.engine.recorded import Records
from vidtta.engine.sampler import SamplerSettings

from . import tiny


class StandIn:
    """What `Recorded` promises, without a card: one computation on inputs and results of its own. Recording runs it here, for the
    results to exist; on a card it runs nothing."""

    made: list["StandIn"]

    def __init__(self, compute, inputs, *, warm_ups, pool=None):
        assert warm_ups == 0
        self.compute, self.inputs, self.pool = compute, [recorded._room(tensor) for tensor in inputs], object()
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given.detach())
        self.given_pool = pool
        found = compute(*self.inputs)
        self.single = isinstance(found, torch.Tensor)
        self.result = [None if one is None else one.detach().clone() for one in ([found] if self.single else found)]
        self.made.append(self)

    def __call__(self, *inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        found = self.compute(*self.inputs)
        for mine, one in zip(self.result, [found] if self.single else found, strict=True):
            if mine is not None:
                mine.copy_(one.detach())
        return self.result[0] if self.single else self.result


RECORDING = ("clip", "methods.full", "methods.lora", "methods.delta")
"""Modules that ask whether to record."""


def launch(monkeypatch):
    for module in RECORDING:
        monkeypatch.setattr(f"vidtta.engine.{module}.records", lambda model, work: False)


@pytest.fixture(
    params=[
        pytest.param("cpu", id="stand-in for a record, CPU"),
        pytest.param(
            "cuda",
            id="CUDA graph",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="recording needs a GPU"),
        ),
    ]
)
def device(request, monkeypatch):
    if request.param == "cpu":
        StandIn.made = []
        monkeypatch.setattr(recorded, "Recorded", StandIn)
        for module in RECORDING:
            monkeypatch.setattr(f"vidtta.engine.{module}.records", lambda model, work: True)
    return torch.device(request.param)


CLIPS = {"a": 5, "b": 5, "c": 3}
"""Clips and the tokens of their captions."""
ORDER = ("a", "b", "c", "a", "b")
FIXED = AdaptationSettings(draws=3, timesteps="sampler")
METHODS = {
    "full": (FullFineTuning(steps=4, lr=1e-3), AdaptationSettings()),
    "lora": (LoRA(steps=4, lr=1e-2, rank=2), AdaptationSettings()),
    "lora on captions": (LoRA(steps=4, lr=1e-2, rank=2, targets=("cross_attn.kv_linear",)), AdaptationSettings()),
    "lora, cached prefix": (LoRA(steps=5, lr=1e-2, rank=2, last_layers=2, cache_prefix=True), FIXED),
    "delta": (Delta(steps=4, lr=1e-2), FIXED),
    "closed form": (DeltaClosedForm(), FIXED),
}


def task(model, name, settings, masked):
    length = CLIPS[name]
    mask = torch.ones(1, length, dtype=torch.bool, device=model.device) if masked else None
    seed = sorted(CLIPS).index(name)
    one = tiny.tiny_task(
        model, settings, latents=tiny.tiny_latents(model.dtype, seed).to(model.device), clip_id=name, sampling_steps=6
    )
    one.prompt = Caption(tiny.noise(seed, 1, length, 16).to(model.device), mask)
    return one


def adapt(model, adapter, name, settings, masked):
    trace = adapter.adapt(task(model, name, settings, masked), lambda step, loss: None)
    state = {key: value.clone() for key, value in adapter.state().items()}
    adapter.restore()
    return trace.losses, trace.gradient_norms, state


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "mask"])
@pytest.mark.parametrize("kind", METHODS)
def test_a_record_serves_every_clip_with_the_bits_of_launched_steps(device, kind, masked, monkeypatch):
    """Latents, captions of two lengths and draws differ from clip to clip: a record that read any of the first clip's would
    be seen. On a card the records of a run replay the first step of a later clip, which the first clip launched."""
    method, settings = METHODS[kind]
    if device.type == "cuda":
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        torch.use_deterministic_algorithms(True)
    model = tiny.tiny_dit().to(device)
    use_paths(model, Paths(recorded=True, methods="plain") if device.type == "cuda" else None)
    adapter = method.attach(model, 0)
    found = [adapt(model, adapter, name, settings, masked) for name in ORDER]
    held = adapter.recorded.records if kind.startswith(("full", "lora")) else adapter.recorded
    assert len(held.held) == (1 if kind == "full" else 2)  # two lengths of captions
    adapter.detach()
    launch(monkeypatch)
    for name, (losses, norms, state) in zip(ORDER, found, strict=True):
        adapter = method.attach(model, 0)
        launched = adapt(model, adapter, name, settings, masked)
        adapter.detach()
        assert (losses, norms) == launched[:2]
        assert all(torch.equal(value, launched[2][key]) for key, value in state.items())
    assert len({tuple(losses) for losses, _, _ in found}) == len(CLIPS)


@pytest.mark.parametrize("branches", ["all", "conditional"])
@pytest.mark.parametrize("kind", ["none", "lora", "delta"])
def test_a_record_samples_every_clip_with_the_bits_of_launched_steps(device, kind, branches, monkeypatch):
    """Under the weights adapted to each clip, with guidance of three branches (of which two may run on the base weights) and of one."""
    method, settings = METHODS[kind] if kind in METHODS else (NoAdaptation(), FIXED)
    if device.type == "cuda":
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        torch.use_deterministic_algorithms(True)
    experiment = tiny.tiny_experiment(adaptation=replace(settings, adapted_branches=branches))
    model = experiment.dit.to(device)
    vae = deepcopy(experiment.vae).to(device)
    experiment = replace(experiment, vae=vae, sampler=SamplerSettings(steps=6, force_steps=1))
    use_paths(model, Paths(methods="plain") if device.type == "cuda" else None)

    def continue_(adapter, name):
        seed, length = sorted(CLIPS).index(name), CLIPS[name]
        latents = encode_known(vae, tiny.tiny_pixels(3 * seed).to(device), experiment.window)
        known = Known(name, latents, Caption(tiny.noise(seed, 1, length, 16).to(device)))
        return continue_clip(experiment, known, adapter).latents

    adapter = method.attach(model, 0)
    found = [continue_(adapter, name) for name in ORDER]
    # Two lengths of captions, batches of one and of three branches, or of one and of two; the last clips replay all of them.
    assert len(adapter.sampling.held) == 4
    adapter.detach()
    assert adapter.sampling is None
    launch(monkeypatch)
    for name, latents in zip(ORDER, found, strict=True):
        adapter = method.attach(model, 0)
        assert torch.equal(latents, continue_(adapter, name)), name
        adapter.detach()
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])


def test_what_was_compiled_for_launched_calls_serves_records(device):
    """A record that compiled anew would do so while it records, where a card allows little."""
    counter = CompileCounterWithBackend("eager")
    model = tiny.tiny_dit().to(device)
    use_paths(model, Paths(compiled=True, compiler=counter, methods="plain"))
    adapter = Delta(steps=1).attach(model, 0)
    one = task(model, "a", FIXED, False)
    draws, graphs = [one.draw(k) for k in range(3)], []
    for count in (1, 3):
        adapter._cache(one, draws[:count])
        graphs.append(counter.frame_count)
    adapter.detach()
    use_paths(model, None)
    assert graphs[0] > 0 and graphs == [graphs[0]] * 2


@pytest.mark.parametrize("kind", METHODS)
def test_a_detached_method_keeps_no_record(device, kind):
    """Its memory is the next arm's: it may not wait for Python's collector, which knows nothing of a card's memory."""
    method, settings = METHODS[kind]
    model = tiny.tiny_dit().to(device)
    use_paths(model, Paths(methods="plain") if device.type == "cuda" else None)
    adapter = method.attach(model, 0)
    adapt(model, adapter, "a", settings, False)
    adapt(model, adapter, "a", settings, False)
    held = adapter.recorded.records if kind.startswith(("full", "lora")) else adapter.recorded
    record = weakref.ref(next(iter(held.held.values())))
    del held
    gc.disable()
    try:
        adapter.detach()
        if device.type == "cpu":
            StandIn.made.clear()
        assert record() is None
    finally:
        gc.enable()


def test_the_first_call_at_a_shape_runs_the_second_is_recorded_the_rest_replayed(device):
    calls = []

    def compute(x):
        calls.append(x)
        return [x * 2]

    records = Records(compute, limit=4)
    for k in range(4):
        (twice,) = records(torch.full((3,), float(k), device=device))
        assert twice.tolist() == [2.0 * k] * 3
    assert len(records.held) == 1
    assert calls[0] is not calls[1]
    if device.type == "cuda":
        assert len(calls) == 2
    records(torch.ones(4, device=device))
    assert len(records.held) == 1, "another shape's first call runs as it is"


def test_the_record_used_longest_ago_goes_and_its_memory_is_used_again(device):
    records = Records(lambda x: [x + 1], limit=2)
    for length in (1, 2, 1, 3, 1):
        for _ in range(2):
            assert records(torch.zeros(length, device=device))[0].tolist() == [1.0] * length
    assert [key[0][0][0] for key in records.held] == [3, 1]
    if device.type == "cpu":
        assert [one.given_pool for one in StandIn.made[1:]] == [one.pool for one in StandIn.made[:-1]]


def test_another_shape_of_latents_is_refused(device):
    model = tiny.tiny_dit().to(device)
    one = task(model, "a", FIXED, False)
    with pytest.raises(ValueError, match=r"latents must be \[1, 16, 7, 4, 6\] as the task's, were \[1, 16, 7, 4, 4\]"):
        one.of(one.latents[..., :4])


def test_what_is_recorded_follows_the_path_of_each_work(monkeypatch):
    """Plain steps stay as they are, and nothing is recorded where activations are computed again."""
    model = tiny.tiny_dit()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    by_work = PathsByWork(training=None, features=Paths(), sampling=None, features_tokens=9, methods="plain")
    for way, wanted in ((None, (False, False)), (Paths(), (True, True)), (by_work, (False, True))):
        model.paths = way
        assert (paths.records(model, "training"), paths.records(model, "features")) == wanted
    model.paths = Paths(compiled=True, compiler="eager")
    assert paths.records(model, "training") and paths.records(model, "sampling")
    model.paths = replace(Paths(), recorded=False)
    assert not paths.records(model, "training")
    model.paths, model.recompute = Paths(), True
    assert not paths.records(model, "training")
