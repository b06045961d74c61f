"""Results of two arms, paired by clip and sampling seed; what does not belong together is refused."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..rundir import first_difference
from .paired import PairedDifference, paired_difference

HIGHER_IS_BETTER = ("psnr", "ssim")
"""All other scores are distances and errors."""

Result = Mapping[str, Any]
"""What a result.json holds."""

Unit = tuple[str, int]
"""A clip's id and the recipe's seed."""


@dataclass(frozen=True)
class Pairs:
    """Results of two arms on the same clips with the same seeds.

    treated and baseline have the same units, sorted; what only one of the arms has is named as missing in the other.
    """

    treated: dict[Unit, Result]
    baseline: dict[Unit, Result]
    missing_in_treated: tuple[Unit, ...]
    missing_in_baseline: tuple[Unit, ...]

    @property
    def clips(self) -> list[str]:
        return list(dict.fromkeys(clip for clip, _ in self.treated))

    def differences(self, score: str) -> dict[str, list[float]] | None:
        """Treated minus baseline by clip, one value a seed and sample; None where a result lacks the score.

        Sample k of both arms starts from the same noise; what only one arm has sampled is left out.
        """
        found: dict[str, list[float]] = {clip: [] for clip in self.clips}
        for unit, treated in self.treated.items():
            for after, before in zip(_values(treated, score), _values(self.baseline[unit], score), strict=False):
                if after is None or before is None:
                    return None
                found[unit[0]].append(after - before)
        return found

    def compare(self, score: str, *, seed: int = 0, confidence: float = 0.95) -> PairedDifference | None:
        """The paired difference of a score, seeds averaged within a clip, clips clustered by group where a manifest has it.

        None where there are no pairs or a result lacks the score.
        """
        differences = self.differences(score)
        if not differences:
            return None
        means = [float(np.mean(values)) for values in differences.values()]
        first = {clip: result for (clip, _), result in reversed(self.treated.items())}
        groups = [group_of(first[clip]) for clip in differences]
        return paired_difference(
            means,
            [0.0] * len(means),
            [group or clip for clip, group in zip(differences, groups, strict=True)] if any(groups) else None,
            better="higher" if score in HIGHER_IS_BETTER else "lower",
            seed=seed,
            confidence=confidence,
        )


def _values(result: Result, score: str) -> list[float | None]:
    """A score of each sample of a result."""
    first = result["scores"].get(score, {}).get("mean")
    return [first, *(sample.get(score) for sample in result.get("samples", [])[1:])]


def group_of(result: Result) -> str:
    """The group whose clips look alike, from the manifest's columns `class` and `group`; empty where it has no group.

    UCF-101 counts groups within a class.
    """
    meta = result.get("meta", {})
    return f"{meta.get('class', '')}/{meta['group']}" if meta.get("group") else ""


def pair_results(treated: Iterable[Result], baseline: Iterable[Result]) -> Pairs:
    """Pair results by clip and recipe seed.

    Raises UserError where a pair differs in anything but the method (protocol, video, caption, seeds of the draws), where
    an arm has two results of one clip and seed, and where the arms share clips but no seed.
    """
    after, before = _by_unit(treated), _by_unit(baseline)
    common = sorted(after.keys() & before.keys())
    for unit in common:
        ours, theirs = _shared(after[unit]), _shared(before[unit])
        if ours != theirs:
            arms = f"arms {before[unit]['arm']} and {after[unit]['arm']}"
            raise UserError(
                f"clip {unit[0]}: {arms} cannot be compared ({first_difference(theirs, ours)}); "
                "run both under one recipe, apart from the method"
            )
    clips = {clip for clip, _ in after} & {clip for clip, _ in before}
    if clips and not common:
        seeds = [sorted({seed for _, seed in units}) for units in (after, before)]
        raise UserError(
            f"the seeds are {seeds[0]} in one arm and {seeds[1]} in the other; compare runs that share a seed"
        )
    return Pairs(
        {unit: after[unit] for unit in common},
        {unit: before[unit] for unit in common},
        tuple(sorted(before.keys() - after.keys())),
        tuple(sorted(after.keys() - before.keys())),
    )


def _by_unit(results: Iterable[Result]) -> dict[Unit, Result]:
    found: dict[Unit, Result] = {}
    for result in results:
        unit = result["clip"], result["seeds"]["recipe"]
        if unit in found:
            raise UserError(
                f"clip {unit[0]}: arm {result['arm']} has two results with the seed {unit[1]}; leave out one of the runs"
            )
        found[unit] = result
    return found


def _shared(result: Result) -> dict[str, Any]:
    """What shapes a video except the method; the settings come first because they say more than their key."""
    return {
        "protocol": result.get("settings", {}).get("protocol"),
        "protocol key": result["keys"]["protocol"],
        "video": result["keys"]["clip"],
        "caption": result["caption"],
        "start": result["start"],
        "seeds": result["seeds"],
    }
