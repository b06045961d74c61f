"""A run that reads the next clip and finishes the last one beside the device's work makes the same as one that does not, and as safely.

Forced on, on the CPU. test_machine_faults.py, test_run_faults.py, test_run_kills.py and test_study.py run both ways, too.
"""

import json
import signal
import threading
import time
import weakref

import pytest
import torch
from vidtta.engine import cli
from vidtta.engine import result as result_module
from vidtta.engine import run as run_module
from vidtta.engine.metrics import optical_flow, score
from vidtta.engine.overlap import Overlap, pays

from .tiny_run import DELTA, FULL, make_clip, tiny_lab

ARMS = {"full": FULL, "delta": DELTA}
CLIPS = ("ball", "more", "wave")
DIAGNOSTICS = {"every": 1}
MAIN = threading.main_thread()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        make_clip(lab.root / "clips" / "more.mp4", seed=20)
        lab.settings["arms"] = ARMS
        lab.settings["scores"] |= {"flow": "farneback"}
        lab.settings["diagnostics"] = DIAGNOSTICS
        yield lab


@pytest.fixture(scope="module")
def alone(lab):
    """A run without overlap."""
    assert lab.run("alone") == 0
    return lab.results("alone")


@pytest.fixture
def overlapped(alone, monkeypatch):
    monkeypatch.setattr(run_module, "pays", lambda device: True)


def around(monkeypatch, module, name, before=lambda *inputs: None, after=lambda *inputs: None):
    """Call before(*inputs) and after(*inputs) where a function is called."""
    inner = getattr(module, name)

    def wrapper(*inputs, **options):
        before(*inputs)
        found = inner(*inputs, **options)
        after(*inputs)
        return found

    monkeypatch.setattr(module, name, wrapper)


def failures(lab, output):
    folder = lab.root / output / "arms"
    return {f"{p.parts[-4]}/{p.parts[-2]}": json.loads(p.read_text()) for p in folder.rglob("failure.json")}


def costs(lab, output):
    found = {
        path.parts[-4:-1]: json.loads(path.read_text())["cost"] for path in (lab.root / output).rglob("result.json")
    }
    return [found[name] for name in sorted(found)]


def test_on_a_gpu_alone():
    assert pays(torch.device("cuda", 1)) and not pays(torch.device("cpu"))


@pytest.fixture(scope="module")
def watched(lab, alone):
    """An overlapped run: which threads read, made and wrote clips, and how many clips' pixels were alive at each handing over."""
    threads, made, alive = {"load": set(), "run_clip": set(), "write_kept": set()}, [], []
    continue_clip, hand_over = run_module.continue_clip, Overlap.hand_over

    def continued(*inputs, **options):
        outcome = continue_clip(*inputs, **options)
        made.append(weakref.ref(outcome.pixels))
        return outcome

    def handed_over(self, settle):
        alive.append(sum(one() is not None for one in made))
        hand_over(self, settle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "pays", lambda device: True)
        patch.setattr(run_module, "continue_clip", continued)
        patch.setattr(Overlap, "hand_over", handed_over)
        for module, name in ((run_module, "load"), (run_module, "run_clip"), (result_module, "write_kept")):
            around(patch, module, name, lambda *inputs, name=name: threads[name].add(threading.current_thread()))
        assert lab.run("overlapped") == 0
    return threads, alive


def test_the_same_bits_and_files(lab, alone, watched):
    threads, _ = watched
    assert lab.results("overlapped") == alone
    assert threads["run_clip"] == {MAIN} and MAIN not in threads["write_kept"] and threads["load"] != {MAIN}
    files = {path.relative_to(lab.root / "alone") for path in (lab.root / "alone").rglob("*") if path.is_file()}
    assert files == {
        p.relative_to(lab.root / "overlapped") for p in (lab.root / "overlapped").rglob("*") if p.is_file()
    }
    for path in files:
        if (path.parts[0] == "arms" and path.name != "result.json") or {"references", "truth"} & {*path.parts}:
            assert (lab.root / "overlapped" / path).read_bytes() == (lab.root / "alone" / path).read_bytes(), path


def test_a_result_says_what_was_overlapped(lab, alone, watched):
    assert not any("overlapped" in cost for cost in costs(lab, "alone"))
    found = costs(lab, "overlapped")
    assert len(found) == 9
    for cost, before in zip(found, costs(lab, "alone"), strict=True):
        assert list(cost["overlapped"]) == ["read", "score", "write"] and min(cost["overlapped"].values()) > 0
        assert cost["seconds"].keys() == before["seconds"].keys()


def test_seconds_add_up_to_the_runs(lab, overlapped, monkeypatch):
    """Writing takes a second longer than the device's work: each clip but the first waits for the one before it, and says so."""
    made = {clip: threading.Event() for clip in CLIPS}

    def write(session, arm, clip, found):
        assert all(made[later].wait(60) for later in CLIPS[CLIPS.index(clip.id) + 1 :][:1])
        time.sleep(1)

    around(monkeypatch, run_module, "continue_clip", after=lambda experiment, known, *rest: made[known.clip_id].set())
    around(monkeypatch, result_module, "write_kept", write)
    begun = time.monotonic()
    assert lab.run("slow", arms={"baseline": {"kind": "none"}}, adaptation=None, diagnostics=None) == 0
    whole = time.monotonic() - begun
    results = [lab.result("slow", "baseline", clip)["cost"] for clip in CLIPS]
    assert all(cost["overlapped"]["write"] > 1 for cost in results)
    waited = [cost["seconds"]["score"] for cost in results]
    assert waited[1] > waited[0] and sum(waited[1:]) > 1
    assert sum(sum(cost["seconds"].values()) for cost in results) < whole


def test_the_last_clip_is_finished_while_the_next_one_is_adapted_to(lab, alone, overlapped, monkeypatch):
    """Writing a clip waits until the next one's device work is done; no more than these two are ever unfinished."""
    done = {(arm, clip): threading.Event() for arm in ("baseline", *ARMS) for clip in CLIPS}
    unfinished, most, waited = [], [], []

    def begun(session, arm, clip, *rest):
        unfinished.append((arm, clip.id))
        most.append(len(unfinished))
        done[arm, clip.id].set()

    def write(session, arm, clip, found):
        later = CLIPS[CLIPS.index(clip.id) + 1 :]
        waited.append(not later or done[arm, later[0]].wait(60))
        unfinished.remove((arm, clip.id))

    around(monkeypatch, run_module, "run_clip", after=begun)
    around(monkeypatch, result_module, "write_kept", write)
    assert lab.run("beside", scores={"lpips": "allow_missing"}) == 0
    assert waited == [True] * 9
    assert most == [1, 2, 2] * 3


def test_what_waits_holds_no_pixels(watched):
    """Of the device's memory nothing is kept for the thread: the next clip's peak is as if it were alone."""
    assert watched[1] == [0] * 9


def test_the_real_flow_is_computed_once_a_clip_and_arm(lab, overlapped, monkeypatch):
    videos = []
    around(monkeypatch, optical_flow, "farneback_of", lambda grey, processors: videos.append(grey))
    assert lab.run("flows", "data.limit=1") == 0
    assert len(videos) == 4 + 2 + 2  # the real one and the arm's; in the first arm two references', too


def test_a_failing_score_is_that_clips_failure_and_the_next_is_unharmed(lab, alone, overlapped, monkeypatch):
    calls, inner = [], score._flow_error

    def fails(*flows):
        calls.append(threading.current_thread())
        if len(calls) == 3 * 3 + 1:  # after three clips with their references: the second arm's first
            raise RuntimeError("boom")
        return inner(*flows)

    monkeypatch.setattr(score, "_flow_error", fails)
    assert lab.run("failing") == 1
    assert MAIN not in calls
    (failure,) = failures(lab, "failing").items()
    assert failure[0] == "full/ball" and failure[1]["reason"] == "RuntimeError: boom"
    assert "in fails" in failure[1]["traceback"]
    assert lab.results("failing") == {name: found for name, found in alone.items() if name != "full/ball"}
    assert lab.run("failing") == 0
    assert lab.results("failing") == alone


def test_a_clip_that_cannot_be_read_ahead_fails_alone(lab, alone, overlapped, monkeypatch):
    def fails(session, clip):
        if clip.id == "more":
            raise RuntimeError("unreadable")

    around(monkeypatch, run_module, "load", fails)
    assert lab.run("unreadable") == 1
    assert sorted(failures(lab, "unreadable")) == ["baseline/more", "delta/more", "full/more"]
    assert lab.results("unreadable") == {name: found for name, found in alone.items() if "more" not in name}


@pytest.mark.parametrize("stopped_by", ["SIGTERM", "GPU"])
def test_what_stops_a_run_keeps_the_clip_that_is_being_finished(
    lab, alone, overlapped, monkeypatch, capsys, stopped_by
):
    output, begun, stopped = f"stopped by {stopped_by}", [], threading.Event()

    def begins(experiment, known, *rest):
        begun.append(known.clip_id)
        if len(begun) == 2:
            stopped.set()
            if stopped_by == "GPU":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            signal.raise_signal(signal.SIGTERM)

    def write(*inputs):
        assert stopped.wait(60)
        time.sleep(0.2)  # the main thread is on its way out

    around(monkeypatch, run_module, "continue_clip", begins)
    around(monkeypatch, result_module, "write_kept", write)
    argv = [word for word in lab.argv(output) if word != "--quiet"]
    assert cli.main(argv) == {"SIGTERM": 130, "GPU": 76}[stopped_by]
    assert "baseline  ball  PSNR " in capsys.readouterr().out
    assert lab.results(output) == {"baseline/ball": alone["baseline/ball"]}
    assert begun == ["ball", "more"]
    monkeypatch.undo()
    assert lab.run(output) == 0
    assert lab.results(output) == alone


def test_clips_of_another_task_are_not_read_in_vain():
    """Those that another task has made are passed by quickly: what is not begun to be read by then is left."""
    read, release = [], threading.Event()
    with Overlap(True) as overlap:
        seen = []
        for item, loading in overlap.each(range(50), lambda item: (read.append(item), release.wait(60))):
            seen.append(item)
            if item == 40:
                release.set()
                loading.result()
    assert seen == list(range(50)) and read[:1] == [0] and 40 in read and len(read) < 15


def test_two_unfinished_clips_are_refused_and_the_last_is_settled_at_the_end():
    told = []
    with Overlap(True) as overlap:
        overlap.hand_over(lambda: told.append("first"))
        assert told == []
        with pytest.raises(AssertionError, match="two clips unfinished"):
            overlap.hand_over(lambda: told.append("second"))
    assert told == ["first"]
    with pytest.raises(KeyError), Overlap(True) as overlap:  # noqa: PT012
        overlap.hand_over(lambda: told.append("third") or 1 / 0)
        raise KeyError
    with pytest.raises(ZeroDivisionError), Overlap(True) as overlap:
        overlap.hand_over(lambda: told.append("fourth") or 1 / 0)
    with Overlap(False) as overlap:
        overlap.hand_over(lambda: told.append("at once"))
        assert told == ["first", "third", "fourth", "at once"]
