"""The numbers that a report's page draws from, as JSON: compact, rounded, and videos as paths relative to the page."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..references import REFERENCES
from ..rundir import RunDirectory
from ..statistics.pairing import HIGHER_IS_BETTER, Result
from . import series
from .gather import Arm, Evidence
from .kinds import KINDS, by_category, category_of, kinds_of
from .names import name_of
from .search import read_searches


def payload(evidence: Evidence, page: Path, focus: Arm) -> dict[str, Any]:
    """Everything that the page's scripts read. page: where the page will lie; focus: the arm that the answer is about."""
    first, seams = series.scored_frames(evidence)
    return {
        "focus": focus.label,
        "baseline": evidence.baseline.label,
        "arms": [
            {
                "label": arm.label,
                "kind": arm.kind,
                "placebo": arm.placebo,
                "parent": arm.parent,
                "family": series.family_of(arm),
                "steps": arm.settings["method"].get("steps"),
            }
            for arm in evidence.arms
        ],
        "scores": [
            {
                "name": score,
                "title": title,
                "unit": unit,
                "digits": digits,
                "better": 1 if score in HIGHER_IS_BETTER else -1,
            }
            for score in evidence.scores
            for title, unit, digits in [name_of(score)]
        ],
        "frameScores": series.frame_scores(evidence),
        "costs": _costs(evidence),
        "frames": {"first": first, "seams": seams, "scores": _frames(evidence)},
        "steps": {
            arm.label: {name: _short(asdict(curve), 5) for name, curve in series.step_curves(arm).items()}
            for arm in evidence.treated
        },
        "categories": [
            {"name": category.name, "values": series.rounded(category.gains, 3)}
            for category in by_category(evidence, focus)
        ],
        "kinds": {name: KINDS[name][0] for name in kinds_of(evidence)},
        "clips": _clips(evidence, page),
        "searches": read_searches(evidence.roots),
        "fps": next(iter(evidence.baseline.results.values()))["settings"]["protocol"].get("window", {}).get("fps", 24),
    }


def _costs(evidence: Evidence) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cost, (title, _) in series.COSTS.items():
        spent = {arm.label: series.cost_of(arm)[cost] for arm in evidence.arms}
        if all(value is None for value in spent.values()):
            continue
        found[cost] = {
            "title": title,
            "spent": spent,
            "fronts": {score: series.front(evidence, cost, score) for score in series.frame_scores(evidence)},
        }
    gains = {}
    for score in series.frame_scores(evidence):
        gains[score] = {
            arm.label: [d.mean, d.low, d.high] if (d := arm.difference(score)) else None for arm in evidence.treated
        }
    return {"axes": found, "gains": gains}


def _frames(evidence: Evidence) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for score in series.frame_scores(evidence):
        digits = name_of(score)[2] + 1
        curves: dict[str, Any] = {}
        for arm in evidence.arms:
            value, gain = series.frame_curves(evidence, arm, score)
            if value is not None:
                curves[arm.label] = {
                    "value": _short(asdict(value), digits),
                    "gain": None if gain is None else _short(asdict(gain), digits),
                }
        references = {
            title: series.rounded(curve, digits)
            for name, title in REFERENCES.items()
            if (curve := series.reference_curve(evidence, name, score))
        }
        found[score] = {"arms": curves, "references": references}
    return found


def _short(lists: dict[str, list[Any]], digits: int) -> dict[str, list[float | None]]:
    return {key: series.rounded(values, digits) for key, values in lists.items()}


def _clips(evidence: Evidence, page: Path) -> dict[str, Any]:
    clips = list(evidence.clips)
    kinds = kinds_of(evidence)
    baseline = {
        score: evidence.baseline.by_clip(lambda result, score=score: result["scores"][score]["mean"])
        for score in series.frame_scores(evidence)
    }
    gains = {
        arm.label: {score: arm.gains(score) for score in series.frame_scores(evidence)} for arm in evidence.treated
    }
    return {
        "id": clips,
        "category": [category_of(evidence, clip) for clip in clips],
        "caption": [evidence.clips[clip].get("caption", "") for clip in clips],
        "kinds": {name: [_round(values.get(clip), 4) for clip in clips] for name, values in kinds.items()},
        "baseline": {s: [_round(v.get(clip), name_of(s)[2] + 1) for clip in clips] for s, v in baseline.items()},
        "gains": {
            label: {s: [_round(v.get(clip), name_of(s)[2] + 1) for clip in clips] for s, v in by_score.items()}
            for label, by_score in gains.items()
        },
        "psnrFrames": {arm.label: _frames_of(arm, clips) for arm in evidence.arms},
        "truth": [_truth(evidence.clips[clip], page) for clip in clips],
        "videos": {arm.label: _videos(arm, clips, page) for arm in evidence.arms},
    }


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(float(value), digits)


def _frames_of(arm: Arm, clips: list[str]) -> list[list[float] | None]:
    """PSNR over frames of the first seed's result of each clip."""
    first = {clip: result for (clip, _), result in reversed(arm.results.items())}
    found: list[list[float] | None] = []
    for clip in clips:
        frames = first[clip]["scores"]["psnr"].get("frames") if clip in first else None
        found.append(None if frames is None else [round(float(value), 1) for value in frames])
    return found


def _videos(arm: Arm, clips: list[str], page: Path) -> list[str | None]:
    first = {clip: result for (clip, _), result in reversed(arm.results.items())}
    return [
        _link(RunDirectory(first[clip]["root"]).clip(first[clip]["arm"], clip) / "video.mp4", page)
        if clip in first
        else None
        for clip in clips
    ]


def _truth(result: Result, page: Path) -> str | None:
    return _link(RunDirectory(result["root"]).truth(result["clip"], result["keys"]["clip"]), page)


def _link(file: Path, page: Path) -> str | None:
    """A file's address, None where there is no such file."""
    return address(file, page) if file.exists() else None


def address(file: Path, page: Path) -> str:
    """A file's address relative to the page's folder, percent-encoded."""
    return quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())
