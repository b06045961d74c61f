"""Recorded computations. What a graph does needs a card; the order of what is asked of CUDA is seen with stand-ins on a CPU."""

import gc
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vidtta.engine import memory
from vidtta.engine.demo.training import Cards, Plan, Trainer
from vidtta.engine.recorded import Recorded

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are recorded on a CUDA card")


@pytest.fixture
def events(monkeypatch):
    """Stand-ins for CUDA's streams and graphs, which note what they are asked."""
    seen = []

    def stream(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: seen.append(f"{name} waits for {other.name}"))

    @contextmanager
    def inside(name):
        seen.append(f"enter {name}")
        yield
        seen.append(f"leave {name}")

    main = stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream("beside"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda beside: inside(beside.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: seen.append("replay")))
    for name in ("max_memory_allocated", "memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: inside(f"graph {options['pool']}"))
    return seen


def test_it_warms_up_beside_the_stream_and_records_once(events):
    Recorded(lambda x: events.append("compute") or x, (torch.ones(2),), warm_ups=2, pool="memory")
    warm_up = ["beside waits for main", "enter beside", "compute", "compute", "leave beside"]
    assert events == [*warm_up, "main waits for beside", "enter graph memory", "compute", "leave graph memory"]


@pytest.mark.parametrize("fails", [False, True], ids=["recorded", "failing"])
def test_no_garbage_is_collected_while_a_graph_is_recorded(events, fails):
    """A dead graph among it would be destroyed, which CUDA does not permit then: the record would fail now and then."""
    enabled = []

    def compute(x):
        enabled.append(gc.isenabled())
        if fails and len(enabled) == 2:
            raise RuntimeError("cannot be recorded")
        return x

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="cannot be recorded") if fails else nullcontext():
        Recorded(compute, (torch.ones(2),), warm_ups=1)
    assert enabled == [True, False] and gc.isenabled()


def test_inputs_are_copied_to_where_the_record_reads_them(events):
    """A graph reads addresses: its inputs must be its own, and filled before each replay."""
    read = []
    given = torch.arange(3.0, requires_grad=True)
    record = Recorded(lambda x: read.append(x) or x + 1, (given,), warm_ups=1)
    assert all(x is record.inputs[0] for x in read)
    assert record.inputs[0].data_ptr() != given.data_ptr() and not record.inputs[0].requires_grad
    at = record.inputs[0].data_ptr()
    record.graph.replay = lambda: events.append(record.inputs[0].tolist())
    assert record(torch.tensor([5.0, 6.0, 7.0])) is record.result
    assert events[-1] == [5.0, 6.0, 7.0] and record.inputs[0].data_ptr() == at
    with pytest.raises(ValueError, match="1 inputs were recorded, 0 given"):
        record()


def test_inputs_that_lie_there_already_are_not_copied_again(events, monkeypatch):
    copies = []
    whole = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr("torch._foreach_copy_", lambda to, given: copies.append(len(to)) or whole(to, given))
    clip, noise = torch.ones(2), torch.ones(3)
    record = Recorded(lambda clip, noise: clip.sum() + noise.sum(), (clip, noise), warm_ups=0)
    record(clip, torch.zeros(3))
    record(clip, noise)
    clip += 1  # another clip in the same storage
    record(clip, noise)
    record(clip, noise)
    assert copies == [2, 1, 1, 1]
    assert record.inputs[0].tolist() == [2, 2] and record.inputs[1].tolist() == [1, 1, 1]


def test_what_a_replay_works_in_counts_to_the_peak(events, monkeypatch):
    """The allocator holds it free, so that without this a clip of replayed steps would seem to need next to nothing."""
    in_use, peaks = iter([10, 30]), iter([25, 90, 31])  # after recording, at a replay; before recording, of it, since
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(in_use))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: next(peaks))
    monkeypatch.setattr(memory, "_noted", 0)
    record = Recorded(lambda x: x + 1, (torch.ones(2),), warm_ups=0)
    assert record.working == 80
    record(torch.zeros(2))
    assert memory.peak_memory(torch.device("cuda")) == 110
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    memory.reset_peak_memory(torch.device("cuda"))
    assert memory._noted == 0


def test_inputs_keep_their_strides(events):
    """Code that was compiled for what was launched is not compiled anew for what is recorded."""
    sparse, expanded = torch.arange(12.0).view(3, 2, 2)[:, 1], torch.ones(1, 2).expand(3, 2)
    record = Recorded(lambda a, b: a + b, (sparse, expanded), warm_ups=0)
    assert [mine.stride() for mine in record.inputs] == [(4, 1), (2, 1)]
    assert record.inputs[0].storage_offset() == sparse.storage_offset() == 2
    assert torch.equal(record.inputs[0], sparse) and torch.equal(record.inputs[1], expanded)


@needs_card
def test_a_replay_computes_what_the_computation_does():
    weight = nn.Parameter(torch.linspace(-1, 1, 12, device="cuda").reshape(3, 4))
    weight.grad = torch.zeros_like(weight)

    def compute(x):
        loss = (x @ weight).square().mean()
        loss.backward()
        return loss.detach().clone()

    batches = [torch.randn(5, 3, device="cuda") for _ in range(4)]
    record = Recorded(compute, (batches[0],), warm_ups=3)
    for batch in batches[1:]:
        weight.grad.zero_()
        loss, gradient = record(batch).clone(), weight.grad.clone()
        weight.grad.zero_()
        torch.testing.assert_close(loss, compute(batch))
        torch.testing.assert_close(gradient, weight.grad)
        weight.data += 0.1  # a step in place: the record reads the moved weights


@needs_card
def test_recorded_training_steps_are_the_plain_ones():
    """The same weights as without recording, and losses that later steps leave as they were."""
    start = torch.linspace(-1, 1, 12).reshape(3, 4)
    batches = [torch.randn(5, 3, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    weights, losses = [], []
    for device in ("cuda", "cpu"):
        cards = Cards(0, 1, torch.device(device))
        weight = nn.Parameter(start.clone().to(device))
        trainer = Trainer([weight], Plan(6, 5, 0.05, warmup=1), cards)

        def loss(x, weight=weight):
            return ((x[:, :, None] * weight).sum(1).square().mean(),)

        found = []
        for batch in batches:
            found.append(trainer.backward("batch", loss, batch.to(device)))
            trainer.step()
        weights.append(weight.detach().cpu())
        losses.append(torch.cat(found).cpu())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-3)
