"""Mistakes planted in the code one at a time, each of which a named test must notice.

Run: python -m tests.mutations [NAME ...] [--log FILE]        (about five seconds each; exits 1 if one goes unnoticed)

A mutation of mutations.yaml replaces one piece of a module's source while it is imported, in a process of its own; no file changes. What
a run refuses by itself, with mistakes planted by monkeypatching, is in engine/sabotage.py; these are for what only a test can see: that
a measure, a search, a split or a decision is the one that its page describes.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = "VIDTTA_MUTATION"


@dataclass(frozen=True)
class Mutation:
    """Where `old` stands once in a module, `new` comes; noticed by tests of a file of tests/engine, chosen as by pytest's -k."""

    module: str
    old: str
    new: str
    test: str
    by: str


def read_mutations() -> dict[str, Mutation]:
    """Those of mutations.yaml, by name."""
    listed = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {
        name: Mutation(f"vidtta.engine.{row['module']}", row["old"], row["new"], *row["noticed_by"])
        for name, row in listed.items()
    }


MUTATIONS = read_mutations()


class Mutated(SourceFileLoader):
    """Compiles a module's source with the mutation in it, whatever lies in its cache."""

    def get_code(self, fullname: str) -> CodeType:
        mutation = MUTATIONS[os.environ[CHOSEN]]
        return compile(mutated(mutation), self.path, "exec")


class Finder:
    """Comes before all others on the import path, for the one module."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != MUTATIONS[os.environ[CHOSEN]].module:
            return None
        file = source_of(MUTATIONS[os.environ[CHOSEN]])
        return importlib.util.spec_from_file_location(name, file, loader=Mutated(name, str(file)))


def source_of(mutation: Mutation) -> Path:
    return ROOT.joinpath(*mutation.module.split(".")[1:]).with_suffix(".py")


def mutated(mutation: Mutation) -> str:
    """The module's source with the mutation. Raises ValueError where what it replaces does not stand there once."""
    source = source_of(mutation).read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.module} holds {source.count(mutation.old)} times what the mutation replaces")
    return source.replace(mutation.old, mutation.new)


if CHOSEN in os.environ:  # this module is then a plugin of pytest's, loaded before any of the project
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]


def notices(name: str) -> tuple[bool, str]:
    """Whether the named test fails under a mutation, and pytest's last line."""
    mutation = MUTATIONS[name]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-p",
        "tests.mutations",
        f"tests/engine/{mutation.test}",
        "-k",
        mutation.by,
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {CHOSEN: name}, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    last = failed[0] if failed else (done.stdout + done.stderr).strip().splitlines()[-1]
    return done.returncode == 1 and bool(failed), last


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="these alone")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write the lines there too")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MUTATIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    lines, unnoticed, start = [], 0, time.monotonic()
    for name in arguments.names or MUTATIONS:
        noticed, last = notices(name)
        unnoticed += not noticed
        lines.append(
            f"{'noticed' if noticed else 'NOT NOTICED'}: {name}: {last.removeprefix('FAILED ').partition(' - ')[0]}"
        )
        print(lines[-1], flush=True)
    lines.append(f"{len(lines)} mutations, {unnoticed} not noticed, {time.monotonic() - start:.0f} s")
    print(lines[-1])
    if arguments.log:
        arguments.log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    raise SystemExit(main())
