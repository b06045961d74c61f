"""What the files of some runs say, as the report needs it: arms, their results by clip and seed, references, failures."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..compare import Compared, compare_arms, read_results
from ..errors import UserError
from ..files import sha256_json
from ..rundir import RunDirectory, read_json
from ..statistics import PairedDifference, holm
from ..statistics.pairing import Result, Unit

FRAME_SCORES = ("psnr", "ssim", "lpips")
CURVES = (
    "losses",
    "zero_losses",
    "gradient_norms",
    "penalties",
    "distances",
    "fixed_losses",
    "kl",
    "held_out",
    "forgetting",
)
"""Lists in a result's `adaptation`: one value a step, or pairs (steps taken, value)."""


@dataclass(frozen=True)
class Arm:
    """An arm of the runs. label: its name, with its run's where two share it; parent: of a placebo, the label of the arm it
    stands in for; compared: with the baseline, None for the baseline itself.
    """

    label: str
    kind: str
    settings: dict[str, Any]
    results: dict[Unit, Result]
    compared: Compared | None = None
    placebo: str = ""
    parent: str = ""
    p_values: dict[str, float] = field(default_factory=dict)
    """By score, after Holm's correction over the arms of the report."""
    _differences: dict[str, PairedDifference | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_baseline(self) -> bool:
        return self.compared is None

    @cached_property
    def clips(self) -> list[str]:
        return list(dict.fromkeys(clip for clip, _ in self.results))

    def difference(self, score: str) -> PairedDifference | None:
        """To the baseline, in any score that its results hold."""
        if self.compared is None:
            return None
        if score in self.compared.scores:
            return self.compared.scores[score]
        if score not in self._differences:
            self._differences[score] = self.compared.pairs.compare(score)
        return self._differences[score]

    def gains(self, score: str) -> dict[str, float]:
        """The difference to the baseline by clip, seeds averaged; empty for the baseline."""
        found = self.compared.pairs.differences(score) if self.compared else None
        return {clip: float(np.mean(values)) for clip, values in (found or {}).items()}

    def by_clip(self, value: Callable[[Result], float | None]) -> dict[str, float]:
        """A number of each result, seeds averaged within a clip; results without it left out."""
        found: dict[str, list[float]] = {}
        for (clip, _), result in self.results.items():
            if (number := value(result)) is not None:
                found.setdefault(clip, []).append(number)
        return {clip: sum(values) / len(values) for clip, values in found.items()}

    def mean(self, value: Callable[[Result], float | None], clips: Iterable[str] | None = None) -> float | None:
        """The mean over clips, None where no result has the number."""
        by_clip = self.by_clip(value)
        numbers = list(by_clip.values()) if clips is None else [by_clip[clip] for clip in clips if clip in by_clip]
        return sum(numbers) / len(numbers) if numbers else None


@dataclass(frozen=True)
class Failure:
    run: str
    arm: str
    clip: str
    reason: str
    traceback: str


@dataclass(frozen=True)
class Evidence:
    """All that a report is made from. arms: the baseline first; references: by name, then clip, the scores."""

    roots: list[Path]
    arms: list[Arm]
    clips: dict[str, Result]
    """By clip id, a result that tells its caption and what its manifest says of it."""
    references: dict[str, dict[str, dict[str, Any]]]
    kinds: dict[str, dict[str, float]]
    """By clip id, what the real clip is like, where the run has measured it."""
    failures: list[Failure]

    @property
    def baseline(self) -> Arm:
        return self.arms[0]

    @property
    def treated(self) -> list[Arm]:
        return self.arms[1:]

    @property
    def methods(self) -> list[Arm]:
        """The arms that are neither baseline nor placebo."""
        return [arm for arm in self.treated if not arm.placebo]

    @cached_property
    def common(self) -> list[str]:
        """Clips that every arm finished, in order."""
        return [clip for clip in self.clips if all(clip in arm.clips for arm in self.arms)]

    @cached_property
    def scores(self) -> list[str]:
        """Names of the scores that every arm has, PSNR, SSIM and LPIPS first."""
        held = [
            {name for name, score in result["scores"].items() if score.get("mean") is not None}
            for arm in self.arms
            for result in arm.results.values()
        ]
        common = set.intersection(*held) - {"mse"}
        return [*(name for name in FRAME_SCORES if name in common), *sorted(common - set(FRAME_SCORES))]

    @property
    def seeds(self) -> list[int]:
        """The recipe seeds of the results."""
        return sorted({seed for arm in self.arms for _, seed in arm.results})

    @property
    def marks(self) -> list[str]:
        """What results are marked with, each mark once."""
        results = (result for arm in self.arms for result in arm.results.values())
        return list(dict.fromkeys(mark for result in results for mark in result.get("marks", ())))

    @property
    def warnings(self) -> list[str]:
        results = (result for arm in self.arms for result in arm.results.values())
        return list(dict.fromkeys(warning for result in results for warning in result.get("warnings", ())))


def gather(roots: list[Path]) -> Evidence:
    """Read runs that share a protocol; raises UserError where they do not, or where there is no baseline or no method."""
    settings: dict[str, dict[str, Any]] = {}
    found = {root: read_results(root, partial(_lean, root=root, settings=settings)) for root in roots}
    compared = compare_arms(found)
    p_values = {
        score: holm({row.arm: d.p_value for row in compared if (d := row.scores[score])}) for score in FRAME_SCORES
    }
    arms = [_baseline(found)]
    for row in compared:
        if not row.pairs.treated:
            continue
        first = next(iter(row.pairs.treated.values()))
        made = first["settings"]
        arms.append(
            Arm(
                row.arm,
                made["method"]["kind"],
                made,
                row.pairs.treated,
                row,
                made.get("placebo", ""),
                _parent(made, compared),
                {score: values[row.arm] for score, values in p_values.items() if row.arm in values},
            )
        )
    if len(arms) == 1:
        names = ", ".join(map(str, roots))
        raise UserError(
            f"{names}: no clip has a result both of the baseline and of a method; run both on the same clips"
        )
    arms = [arms[0], *sorted(arms[1:], key=lambda arm: bool(arm.placebo))]
    clips: dict[str, Result] = {}
    for arm in arms:
        for (clip, _), result in arm.results.items():
            clips.setdefault(clip, result)
    clips = dict(sorted(clips.items()))
    references, kinds = _references(roots, clips)
    return Evidence(roots, arms, clips, references, kinds, _failures(roots))


def _lean(result: dict[str, Any], root: Path, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A result without what no page shows, its curves as arrays, one object for settings that are equal (a tenth of the
    memory), and the run that it is from.
    """
    key = sha256_json(result["settings"])
    scores = {}
    for name, score in result["scores"].items():
        kept = {key: value for key, value in score.items() if key in ("mean", "pred", "truth")}
        if name in FRAME_SCORES and score.get("frames"):
            kept["frames"] = np.asarray(score["frames"], dtype=np.float32)
        scores[name] = kept
    adaptation = dict(result.get("adaptation", {})) | _diagnosed(
        RunDirectory(root).clip(result["arm"], result["clip"]), result
    )
    for name in CURVES:
        if adaptation.get(name):
            adaptation[name] = np.asarray(adaptation[name], dtype=np.float32)
    return {
        **result,
        "root": root,
        "settings": settings.setdefault(key, result["settings"]),
        "paths": settings.setdefault(sha256_json(result.get("paths")), result.get("paths") or {}),
        "made_from": None,
        "scores": scores,
        "adaptation": adaptation,
    }


def _diagnosed(folder: Path, result: Result) -> dict[str, list[tuple[int, float]]]:
    """What diagnostics measured on a clip, as pairs (steps taken, value): of ten noise levels and of held-out clips the mean.

    distances: of the weights that compute. A number that was not finite leaves its pair out.
    """
    held = read_json(folder / "curves.json") if (folder / "curves.json").exists() else None
    if not held:
        return {}
    steps = held.get("steps", [])
    found = {
        "fixed_losses": zip(steps, map(_mean, held.get("losses", [])), strict=False),
        "kl": zip(steps, map(_mean, held.get("kl", [])), strict=False),
        "distances": zip(steps, (one.get("effective") for one in held.get("distances", [])), strict=False),
    }
    if clips := list(held.get("forgetting", {}).values()):
        losses = [[_mean(clip[when]["losses"]) for clip in clips] for when in ("before", "after")]
        found["forgetting"] = zip((0, result["adaptation"]["steps"]), map(_mean, losses), strict=True)
    return {name: pairs for name, it in found.items() if (pairs := [(k, v) for k, v in it if v is not None])}


def _mean(values: list[float | None]) -> float | None:
    """None where a value is missing."""
    held = [value for value in values if value is not None]
    return sum(held) / len(held) if held and len(held) == len(values) else None


def _baseline(found: dict[Path, list[Result]]) -> Arm:
    """Every result of kind none, the first run's where two have the same clip and seed."""
    results: dict[Unit, Result] = {}
    for run in found.values():
        for result in run:
            if result["settings"]["method"]["kind"] == "none":
                results.setdefault((result["clip"], result["seeds"]["recipe"]), result)
    first = next(iter(results.values()))
    return Arm(first["arm"], "none", first["settings"], results)


def _parent(settings: dict[str, Any], compared: list[Compared]) -> str:
    """The arm whose placebo this is: the one with the same settings and no placebo."""
    if not settings.get("placebo"):
        return ""
    for row in compared:
        other = next(iter(row.pairs.treated.values()), None)
        if other and not other["settings"].get("placebo") and other["settings"]["method"] == settings["method"]:
            return row.arm
    return ""


def _references(roots: list[Path], clips: Iterable[str]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    scores: dict[str, Any] = {}
    kinds: dict[str, dict[str, float]] = {}
    for clip in clips:
        for root in roots:
            if held := read_json(RunDirectory(root).reference(clip)):
                for name, score in held["scores"].items():
                    scores.setdefault(name, {})[clip] = score
                if "kind" in held:
                    kinds[clip] = held["kind"]
                break
    return scores, kinds


def _failures(roots: list[Path]) -> list[Failure]:
    found = []
    for root in roots:
        for path in sorted(root.glob("arms/*/clips/*/failure.json")):
            if failure := read_json(path):
                arm, clip = path.parts[-4], path.parts[-2]
                reason, trace = str(failure.get("reason") or "no reason was written"), failure.get("traceback")
                found.append(Failure(root.name, arm, clip, reason, str(trace or "")))
    return found
