"""What a run directory says, made from its results: a CSV of every result, a table of the arms, videos side by side."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .choices import describe_choices
from .data.clips import Clip
from .errors import UserError
from .files import write_text
from .references import REFERENCES
from .rundir import RunDirectory, read_json
from .statistics import PairedDifference, paired_difference
from .statistics.pairing import group_of
from .window import Window

SCORES = ("psnr", "ssim", "lpips", "mse")
MOTION = (
    "frame_psnr_error",
    "frame_ssim_error",
    "seam_error",
    "chunk_seam_error",
    *(f"{kind}_error_{flow}" for flow in ("farneback", "raft") for kind in ("warping", "flow")),
)
PHASES = ("read", "encode", "adapt", "sample", "decode", "score")
COLUMNS = [
    "arm",
    "clip",
    "status",
    "group",
    *SCORES,
    *MOTION,
    *(f"{p}_seconds" for p in PHASES),
    "peak_memory_bytes",
    "graphs",
    "graph_breaks",
    "steps",
    "paths",
    "marks",
    "reason",
]

Row = dict[str, Any]


def write_summary(directory: RunDirectory, clips: list[Clip], arms: list[str]) -> list[Row]:
    """Write summary.csv, a row for each clip of each arm and reference, failures and missing ones included; returns the rows."""
    rows = [_reference_row(directory, name, clip.id) for name in REFERENCES for clip in clips]
    rows += [_arm_row(directory, arm, clip.id) for arm in arms for clip in clips]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(directory.root / "summary.csv", text.getvalue())
    return rows


def write_last_summary(directory: RunDirectory, clips: list[Clip], arms: list[str]) -> list[Row]:
    """Write the summary; again where tasks finished clips meanwhile, so that the last of several that end at once has them all."""
    before = -1
    while before != (before := directory.count_results()):
        rows = write_summary(directory, clips, arms)
    return rows


def _reference_row(directory: RunDirectory, name: str, clip_id: str) -> Row:
    found = read_json(directory.reference(clip_id))
    row: Row = {"arm": REFERENCES[name], "clip": clip_id, "status": "done" if found else "missing"}
    return row | (_means(found["scores"][name]) if found else {})


def _means(scores: dict[str, Any]) -> Row:
    return {name: scores.get(name, {}).get("mean") for name in (*SCORES, *MOTION)}


def _arm_row(directory: RunDirectory, arm: str, clip_id: str) -> Row:
    row: Row = {"arm": arm, "clip": clip_id}
    result = directory.result(arm, clip_id)
    if result is None:
        failure = directory.failure(arm, clip_id)
        return row | ({"status": "failed", "reason": failure["reason"]} if failure else {"status": "missing"})
    seconds = result["cost"]["seconds"]
    paths = describe_choices(result.get("paths", {}), result["adaptation"].get("ways", {}))
    return (
        row
        | {"group": group_of(result)}
        | {"status": "done", "steps": result["adaptation"]["steps"], "marks": "; ".join(result["marks"])}
        | _means(result["scores"])
        | {f"{p}_seconds": round(seconds[p], 4) for p in PHASES}
        | {name: result["cost"].get(name) for name in ("peak_memory_bytes", "graphs", "graph_breaks")}
        | {"paths": paths}
    )


def marks_of(rows: list[Row]) -> list[str]:
    """What the results of a table are marked with, each mark once; also those that this call of the run did not make."""
    return list(dict.fromkeys(mark for row in rows for mark in row.get("marks", "").split("; ") if mark))


def print_summary(rows: list[Row], arms: list[str], marks: tuple[str, ...]) -> None:
    """Print a table of the arms over the clips that all of them finished, so that every row is about the same clips."""
    from rich.console import Console
    from rich.table import Table

    names = [*REFERENCES.values(), *arms]
    done = {name: {r["clip"] for r in rows if r["arm"] == name and r["status"] == "done"} for name in names}
    common = set.intersection(*done.values())
    console = Console(highlight=False, markup=False)
    if not common:
        console.print("no clip was finished by every arm, so there is nothing to compare")
        return
    title = f"mean over the clips that every arm finished: {len(common)}"
    table = Table("arm", "PSNR dB", "SSIM", "LPIPS", "adapt s", "sample s", "peak GiB", title=title)
    for name in names:
        chosen = [r for r in rows if r["arm"] == name and r["clip"] in common]

        def mean(column: str, digits: int, scale: float = 1.0, chosen: list[Row] = chosen) -> str:
            values = [r.get(column) for r in chosen]
            numbers = [v for v in values if v is not None and v != ""]
            return f"{sum(numbers) / len(numbers) / scale:.{digits}f}" if len(numbers) == len(values) else "-"

        table.add_row(
            name,
            mean("psnr", 2),
            mean("ssim", 4),
            mean("lpips", 4),
            mean("adapt_seconds", 2),
            mean("sample_seconds", 2),
            mean("peak_memory_bytes", 2, 2**30),
        )
    console.print(table)
    against = {arm: difference_to(rows, arms[0], arm, common) for arm in arms[1:]}
    for arm, found in against.items():
        console.print(f"{arm}: PSNR {found.text(2)} dB to {arms[0]}, better on {found.win_rate:.0%}", soft_wrap=True)
    for warning in dict.fromkeys(found.warning for found in against.values() if found.warning):
        console.print(f"NOTE: {warning}", soft_wrap=True)
    for line in path_lines(rows, arms):
        console.print(line, soft_wrap=True)
    for mark in marks:
        console.print(f"NOTE: {mark}")


def path_lines(rows: list[Row], arms: list[str]) -> list[str]:
    """Which paths computed each arm, and how many graphs were compiled on how many clips; empty where all is plain and exact."""
    lines = []
    for arm in arms:
        done = [row for row in rows if row["arm"] == arm and row["status"] == "done"]
        paths = list(dict.fromkeys(row.get("paths") or "" for row in done))
        if not any(word in path for path in paths for word in ("compile", "triton", "features cached", "float8")):
            continue
        lines += [f"paths of {arm}: {path}" for path in paths]
        made = [row.get("graphs") or 0 for row in done]
        if any(made):
            clips, breaks = sum(map(bool, made)), sum(row.get("graph_breaks") or 0 for row in done)
            lines.append(f"{arm}: {sum(made)} graphs compiled, on {clips} of {len(done)} clips; {breaks} graph breaks")
    return lines


def difference_to(rows: list[Row], baseline: str, arm: str, clips: set[str]) -> PairedDifference:
    """The difference in PSNR between two arms on these clips, which both have finished."""
    chosen = {(row["arm"], row["clip"]): row for row in rows if row["clip"] in clips}
    ours, theirs = ([chosen[name, clip] for clip in sorted(clips)] for name in (arm, baseline))
    groups = [row["group"] or row["clip"] for row in ours] if any(row["group"] for row in ours) else None
    return paired_difference([row["psnr"] for row in ours], [row["psnr"] for row in theirs], groups)


def write_comparisons(
    directory: RunDirectory,
    clips: list[Clip],
    arms: list[str],
    window: Window,
    untrained: bool,
    check_stop: Callable[[], None],
) -> list[str]:
    """For each clip with every arm's video: the arms and the truth side by side. Made from the arms' videos, for looking only.
    untrained: say on the generated frames that the weights are.

    Returns a sentence for each that could not be made: results do not depend on them.
    """
    skipped = []
    for clip in clips:
        check_stop()
        videos = [directory.clip(arm, clip.id) / "video.mp4" for arm in arms]
        target = directory.comparison(clip.id)
        if not all(video.exists() for video in videos) or _newer(target, videos):
            continue
        try:
            _write_comparison(target, clip, dict(zip(arms, videos, strict=True)), window, untrained)
        except UserError as error:
            skipped.append(f"no comparison of {clip.id}: {error}")
    return skipped


def _write_comparison(target: Path, clip: Clip, videos: dict[str, Path], window: Window, untrained: bool) -> None:
    from .data.read import read_clip
    from .data.video import read_window, side_by_side, write_video

    frames, fps = window.total_frames, window.fps
    height, width = video_size(next(iter(videos.values())))
    columns = [
        (arm, read_window(video, frames=frames, fps=fps, height=height, width=width)) for arm, video in videos.items()
    ]
    columns.append(("truth", read_clip(clip, frames=frames, fps=fps, height=height, width=width)))
    write_video(target, side_by_side(columns, window.known_frames, "untrained" if untrained else ""), fps)


def _newer(target: Path, sources: list[Path]) -> bool:
    return target.exists() and all(target.stat().st_mtime_ns >= s.stat().st_mtime_ns for s in sources)


def video_size(video: Path) -> tuple[int, int]:
    """Height and width of a video file that this run wrote; raises UserError where it is damaged."""
    from .data.decode import Limits, open_pictures

    with open_pictures(video, Limits()) as stream:
        return stream.height, stream.width
