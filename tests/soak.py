"""A soak: very many clips in one process. Memory and open files must stay flat, and vidtta's own work on a clip small.

Run: python -m tests.soak --clips 1941 --log tests/logs/soak-1941.txt
Exits 1 where memory grew by more than 20 MiB within an arm after its first tenth, files stayed open, the own overhead of a clip
is over 0.3 s, or doing the finished run again takes over 5 s. Clips are made by code, 9 frames of 16 x 16; two arms, everything
kept: videos, latents, adapters.

Own overhead is the run's whole time less model and measuring work, for each clip of all its arms. Work is adapting,
sampling and decoding as the results say, and encoding, scoring and the references' scores as timed here. All the rest is
overhead: starting and loading, preflight, drawing or reading clips, hashes, checks, restoring weights, writing videos and files
and waiting for the disk, the videos side by side, the summary. Time is wall time, less what this thread was ready for and
had to leave to other processes (Linux's schedstat): a machine that others use counts as one that they do not.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from vidtta.engine import run as run_module
from vidtta.engine import session as session_module
from vidtta.engine.clip import Stopwatch
from vidtta.engine.files import write_text
from vidtta.engine.session import Session

from .engine.tiny_run import Lab, tiny_lab

TIMED = (
    (Session, "encode"),
    (Session, "begin_scores"),
    (session_module, "begin_reference_scores"),
    (session_module, "compute_complexity"),
)
"""Work whose time the results do not say, or say again in each arm."""
SETTINGS: dict[str, Any] = {
    "window": {"total_frames": 9, "known_frames": 5, "model_frames": 9},
    "adaptation": {"context_latents": 1, "draws": 2, "timesteps": "sampler"},
}
"""The shortest clips that can be adapted on: what is sought happens between them."""
TOLD = ("adapt", "sample", "decode")


def clock() -> float:
    """Seconds, in which waiting for a processor does not count; this thread's."""
    waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.monotonic() - waited


@dataclass
class Soak:
    """samples: (resident bytes, open files) before each result. seconds: of the run by `clock`; work: of these, the model's and the
    measures'; wall: of the run by the wall clock.
    """

    clips: int
    samples: list[tuple[int, int]]
    seconds: float
    work: float
    wall: float
    load: float
    """Mean load average of the machine meanwhile."""
    again: float
    """Seconds of the finished run, given again, with its models loaded anew but Python up."""

    @property
    def overhead(self) -> float:
        """Seconds a clip, of all its arms."""
        return (self.seconds - self.work) / self.clips

    @property
    def growth(self) -> int:
        """Bytes, the most of any arm: from the mean of the second tenth of its results to the mean of the last tenth.

        Arms run one after another, and what a method needs more than the one before it is no growth.
        """
        tenth = max(1, self.clips // 10)
        memory = [resident for resident, _ in self.samples]
        arms = [memory[k : k + self.clips] for k in range(0, len(memory), self.clips)]
        return max(round(fmean(arm[-tenth:]) - fmean(arm[tenth : 2 * tenth])) for arm in arms)

    @property
    def tenths(self) -> str:
        """Mean resident MiB of each tenth of all results."""
        tenth = max(1, len(self.samples) // 10)
        parts = [self.samples[k : k + tenth] for k in range(0, 10 * tenth, tenth)]
        return " ".join(f"{fmean(resident for resident, _ in part) / 2**20:.0f}" for part in parts if part)

    @property
    def files_left_open(self) -> int:
        return self.samples[-1][1] - self.samples[min(len(self.samples) - 1, len(self.samples) // 10)][1]

    @property
    def ok(self) -> bool:
        return self.growth <= 20 * 2**20 and self.files_left_open <= 0 and self.overhead <= 0.3 and self.again <= 5

    def lines(self) -> list[str]:
        return [
            f"clips {self.clips}, results {len(self.samples)}, seconds {self.seconds:.0f}, by the wall clock {self.wall:.0f}",
            f"memory growth within an arm {self.growth / 2**20:.1f} MiB; resident MiB in each tenth of the results {self.tenths}",
            f"files left open {self.files_left_open}",
            f"own overhead {self.overhead * 1000:.0f} ms a clip of {len(self.samples) // self.clips} results; work {self.work:.0f} s",
            f"the finished run again {self.again:.1f} s",
            f"load average meanwhile {self.load:.1f} on {os.cpu_count()} processors",
        ]


def soak(lab: Lab, clips: int) -> Soak:
    """Run so many clips in one process, then once more."""
    samples: list[tuple[int, int]] = []
    timed: list[float] = []
    loads: list[float] = []

    def sampled(*inputs: Any) -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        samples.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        loads.append(os.getloadavg()[0])
        return make(*inputs)

    def clocked(inner: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*inputs: Any) -> Any:
            begun = clock()
            found = inner(*inputs)
            timed.append(clock() - begun)
            return found

        return wrapper

    settings = SETTINGS | {"data": {"clips": "world:shifted/test", "limit": clips, "height": 16, "width": 16}}
    make = run_module.run_clip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "run_clip", sampled)
        patch.setattr(Stopwatch, "_now", lambda watch: clock())
        for owner, name in TIMED:
            patch.setattr(owner, name, clocked(getattr(owner, name)))
        begun, begun_wall = clock(), time.monotonic()
        assert lab.run("soak", **settings) == 0
        seconds, wall = clock() - begun, time.monotonic() - begun_wall
    costs = [
        json.loads(path.read_text())["cost"]["seconds"] for path in lab.root.glob("soak/arms/*/clips/*/result.json")
    ]
    assert len(costs) == len(samples)
    work = sum(timed) + sum(cost[name] for cost in costs for name in TOLD)
    begun = clock()
    assert lab.run("soak", **settings) == 0
    return Soak(clips, samples, seconds, work, wall, sum(loads) / len(loads), clock() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1941)
    parser.add_argument("--log", type=Path, help="write the report here, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tiny_lab(Path(folder)) as lab:
        report = soak(lab, arguments.clips)
    text = "\n".join([f"python -m tests.soak --clips {arguments.clips}", *report.lines(), ""])
    print(text, end="")
    if arguments.log:
        write_text(arguments.log, text)
    return int(not report.ok)


if __name__ == "__main__":
    sys.exit(main())
