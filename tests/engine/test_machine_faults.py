"""Failures of the machine: memory, GPU, file system, damaged results. They cost a retry or a new process, not a clip."""

import errno
import os
import re
import shutil

import pytest
import torch
from vidtta.engine import clip as clip_module
from vidtta.engine import records
from vidtta.engine import run as run_module
from vidtta.engine.cluster import attempts, machine
from vidtta.engine.models.stdit3 import Layer

from .tiny_run import FULL, one_sentence, tiny_lab

LOST = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = {"full": FULL}
        yield lab


@pytest.fixture(scope="module")
def undisturbed(lab):
    assert lab.run("undisturbed") == 0
    return lab.results("undisturbed")


def failing(monkeypatch, error, times, arm_adapts=True, clip="ball"):
    """Let a clip raise so many times after it was adapted to; the list of calls for it, each with whether layers were checkpointed."""
    calls, finish = [], clip_module.finish

    def fails(experiment, known, adapter, *rest):
        if known.clip_id == clip and bool(adapter.steps) == arm_adapts:
            calls.append(experiment.dit.recompute)
            if len(calls) <= times:
                raise error
        return finish(experiment, known, adapter, *rest)

    monkeypatch.setattr(clip_module, "finish", fails)
    return calls


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def overlap(request, undisturbed, monkeypatch):
    """Both ways of going from clip to clip, the second as on a GPU; the name of the way, for folders."""
    monkeypatch.setattr(run_module, "pays", lambda device: request.param)
    return ["in turn", "overlapped"][request.param]


def without_retries(results):
    return {name: {key: value for key, value in result.items() if key != "retries"} for name, result in results.items()}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_tried_once_more_with_checkpointing(lab, undisturbed, monkeypatch, error):
    output = f"memory {type(error).__name__}"
    calls = failing(monkeypatch, error, 1)
    assert lab.run(output) == 0
    assert calls == [False, True]
    results = lab.results(output)
    assert results["full/ball"]["retries"] == [attempts.MEMORY]
    assert all(result["retries"] == [] for name, result in results.items() if name != "full/ball")
    assert without_retries(results) == without_retries(undisturbed)  # the same bits, and the next clip's too


def test_out_of_memory_twice_is_the_clips_failure_alone(lab, undisturbed, monkeypatch):
    calls = failing(monkeypatch, torch.OutOfMemoryError("no"), 9)
    assert lab.run("memory twice") == 1
    assert calls == [False, True]
    assert lab.results("memory twice") == {n: r for n, r in undisturbed.items() if n != "full/ball"}


def test_checkpointing_recomputes_each_layer_and_leaves_no_trace(lab, monkeypatch):
    """Twice the forward passes with gradients; afterwards the class's own forward is in force again."""
    counts = []
    forward = Layer.forward

    def counted(self, *inputs):
        if torch.is_grad_enabled():
            counts[-1] += 1
        return forward(self, *inputs)

    monkeypatch.setattr(Layer, "forward", counted)
    monkeypatch.setattr(attempts, "TIMES", {**attempts.TIMES})
    counts.append(0)
    failing(monkeypatch, torch.OutOfMemoryError("no"), 1, clip="ball")
    assert lab.run("counted", "data.limit=1") == 0
    retried = counts[0]
    monkeypatch.undo()
    monkeypatch.setattr(Layer, "forward", counted)
    monkeypatch.setenv("TORCH_HOME", "/nowhere/hub")
    counts.append(0)
    assert lab.run("counted alone", "data.limit=1") == 0
    assert retried > 2 * counts[1]


@pytest.mark.parametrize("error", [RuntimeError(LOST), torch.AcceleratorError("lost")], ids=["text", "type"])
def test_a_gpu_error_ends_the_process_and_the_next_one_goes_on(lab, undisturbed, monkeypatch, capsys, overlap, error):
    output = f"gpu {type(error).__name__} {overlap}"
    failing(monkeypatch, error, 1)
    assert lab.run(output) == 76
    assert one_sentence(capsys).startswith("error: GPU error (")
    assert sorted(lab.results(output)) == ["baseline/ball", "baseline/wave"]
    reason = lab.read(output, "arms", "full", "clips", "ball", "failure.json")["reason"]
    assert reason.startswith("GPU error (")
    order = []
    make = run_module.run_clip
    monkeypatch.setattr(run_module, "run_clip", lambda *a, **k: (order.append(a[2].id), make(*a, **k))[1])
    assert lab.run(output) == 0
    assert order == ["wave", "ball"]  # what failed comes last, so that it holds up no other
    assert lab.results(output) == undisturbed


def test_a_file_system_that_is_gone_for_a_while_costs_the_clip_in_hand(lab, undisturbed, monkeypatch, overlap):
    monkeypatch.setattr(machine, "AGAIN", 0.05)
    root, away = lab.root / f"gone {overlap}", lab.root / "away"
    waits, sleep = [], machine.time.sleep

    def comes_back(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            shutil.rmtree(root, ignore_errors=True)  # what was written in its place meanwhile lies under it
            away.rename(root)
        sleep(seconds)

    write = records.write_video

    def disappears(path, *inputs):
        if not waits and "full" in path.parts:
            root.rename(away)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        write(path, *inputs)

    monkeypatch.setattr(records, "write_video", disappears)
    monkeypatch.setattr(machine.time, "sleep", comes_back)
    assert lab.run(root.name) == 0
    assert len(waits) >= 3
    results = lab.results(root.name)
    assert results["full/ball"]["retries"] == [attempts.STORAGE]
    assert without_retries(results) == without_retries(undisturbed)


def test_a_file_system_that_stays_away_ends_the_process(lab, monkeypatch, capsys, overlap):
    monkeypatch.setattr(machine, "AGAIN", 0.01)
    monkeypatch.setattr(machine, "PATIENCE", 0.05)
    root = lab.root / f"away for good {overlap}"

    def disappears(path, *inputs):
        if root.exists():
            root.rename(lab.root / f"elsewhere {overlap}")
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(records, "write_video", disappears)
    assert lab.run(root.name) == 76
    assert "the file system has been gone" in one_sentence(capsys)


def cut(text):
    return text[: len(text) // 2]


def one_digit(text):
    first = re.search(r'"mean": \d+\.(\d)', text)
    assert first
    return text[: first.start(1)] + str((int(first[1]) + 1) % 10) + text[first.end(1) :]


@pytest.mark.parametrize("damage", [cut, one_digit])
def test_a_damaged_result_is_kept_aside_and_made_again(lab, undisturbed, capsys, damage):
    assert lab.run("damaged") == 0
    folder = lab.root / "damaged/arms/full/clips/ball"
    damaged = damage((folder / "result.json").read_text())
    (folder / "result.json").write_text(damaged)
    before = set(folder.iterdir())
    assert lab.run("damaged") == 0
    (aside,) = set(folder.iterdir()) - before
    assert aside.read_text() == damaged
    assert one_sentence(capsys) == f"warning: a damaged result is kept as {aside} and made again"
    assert lab.results("damaged") == undisturbed


def test_a_clip_that_another_task_made_meanwhile_is_not_made_twice(lab, undisturbed, monkeypatch):
    def other_task_first(session, arm, clip, *inputs):
        made.append((arm, clip.id))
        if len(made) == 1:
            monkeypatch.setattr(run_module, "run_clip", make)
            assert lab.run("meanwhile") == 0
        return make(session, arm, clip, *inputs)

    made, make = [], run_module.run_clip
    monkeypatch.setattr(run_module, "run_clip", other_task_first)
    assert lab.run("meanwhile") == 0
    assert made == [("baseline", "ball")]
    assert lab.results("meanwhile") == undisturbed


def test_out_of_memory_is_no_gpu_failure():
    for text in ("CUDA out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory"):
        assert machine.out_of_memory(RuntimeError(text)) and not machine.gpu_failed(RuntimeError(text))
    assert machine.gpu_failed(RuntimeError(LOST)) and not machine.out_of_memory(RuntimeError(LOST))
    assert not machine.gpu_failed(ValueError(LOST))
