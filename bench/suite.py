"""What all suites share: their command line, rows that guard each other, and the table they print.

A row is one function of a scene; it returns its figures or raises. What it raises becomes its line, and the next row starts. Each
row is printed when it is done, and what is known so far is written to the file.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Scene = TypeVar("Scene")
Row = dict[str, Any]
WIDTH = 36


class Absent(Exception):
    """Something that a row needs cannot be had here. The message is one sentence: what is missing, and how to get it."""


def parser(module: str, doc: str | None, minutes: float) -> argparse.ArgumentParser:
    """The command line of a suite. minutes: how long by default, after which no further row starts."""
    made = argparse.ArgumentParser(prog=f"python -m vidtta.bench.{module}", description=(doc or "").splitlines()[0])
    add_arguments(made, minutes)
    return made


def add_arguments(made: argparse.ArgumentParser, minutes: float | None = None) -> None:
    """The options that every suite has."""
    made.add_argument("--out", type=Path, metavar="FILE", help="write what was measured as JSON, after each row")
    made.add_argument(
        "--only", "--rows", dest="only", nargs="+", metavar="NAME", help="these rows, or all whose name begins so"
    )
    made.add_argument("--minutes", type=float, default=minutes, metavar="M", help="start no further row after this")
    made.add_argument(
        "--check", action="store_true", help="small shapes on the CPU: checks, no timings that mean anything"
    )
    made.add_argument("--list", action="store_true", help="name the rows and stop")
    made.add_argument("--commit", help="the code's commit, where the machine has no checkout to ask")


def device(check: bool) -> "torch.device":
    """What the suite runs on; ends the command where that is not here."""
    import torch

    if not check and not torch.cuda.is_available():
        print("error: there is no GPU here; --check runs the same rows at small shapes on the CPU", file=sys.stderr)
        raise SystemExit(2)
    return torch.device("cpu" if check else "cuda")


def chosen(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """Those that `only` names, in their order: a whole name stands for itself, another word for all names that begin so."""
    exact = {word for word in only or () if word in names}
    beginnings = [word for word in only or () if word not in exact]
    return [name for name in names if not only or name in exact or any(name.startswith(word) for word in beginnings)]


def run(
    rows: Mapping[str, Callable[[Scene], Row]],
    names: Sequence[str],
    scene: Scene,
    seconds: float,
    write: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:
    """A row for each name, in order; those that find no time left say so."""
    begin, done = time.monotonic(), []
    if names:
        print(HEADER, flush=True)
    for name in names:
        row: Row = {"row": name}
        start = time.monotonic()
        if start - begin > seconds:
            row["skipped"] = f"no time left after {seconds:.0f} s"
        else:
            try:
                row |= rows[name](scene)
            except Absent as error:
                row["absent"] = str(error)
            except Exception as error:  # each row has ways of its own to fail, and the others must run
                row["error"] = reason(error)
                row["where"] = traceback.format_exc(limit=-4)[-1500:]
            row["row_s"] = time.monotonic() - start
            forget_graphs()
        done.append(row)
        print(line(row), flush=True)
        write(done)
    return done


def forget_graphs() -> None:
    """Graphs of one row are not needed by the next, and their constants and workspaces take memory."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}" if text else type(error).__name__


HEADER = f"{'row':{WIDTH}} {'ms':>10} {'first s':>8} {'GiB':>6} {'GB/s':>6} {'of copy':>8} {'TFLOP/s':>8} {'of product':>10}  more"
SHOWN = (
    "distance_from_eager", "against", "ratio", "clips", "graphs_first", "graphs_more", "breaks_more", "recordings",
    "last_recording", "reserved_gib", "restore_ms", "ms_a_draw", "loop_s", "seconds", "psnr", "ssim", "temporal_error",
    "psnr_to_exact", "layers_reused",
    "inference_speedup_from_cached_activations", "peer", "path",
)  # fmt: skip
"""What else a line tells, where the row has it."""


def line(row: Row) -> str:
    """A row of the table, or why it has no figures."""
    head = f"{row['row']:{WIDTH}}"
    if "ms" not in row or "error" in row:
        return f"{head} {row.get('error') or row.get('skipped') or row.get('absent') or 'ok'}"
    cells = [f"{row['ms']:10.4g}", _cell(row.get("first_s"), "8.1f"), _cell(row.get("peak_gib"), "6.2f")]
    cells += [_cell(row.get("gb_per_s"), "6.0f"), _cell(row.get("share_of_copy"), "8.1%")]
    cells += [_cell(row.get("tflop_per_s"), "8.1f"), _cell(row.get("share_of_product"), "10.1%")]
    more = [f"{name} {_short(row[name])}" for name in SHOWN if row.get(name) is not None]
    return f"{head} {' '.join(cells)}  {', '.join(more)}".rstrip()


def _cell(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items() if item is not None) + ")"
    return str(value)


def finish(rows: Sequence[Row]) -> None:
    """End the command with 1 if a row failed."""
    if failed := [row for row in rows if "error" in row]:
        raise SystemExit(f"{len(failed)} of {len(rows)} rows failed")
