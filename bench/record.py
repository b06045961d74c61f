"""What a suite measured, as a file that pytest-benchmark reads too.

The file is pytest-benchmark's JSON (`pytest-benchmark compare FILE` works) with two keys of ours beside its own: `environment`, and
`rows`, every row as the suite made it, with those that have no time and the reason why. A benchmark is one timed call of a row;
its `stats` are in seconds, and `extra_info` holds the rest of the row: bytes, flops, shares of the ceilings, memory, path.
"""

import json
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import UserError
from ..engine.files import write_json

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
FORMAT = "5.3.1"
"""Version of pytest-benchmark whose JSON this is."""


def environment(device: "torch.device", commit: str | None = None) -> Row:
    """Card, driver, versions, commit. commit: where the machine has no checkout to ask."""
    from ..engine.environment import describe_environment

    found: Row = describe_environment(device) | {"driver": driver() if device.type == "cuda" else None}
    return found | {"commit": commit or found["commit"]}


def driver() -> str | None:
    """Version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def timed(row: Row) -> Iterator[tuple[str, Row]]:
    """Name and content of each timed call of a row: the row itself, the passes of a kernel, or the back ends of an attention."""
    if "row" in row and "ms" in row:
        yield row["row"], row
    for name in ("forward", "backward"):
        if isinstance(found := row.get(name), dict):
            about = {key: row[key] for key in row if key not in ("forward", "backward")}
            yield f"{row['op']} {row['shape']} {row['impl']} {name}", about | found | {"ms": found["milliseconds"]}
    for found in row.get("backends", ()):
        if "milliseconds" in found:
            kind = "training" if found["training"] else "forward"
            yield f"attention {found['shape']} {found['backend']} {kind}", found | {"ms": found["milliseconds"]}


def name_of(row: Row) -> str:
    """The row's name, timed or not."""
    return row["row"] if "row" in row else f"{row['op']} {row['shape']} {row['impl']}"


def statistics_of(times_ms: Sequence[float]) -> Row:
    """pytest-benchmark's statistics of times in milliseconds, in seconds."""
    data = [ms / 1e3 for ms in times_ms]
    low, middle, high = statistics.quantiles(data, n=4) if len(data) > 1 else data * 3
    spread, mean, deviation = high - low, statistics.fmean(data), statistics.stdev(data) if len(data) > 1 else 0.0
    far = [t for t in data if not low - 1.5 * spread <= t <= high + 1.5 * spread]
    odd = [t for t in data if abs(t - mean) > deviation]
    inside = [t for t in data if t not in far] or data
    return {
        "min": min(data), "max": max(data), "mean": mean, "stddev": deviation, "rounds": len(data), "median": middle,
        "iqr": spread, "q1": low, "q3": high, "iqr_outliers": len(far), "stddev_outliers": len(odd),
        "outliers": f"{len(odd)};{len(far)}", "ld15iqr": min(inside), "hd15iqr": max(inside), "ops": 1 / mean if mean else 0.0,
        "total": sum(data), "data": data, "iterations": 1,
    }  # fmt: skip


def benchmarks(suite: str, rows: Sequence[Row]) -> list[Row]:
    """pytest-benchmark's entries of what was timed. A row that failed its check has none."""
    return [
        {
            "group": suite,
            "name": name,
            "fullname": f"{suite}::{name}",
            "params": None,
            "param": None,
            "extra_info": {key: value for key, value in call.items() if key not in ("row", "times")},
            "options": {},
            "stats": statistics_of(call.get("times") or [call["ms"]]),
        }
        for row in rows
        if "error" not in row
        for name, call in timed(row)
    ]


def write(path: Path, suite: str, about: Row, rows: Sequence[Row], **more: Any) -> None:
    """Write what was measured so far, whole or not at all."""
    machine = {
        "processor": platform.processor(), "machine": platform.machine(), "system": platform.system(),
        "release": platform.release(), "python_version": platform.python_version(),
        "python_implementation": platform.python_implementation(), "node": "", "cpu": {},
        "card": about.get("device"), "driver": about.get("driver"), **about.get("packages", {}),
    }  # fmt: skip
    commit = about.get("commit") or "unknown"
    write_json(
        path,
        _plain({
            "machine_info": machine,
            "commit_info": {
                "id": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty"), "time": None, "author_time": None,
                "project": "vidtta", "branch": "(unknown)",
            },
            "datetime": datetime.now(UTC).isoformat(),
            "version": FORMAT,
            "benchmarks": benchmarks(suite, rows),
            "suite": suite,
            "environment": about,
            **more,
            "rows": [_without_times(row) for row in rows],
        }),
    )  # fmt: skip


def _without_times(row: Row) -> Row:
    """The single times stand in the benchmarks' `data` already."""
    return {
        key: _without_times(value) if isinstance(value, dict) else value for key, value in row.items() if key != "times"
    }


def _plain(value: Any) -> Any:
    """JSON without NaN or infinity, which become null; what is no JSON becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def add(path: Path, row: Row) -> None:
    """Add a row without a time to a file."""
    held = json.loads(path.read_text())
    write_json(path, held | {"rows": [*held["rows"], row]})


def join(files: Sequence[Path], out: Path, suite: str = "all") -> None:
    """One file of several, each row naming its suite; the environment is the first one's."""
    held = [json.loads(file.read_text()) for file in files]
    if held:
        rows = [row | {"suite": one["suite"]} for one in held for row in one["rows"]]
        entries = [entry for one in held for entry in one["benchmarks"]]
        write_json(out, held[0] | {"suite": suite, "benchmarks": entries, "rows": rows})


@dataclass(frozen=True)
class Recorded:
    """A file of measurements. times: milliseconds, the median, by `suite::name`; without: why others have none, likewise."""

    path: Path
    environment: Row
    times: dict[str, float]
    without: dict[str, str]


def read(path: Path) -> Recorded:
    """Read a file of `write`, or one of before it was pytest-benchmark's. Raises UserError for anything else."""
    try:
        held = json.loads(path.read_text())
        rows, about = held["rows"], held["environment"]
        kind = held.get("suite") or ("kernels" if any("op" in row for row in rows) else "steps")
        if "benchmarks" in held:
            times = {b["fullname"]: 1e3 * b["stats"]["median"] for b in held["benchmarks"]}
        else:
            times = {f"{kind}::{name}": call["ms"] for row in rows if "error" not in row for name, call in timed(row)}
        without = {f"{row.get('suite', kind)}::{name_of(row)}": reason for row in rows if (reason := why_none(row))}
        return Recorded(path, about or {}, times, without)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: is no file of measurements that `vidtta bench` wrote ({found}); name one") from error


def why_none(row: Row) -> str | None:
    """Why a row has no time, in a sentence."""
    return row.get("error") or row.get("skipped") or row.get("absent")
