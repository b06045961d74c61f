"""Sampling steps, training steps of each method, the delta, the VAE and a whole clip at STDiT3-XL/2, on each path.

Run: python -m vidtta.bench.steps [--out FILE.json] [--rows NAME ...] [--minutes M]     (needs a GPU; no weights, no data)
     python -m vidtta.bench.steps --check        (CPU: a small network; checks, no timings that mean anything)
     python -m vidtta.bench.steps --list

Weights and frames are random: cost, never quality. 640x480, 49 frames, 22 known. The first row of a kind is eager PyTorch on the
plain path; a row whose result is further from it than 5% has no time, and says so. A row that fails is recorded with its reason
and the next one starts; the file is written after each. `--rows` takes beginnings of names.
"""

import argparse
import gc
import json
import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..engine.environment import describe_environment

if TYPE_CHECKING:
    from .step_scene import Scene

Row = dict[str, Any]


def run(scene: "Scene", names: list[str], seconds: float, write: Any = lambda rows: None) -> list[Row]:
    """A row for each name, in order; those that find no time left say so."""
    from .step_rows import ROWS

    begin, rows = time.monotonic(), []
    for name in names:
        row: Row = {"row": name}
        start = time.monotonic()
        if start - begin > seconds:
            row["skipped"] = f"no time left after {seconds:.0f} s"
        else:
            try:
                row |= ROWS[name](scene)
            except Exception as error:  # each row has ways of its own to fail, and the others must run
                row["error"] = f"{type(error).__name__}: {str(error)[:600]}"
                row["where"] = traceback.format_exc(limit=-4)[-1500:]
            row["row_s"] = time.monotonic() - start
            # Graphs of one row are not needed by the next, and their constants and workspaces take memory.
            torch._dynamo.reset()
            gc.collect()
            if scene.device.type == "cuda":
                torch.cuda.empty_cache()
        rows.append(row)
        show(row)
        write(rows)
    return rows


def show(row: Row) -> None:
    """One line a row."""
    head = f"{row['row']:36}"
    if "ms" not in row:
        print(f"{head} {row.get('error') or row.get('skipped') or 'ok'}", flush=True)
        return
    parts = [f"{row['ms']:10.2f} ms", f"{row.get('peak_gib', 0):6.2f} GiB", f"first {row.get('first_s', 0):6.1f} s"]
    for name in ("distance_from_eager", "graphs_more", "breaks_more", "restore_ms", "ms_a_draw", "loop_s", "seconds"):
        if name in row:
            value = row[name]
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    print(f"{head} {'  '.join(parts)}  [{row['row_s']:.0f} s]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after each of them")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows whose name begins so")
    parser.add_argument("--minutes", type=float, default=6.0, help="start no further row after this")
    parser.add_argument("--commit", help="the code's commit, where the machine has no checkout to ask")
    parser.add_argument("--check", action="store_true", help="a small network on the CPU; checks alone")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    arguments = parser.parse_args()
    if arguments.check:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    from .step_rows import ROWS
    from .step_scene import real_scene, small_scene

    names = [n for n in ROWS if not arguments.rows or any(n.startswith(given) for given in arguments.rows)]
    if arguments.list:
        print("\n".join(names))
        return
    device = torch.device("cpu" if arguments.check else "cuda")
    environment = describe_environment(device)
    environment["commit"] = arguments.commit or environment["commit"]
    print(json.dumps(environment), flush=True)

    def write(rows: list[Row]) -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1, default=str))

    scene = small_scene(device) if arguments.check else real_scene(device)
    rows = run(scene, names, arguments.minutes * 60, write)
    if failed := [row for row in rows if "error" in row]:
        raise SystemExit(f"{len(failed)} of {len(rows)} rows failed")


if __name__ == "__main__":
    main()
