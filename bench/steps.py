"""Sampling steps, training steps of each method, the delta, the VAE and a whole clip at STDiT3-XL/2, on each path.

Run: python -m vidtta.bench.steps [--out FILE.json] [--rows NAME ...] [--minutes M]     (needs a GPU; no weights, no data)
     python -m vidtta.bench.steps --check        (CPU: a small network; checks, no timings that mean anything)
     python -m vidtta.bench.steps --list

Weights and frames are random: cost, never quality. 640x480, 49 frames, 22 known. The first row of a kind is eager PyTorch on the
plain path; a row whose result is further from it than 5% has no time, and says so. A row that fails is recorded with its reason
and the next one starts; the file is written after each. `--rows` takes beginnings of names.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from . import record, suite

if TYPE_CHECKING:
    from .step_scene import Scene

Row = dict[str, Any]
Rows = Mapping[str, Callable[["Scene"], Row]]


def main() -> None:
    def rows() -> Rows:
        from .step_rows import ROWS

        return ROWS

    measured("steps", __doc__, 6.0, rows)


def measured(name: str, about: str | None, minutes: float, make_rows: Callable[[], Rows]) -> None:
    """The program of a suite whose rows are of a scene. make_rows: called when the arguments are read, so that --help imports no torch."""
    arguments = suite.parser(name, about, minutes=minutes).parse_args()
    from .step_scene import real_scene, small_scene

    known = make_rows()
    names = suite.chosen(list(known), arguments.only)
    if arguments.list:
        print("\n".join(names))
        return
    device = suite.device(arguments.check)
    environment = record.environment(device, arguments.commit)
    print(json.dumps(environment), flush=True)
    scene = small_scene(device) if arguments.check else real_scene(device)

    def write(rows: list[Row]) -> None:
        if arguments.out:
            ceilings = scene.__dict__.get("ceilings")  # a property that is there once a row has asked for it
            record.write(arguments.out, name, environment, rows, ceilings=ceilings and vars(ceilings))

    suite.finish(suite.run(known, names, scene, arguments.minutes * 60, write))


if __name__ == "__main__":
    main()
