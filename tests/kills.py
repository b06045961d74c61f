"""Kill runs at random moments and go on: nothing may be lost, made twice, or differ in a bit from an undisturbed run.

Run: python -m tests.kills --kills 200 --seed 0 --log tests/logs/kills-200.txt
Exits 1 if anything was. The runs are those of tests/engine/tiny_run.py, on the CPU; every kill is a SIGKILL.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidtta.engine import clip, files, result, session
from vidtta.engine import run as run_module
from vidtta.engine.data import video
from vidtta.engine.files import ABANDONED_AFTER, TEMPORARY

from .engine.tiny_run import CLIPS, FORKS, FULL, Lab, run_in_child, tiny_lab

SHARED = ("captions", "latents", "references", "comparisons")  # folders whose files are named by content or clip
TOLD = (
    (run_module, "preflight"),
    (run_module, "state_hash"),
    (run_module, "write_comparisons"),
    (session.Session, "captions"),
    (session.Session, "unfinished"),
    (session.Session, "attach"),
    (session.Session, "write_references"),
)
LOADING, ENDED = b"loading", b"ended"
COMPARED = ("latents.safetensors", "adapter.safetensors", "video.mp4")


@dataclass
class Report:
    """What became of the runs. places: what a run was doing when it was killed; left: temporary files of killed runs."""

    each: str = f"{len(CLIPS)} clips in 2 arms"
    """What a run directory holds."""
    kills: int = 0
    undisturbed: int = 0
    outputs: list[str] = field(default_factory=list)
    results: int = 0
    lost: int = 0
    doubled: int = 0
    differing_bits: int = 0
    left: int = 0
    left_after: int = 0
    seconds: float = 0.0
    places: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return not (self.lost or self.doubled or self.differing_bits or self.left_after)

    def lines(self) -> list[str]:
        return [
            f"kills {self.kills}; runs that ended before theirs {self.undisturbed}",
            f"run directories {len(self.outputs)}, each of {self.each}; results {self.results}",
            f"lost {self.lost}",
            f"doubled {self.doubled}",
            f"differing bits {self.differing_bits}",
            f"temporary files left by kills {self.left}, after the next run {self.left_after}",
            f"seconds {self.seconds:.0f}",
            "killed in: " + ", ".join(f"{place} {count}" for place, count in self.places.most_common()),
        ]


def kill_runs(lab: Lab, kills: int, seed: int, overlap: bool = False) -> Report:
    """Kill `kills` runs of the lab's recipe, each on what the killed ones before it left; a finished folder is followed by a new one.

    The moment of a kill is uniform over the time that a whole run takes after its models are loaded. overlap: as on a GPU.
    """
    report, chance, begun = Report(outputs=["killed 0"]), random.Random(seed), time.monotonic()
    whole = _time_of(lab, overlap)
    finished: dict[Path, tuple[int, int]] = {}
    while report.kills < kills:
        child, place = _start(lab, report.outputs[-1], overlap)
        child.join(chance.uniform(0, whole))
        if child.exitcode is None and place.value != ENDED:
            child.kill()
            child.join()
            report.kills += 1
            report.places[place.value.decode()] += 1
        else:
            child.join()
            assert child.exitcode == 0
            report.undisturbed += 1
            report.outputs.append(f"killed {len(report.outputs)}")
        child.close()
        for path in lab.root.glob("killed */arms/*/clips/*/result.json"):
            finished.setdefault(path, identity(path))
    report.left = len(temporaries(lab))
    for path in temporaries(lab):
        os.utime(path, (time.time() - 2 * ABANDONED_AFTER,) * 2)
    for output in report.outputs:
        assert lab.run(output) == 0
        compare(lab, output, report)
    report.doubled += sum(path.exists() and identity(path) != before for path, before in finished.items())
    report.left_after = len(temporaries(lab))
    report.seconds = time.monotonic() - begun
    return report


def compare(lab: Lab, output: str, report: Report) -> None:
    """Count what a finished run directory lacks, has twice, or has otherwise than the undisturbed one."""
    expected, found = lab.results("undisturbed"), lab.results(output)
    report.results += len(found)
    report.lost += len(expected.keys() - found.keys())
    rows = Counter(tuple(line.split(",")[:2]) for line in (lab.root / output / "summary.csv").read_text().splitlines())
    report.doubled += sum(count - 1 for count in rows.values()) + len(found.keys() - expected.keys())
    for name in expected.keys() & found.keys():
        report.differing_bits += _bits(*(json.dumps(r[name], sort_keys=True).encode() for r in (expected, found)))
        arm, clip_id = name.split("/")
        for file in COMPARED:
            ours, theirs = (lab.root / o / "arms" / arm / "clips" / clip_id / file for o in (output, "undisturbed"))
            if theirs.exists():
                report.differing_bits += _bits(ours.read_bytes(), theirs.read_bytes())


def _bits(a: bytes, b: bytes) -> int:
    return (int.from_bytes(a) ^ int.from_bytes(b)).bit_count() + 8 * abs(len(a) - len(b))


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def temporaries(lab: Lab) -> list[Path]:
    return [path for path in lab.root.glob("killed */**/.tmp-*") if TEMPORARY.fullmatch(path.name)]


def _time_of(lab: Lab, overlap: bool) -> float:
    """Seconds that a whole run takes once its models are loaded."""
    child, place = _start(lab, "undisturbed", overlap)
    begun = time.monotonic()
    while place.value != ENDED:
        time.sleep(0.002)
    seconds = time.monotonic() - begun
    child.join()
    assert child.exitcode == 0
    return seconds


def _start(lab: Lab, output: str, overlap: bool) -> tuple[Any, Any]:
    """A child that runs into `output` and has loaded its models, and the place in memory where it says what it does."""
    place = FORKS.RawArray("c", 64)
    place.value = LOADING
    child = FORKS.Process(target=run_and_tell, args=(lab.argv(output), place, os.devnull, overlap))
    child.start()
    while place.value == LOADING and child.is_alive():
        time.sleep(0.002)
    return child, place


def run_and_tell(argv: list[str], place: Any, log: str = os.devnull, overlap: bool = False) -> None:
    """What a child does: a run that writes into `place` what it is doing: a phase of a clip, or which file it writes."""

    @contextmanager
    def telling(what: str) -> Iterator[None]:
        before, place.value = place.value, what.encode()
        yield
        place.value = before

    def context(inner: Callable, name_of: Callable[..., str]) -> Callable:
        @contextmanager
        def wrapper(*inputs: Any) -> Iterator[Any]:
            with telling(name_of(*inputs)), inner(*inputs) as value:
                yield value

        return wrapper

    def function(inner: Callable, name: str) -> Callable:
        def wrapper(*inputs: Any) -> Any:
            with telling(name):
                return inner(*inputs)

        return wrapper

    def file_of(path: Path, flush: bool = True) -> str:
        return f"writing {path.parent.name if path.parent.name in SHARED else path.name}"

    def loaded(*inputs: Any) -> Any:
        found = load(*inputs)
        place.value = b"elsewhere"
        return found

    load, run_module.prepare = run_module.prepare, loaded
    if overlap:
        run_module.pays = lambda device: True
    for owner, name in TOLD:
        setattr(owner, name, function(getattr(owner, name), name.replace("_", " ")))
    for module in (clip, session, run_module, result):
        module.timed = context(module.timed, lambda seconds, name, device: name)
    for module in (files, video):
        module.atomic_path = context(module.atomic_path, file_of)
    try:
        run_in_child(argv, log)
    finally:
        place.value = ENDED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlap", action="store_true", help="finish a clip beside the next one, as on a GPU")
    parser.add_argument("--log", type=Path, help="write the report here, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tiny_lab(Path(folder)) as lab:
        lab.settings["arms"] = {"full": FULL}
        report = kill_runs(lab, arguments.kills, arguments.seed, arguments.overlap)
    command = f"python -m tests.kills --kills {arguments.kills} --seed {arguments.seed}"
    text = "\n".join([command + " --overlap" * arguments.overlap, *report.lines(), ""])
    print(text, end="")
    if arguments.log:
        files.write_text(arguments.log, text)
    return int(not report.ok)


if __name__ == "__main__":
    sys.exit(main())
