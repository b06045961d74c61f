"""`vidtta bench`: run a suite and keep what it measured, or compare two measurements.

Every suite is a program of its own, `python -m vidtta.bench.SUITE`, and runs in a process of its own: whatever takes one down, what
it had measured is kept and the next one runs.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..engine.errors import UserError
from . import record
from .compare import compare
from .suite import add_arguments

SUITES = {
    "kernels": "each operation at the model's shapes: eager, torch.compile, Triton",
    "steps": "sampling steps, a training step of each method, the VAE, on each path",
    "clip": "a whole clip, phase by phase, with the quality of the small model on the same path",
    "start": "a fresh process to its first steps, with an empty and with a warm compile cache",
    "compiles": "graphs compiled and broken over 100 clips with captions of many lengths",
    "peers": "the official code, peft, flash-attn and xformers beside ours, where they can be imported",
    "report": "how long a report of 1,941 clips takes to make, and to open in a browser",
}


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vidtta bench",
        description="Measure, on this machine's card; with --check, check at small shapes on the CPU.",
        epilog="without a suite all of them run, one after the other; `vidtta bench SUITE --help` tells a suite's own options",
    )
    commands = parser.add_subparsers(title="suites", metavar="SUITE", dest="suite")
    add_arguments(parser)
    for name, about in SUITES.items():
        commands.add_parser(name, help=about, add_help=False)
    against = commands.add_parser("compare", help="print what got slower between two files, and fail if anything did")
    against.add_argument("before", type=Path, metavar="BEFORE")
    against.add_argument("after", type=Path, metavar="AFTER")
    against.add_argument("--threshold", type=_per_cent, default=5.0, metavar="PERCENT", help="allowed; 5 by default")
    against.add_argument("--other-card", action="store_true", help="compare although the cards differ")

    words = list(sys.argv[1:] if words is None else words)
    place = next((at for at, word in enumerate(words) if word in SUITES), None)
    if place is not None and "compare" not in words[:place]:
        return run([words[place]], words[:place] + words[place + 1 :])
    args = parser.parse_args(words)
    if args.suite == "compare":
        return compare(args.before, args.after, args.threshold, args.other_card)
    return run(list(SUITES), words)


def _per_cent(text: str) -> float:
    return float(text.removesuffix("%"))


def run(suites: Sequence[str], words: Sequence[str]) -> int:
    """Run suites with the given options, and write one file of all that they measured; the worst of their exit statuses."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--out", type=Path)
    given, rest = options.parse_known_args(words)
    if {"--help", "-h", "--list"} & set(rest):
        return max(_module(name, rest) for name in suites)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    out = given.out or Path(".benchmarks") / f"vidtta-{suites[0] if len(suites) == 1 else 'all'}-{stamp}.json"
    worst, files = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for name in suites:
            if len(suites) > 1:
                print(f"\n{name}: {SUITES[name]}", flush=True)
            file = Path(folder) / f"{name}.json" if len(suites) > 1 else out
            worst = max(worst, _module(name, [*rest, "--out", str(file)]))
            if file.exists():
                files.append(file)
        if len(suites) > 1:
            record.join(files, out)
    if out.exists():
        print(f"written: {out}")
    return worst


def _module(name: str, words: Sequence[str]) -> int:
    """Run a suite in a process of its own; its exit status, 1 for one that a signal ended."""
    status = subprocess.run([sys.executable, "-m", f"vidtta.bench.{name}", *words]).returncode
    if status < 0:
        print(f"{name}: the process was ended by signal {-status}", flush=True)
    return status if status >= 0 else 1


def entry() -> int:
    """`main`, its users' errors told in one line."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
