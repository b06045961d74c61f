"""Sampling steps, training steps of each method, the delta, the VAE and a whole clip at STDiT3-XL/2, on each path.

Run: python -m vidtta.bench.steps [--out FILE.json] [--rows NAME ...] [--minutes M]     (needs a GPU; no weights, no data)
     python -m vidtta.bench.steps --check        (CPU: a small network; checks, no timings that mean anything)
     python -m vidtta.bench.steps --list

Weights and frames are random: cost, never quality. 640x480, 49 frames, 22 known. The first row of a kind is eager PyTorch on the
plain path; a row whose result is further from it than 5% has no time, and says so. A row that fails is recorded with its reason
and the next one starts; the file is written after each. `--rows` takes beginnings of names.
"""

import json
from typing import TYPE_CHECKING, Any

from . import record, suite

if TYPE_CHECKING:
    from .step_scene import Scene

Row = dict[str, Any]


def run(scene: "Scene", names: list[str], seconds: float, write: Any = lambda rows: None) -> list[Row]:
    """A row for each name, in order; those that find no time left say so."""
    from .step_rows import ROWS

    return suite.run(ROWS, names, scene, seconds, write)


def main() -> None:
    arguments = suite.parser("steps", __doc__, minutes=6.0).parse_args()
    from .step_rows import ROWS
    from .step_scene import real_scene, small_scene

    names = suite.chosen(list(ROWS), arguments.only)
    if arguments.list:
        print("\n".join(names))
        return
    device = suite.device(arguments.check)
    environment = record.environment(device, arguments.commit)
    print(json.dumps(environment), flush=True)
    scene = small_scene(device) if arguments.check else real_scene(device)

    def write(rows: list[Row]) -> None:
        if arguments.out:
            measured = scene.__dict__.get("ceilings")  # a property that is there once a row has asked for it
            record.write(arguments.out, "steps", environment, rows, ceilings=measured and vars(measured))

    suite.finish(run(scene, names, arguments.minutes * 60, write))


if __name__ == "__main__":
    main()
