"""A soak: very many clips in one process. Memory and open files must stay flat, and vidtta's own work between clips small.

Run: python -m tests.soak --clips 1941 --log tests/logs/soak-1941.txt
Exits 1 where memory grew by more than 20 MiB after the first tenth, files stayed open, the overhead of a clip (wall time less
what its result says it cost) is over 0.3 s, or doing the finished run again takes over 5 s. Clips are made by code.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vidtta.engine import run as run_module
from vidtta.engine.cluster.status import cost_of
from vidtta.engine.files import write_text

from .engine.tiny_run import HEIGHT, WIDTH, Lab, tiny_lab


@dataclass
class Soak:
    """samples: (resident bytes, open files) before each result. seconds: of the run; work: what its results say they cost."""

    clips: int
    samples: list[tuple[int, int]]
    seconds: float
    work: float
    again: float
    """Seconds of the finished run, given again, with its models loaded anew but Python up."""

    @property
    def overhead(self) -> float:
        return (self.seconds - self.work) / len(self.samples)

    @property
    def growth(self) -> int:
        """Bytes from the mean after the first tenth of the results to the mean of the last tenth."""
        tenth = max(1, len(self.samples) // 10)
        early, late = self.samples[tenth : 2 * tenth], self.samples[-tenth:]
        return round(sum(m for m, _ in late) / len(late) - sum(m for m, _ in early) / len(early))

    @property
    def files_left_open(self) -> int:
        return self.samples[-1][1] - self.samples[min(len(self.samples) - 1, len(self.samples) // 10)][1]

    @property
    def ok(self) -> bool:
        return self.growth <= 20 * 2**20 and self.files_left_open <= 0 and self.overhead <= 0.3 and self.again <= 5

    def lines(self) -> list[str]:
        return [
            f"clips {self.clips}, results {len(self.samples)}, seconds {self.seconds:.0f}",
            f"memory growth {self.growth / 2**20:.1f} MiB, resident at the end {self.samples[-1][0] / 2**20:.0f} MiB",
            f"files left open {self.files_left_open}",
            f"own overhead {self.overhead * 1000:.0f} ms a result",
            f"the finished run again {self.again:.1f} s",
        ]


def soak(lab: Lab, clips: int) -> Soak:
    """Run so many clips in one process, then once more."""
    samples: list[tuple[int, int]] = []
    make = run_module.run_clip

    def sampled(*inputs, **named):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        samples.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        return make(*inputs, **named)

    data = {"clips": "world:shifted/test", "limit": clips, "height": HEIGHT, "width": WIDTH}
    settings = {"data": data, "keep": []}
    run_module.run_clip = sampled
    try:
        begun = time.monotonic()
        assert lab.run("soak", **settings) == 0
        seconds = time.monotonic() - begun
    finally:
        run_module.run_clip = make
    work = sum(
        cost_of(result) for result in (lab.read("soak", *p.relative_to(lab.root / "soak").parts) for p in _all(lab))
    )
    begun = time.monotonic()
    assert lab.run("soak", **settings) == 0
    return Soak(clips, samples, seconds, work, time.monotonic() - begun)


def _all(lab: Lab) -> list[Path]:
    return sorted((lab.root / "soak/arms").glob("*/clips/*/result.json"))


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
