"""Curves and points of a report, as plain numbers: what the page's plots and the paper's figures both draw."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files import sha256_json
from ..statistics.bootstrap import cluster, student_reach
from ..statistics.pairing import HIGHER_IS_BETTER, Result, group_of
from ..statistics.pareto import pareto_front
from .gather import CURVES, FRAME_SCORES, Arm, Evidence

GIB = 2**30
COSTS: dict[str, tuple[str, Callable[[Result], float | None]]] = {
    "adapt": ("adaptation, s a clip", lambda r: r["cost"]["seconds"]["adapt"]),
    "total": ("whole clip, s", lambda r: sum(r["cost"]["seconds"].values())),
    "memory": (
        "peak memory, GiB",
        lambda r: None if r["cost"]["peak_memory_bytes"] is None else r["cost"]["peak_memory_bytes"] / GIB,
    ),
    "parameters": ("trained parameters", lambda r: r["adaptation"]["change"]["trained"]),
}


@dataclass(frozen=True)
class Band:
    """A curve and the 95 % interval of each of its points; ends are None where one clip has none."""

    mean: list[float]
    low: list[float | None]
    high: list[float | None]


def cost_of(arm: Arm) -> dict[str, float | None]:
    """The mean of each cost over the arm's clips; None where no result has it."""
    return {name: arm.mean(read) for name, (_, read) in COSTS.items()}


def family_of(arm: Arm) -> str:
    """Equal for arms that differ in the number of steps alone, whose points make a curve of quality against seconds."""
    settings = {key: value for key, value in arm.settings["method"].items() if key != "steps"}
    return sha256_json([settings, arm.settings.get("adaptation"), arm.placebo])[:12]


def front(evidence: Evidence, cost: str, score: str) -> list[str]:
    """The Pareto front of the mean gain in a score against a cost, the baseline at a gain of 0; placebos are no methods."""
    sign = 1 if score in HIGHER_IS_BETTER else -1
    points = {}
    for arm in [evidence.baseline, *evidence.methods]:
        spent, gain = arm.mean(COSTS[cost][1]), 0.0 if arm.is_baseline else getattr(arm.difference(score), "mean", None)
        if spent is not None and gain is not None:
            points[arm.label] = (spent, sign * gain)
    return pareto_front(points)


def band(rows: Sequence[np.ndarray], groups: Sequence[str]) -> Band:
    """Mean over clips of curves [points] of one length with Student's interval over groups of clips, point by point."""
    values = np.stack(rows).astype(float)
    mean, low, high = values.mean(0), [], []
    for k in range(values.shape[1]):
        data = cluster(values[:, k], np.asarray(groups, dtype=str))
        reach = student_reach(data, 0.95) if len(data.sums) > 1 else None
        low.append(None if reach is None else float(mean[k] - reach))
        high.append(None if reach is None else float(mean[k] + reach))
    return Band(mean.tolist(), low, high)


def frame_curves(evidence: Evidence, arm: Arm, score: str) -> tuple[Band | None, Band | None]:
    """A score over frames, and the difference to the baseline over frames, both over the clips of the arm's pairs."""
    pairs = arm.compared.pairs if arm.compared else None
    own = pairs.treated if pairs else arm.results
    curves = _mean_curves(own, lambda result: result["scores"].get(score, {}).get("frames"))
    if not curves:
        return None, None
    groups = [_cluster(evidence, clip) for clip in curves]
    values = band(list(curves.values()), groups)
    if pairs is None:
        return values, None
    before = _mean_curves(pairs.baseline, lambda result: result["scores"].get(score, {}).get("frames"))
    shared = [clip for clip in curves if clip in before]
    if not shared:
        return values, None
    return values, band([curves[c] - before[c] for c in shared], [_cluster(evidence, c) for c in shared])


def reference_curve(evidence: Evidence, name: str, score: str) -> list[float] | None:
    """A reference's score over frames, mean over clips."""
    held = (scores.get(score, {}).get("frames") for scores in evidence.references.get(name, {}).values())
    rows = [np.asarray(frames) for frames in held if frames]
    return np.stack(rows).mean(0).tolist() if rows and len({len(row) for row in rows}) == 1 else None


@dataclass(frozen=True)
class Curve:
    """A quantity over adaptation steps: median and quartiles over clips; at: steps taken when each value was read."""

    at: list[float]
    median: list[float]
    low: list[float]
    high: list[float]


def step_curves(arm: Arm) -> dict[str, Curve]:
    """What adapting recorded on its way, by name; curves of clips that stopped early end early."""
    found = {}
    for name in CURVES:
        rows = [np.asarray(values) for r in arm.results.values() if len(values := r["adaptation"].get(name, ())) > 0]
        if not rows:
            continue
        longest = max(rows, key=len)
        at = longest[:, 0] if longest.ndim == 2 else np.arange(len(longest), dtype=float)
        table = np.full((len(rows), len(longest)), np.nan)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values[:, 1] if values.ndim == 2 else values
        low, median, high = np.nanquantile(table, (0.25, 0.5, 0.75), axis=0)
        found[name] = Curve([float(x) for x in at], median.tolist(), low.tolist(), high.tolist())
    return found


def scored_frames(evidence: Evidence) -> tuple[int, list[int]]:
    """The number of the first scored frame, counted from 1, and the first frames after a seam of the VAE's chunks."""
    window = next(iter(evidence.baseline.results.values())).get("window", {})
    first, last = window.get("scored", [1, 0])
    known = window.get("known_frames", 0)
    return first, [frame for frame in range(18, last + 1, 16) if frame > known]


def frame_scores(evidence: Evidence) -> list[str]:
    """The scores that have a value a frame."""
    return [name for name in FRAME_SCORES if name in evidence.scores]


def _mean_curves(results: Mapping[Any, Result], read: Callable[[Result], Any]) -> dict[str, np.ndarray]:
    """A curve a clip, seeds averaged; curves of another length than the first are left out."""
    found: dict[str, list[np.ndarray]] = {}
    for (clip, _), result in results.items():
        if (values := read(result)) is not None:
            found.setdefault(clip, []).append(np.asarray(values, dtype=float))
    lengths = {len(row) for rows in found.values() for row in rows}
    length = max(lengths, default=0)
    return {clip: np.mean(rows, axis=0) for clip, rows in found.items() if all(len(row) == length for row in rows)}


def _cluster(evidence: Evidence, clip: str) -> str:
    return group_of(evidence.clips[clip]) or clip


def rounded(values: Iterable[float | None], digits: int) -> list[float | None]:
    """Numbers short enough for a page; None stays."""
    return [None if value is None else round(float(value), digits) for value in values]
