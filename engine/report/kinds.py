"""Clips by kind: how rich and how lively they are, which gain and lose, by category and in clusters.

Motion intensity is read off the results themselves: -PSNR between consecutive frames of the real clip (so more is livelier), which
every run has. Spatial and temporal information (ITU-T P.910) are there where the run measured them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..statistics import PairedDifference, paired_difference
from ..statistics.pairing import group_of
from .gather import Arm, Evidence

CLUSTERS = 3
FEWEST_TO_CLUSTER = 12
GAIN_NAMES = ("gain least", "in between", "gain most")
KINDS = {
    "spatial_information": ("scene complexity", "spatial information: the mean over frames of the spread of edges"),
    "temporal_information": ("temporal information", "the mean over frame pairs of the spread of their difference"),
    "motion_db": ("motion intensity", "PSNR between consecutive real frames in dB, with a minus: more is livelier"),
}
"""By name, the title and what it means."""


@dataclass(frozen=True)
class Category:
    name: str
    gain: PairedDifference
    gains: list[float]


@dataclass(frozen=True)
class Cluster:
    """Clips whose scores change alike. gain: mean by score; kinds: mean by kind; categories: its most common ones."""

    name: str
    clips: list[str]
    gain: dict[str, float]
    kinds: dict[str, float]
    categories: list[str]


def category_of(evidence: Evidence, clip: str) -> str:
    """The manifest's column `class`; empty where it has none."""
    return str(evidence.clips[clip].get("meta", {}).get("class", ""))


def kinds_of(evidence: Evidence) -> dict[str, dict[str, float]]:
    """By kind, then clip, its value; kinds that no clip has are left out."""
    found: dict[str, dict[str, float]] = {name: {} for name in KINDS}
    for clip, result in evidence.clips.items():
        for name, value in evidence.kinds.get(clip, {}).items():
            if name in found:
                found[name][clip] = value
        truth = result["scores"].get("frame_psnr_error", {}).get("truth")
        if truth is not None:
            found["motion_db"][clip] = -truth
    return {name: values for name, values in found.items() if values}


def by_category(evidence: Evidence, arm: Arm, score: str = "psnr") -> list[Category]:
    """The arm's gain in each category, the largest first; empty where clips have none."""
    gains = arm.gains(score)
    found: dict[str, list[str]] = {}
    for clip in gains:
        if name := category_of(evidence, clip):
            found.setdefault(name, []).append(clip)
    categories = []
    for name, clips in found.items():
        values = [gains[clip] for clip in clips]
        groups = [group_of(evidence.clips[clip]) or clip for clip in clips]
        better = "lower" if score == "lpips" else "higher"
        difference = paired_difference(values, [0.0] * len(values), groups, better=better, resamples=2000)
        categories.append(Category(name, difference, values))
    return sorted(categories, key=lambda one: -one.gain.mean)


def correlations(evidence: Evidence, arm: Arm, score: str = "psnr") -> dict[str, tuple[float, float, int]]:
    """Spearman's rank correlation of the gain with each kind: rho, its p-value, and the number of clips."""
    from scipy.stats import spearmanr

    gains, found = arm.gains(score), {}
    for name, values in kinds_of(evidence).items():
        clips = [clip for clip in gains if clip in values]
        pairs = np.array([[values[clip], gains[clip]] for clip in clips])
        if len(clips) > 3 and np.ptp(pairs, axis=0).min() > 0:
            told: Any = spearmanr(pairs[:, 0], pairs[:, 1])
            found[name] = float(told.statistic), float(told.pvalue), len(clips)
    return found


def clusters(evidence: Evidence, arm: Arm, seed: int = 0) -> list[Cluster]:
    """Clips clustered by how the arm changes PSNR, SSIM and LPIPS (k-means on standardised differences), those that gain least first.

    Lloyd's algorithm from k-means++ starts (Arthur & Vassilvitskii, SODA 2007) as SciPy has it, best of 10. Empty for fewer
    than 12 clips, and where nothing changes.
    """
    from scipy.cluster.vq import kmeans2

    scores = [name for name in ("psnr", "ssim", "lpips") if arm.gains(name)]
    gains = {name: arm.gains(name) for name in scores}
    clips = list(gains["psnr"]) if scores else []
    points = np.array([[gains[name][clip] for name in scores] for clip in clips])
    if len(clips) < FEWEST_TO_CLUSTER or len(np.unique(points, axis=0)) < CLUSTERS:
        return []
    points = points - points.mean(0)
    points /= np.where(points.std(0) > 0, points.std(0), 1)
    runs = [kmeans2(points, CLUSTERS, minit="++", rng=np.random.default_rng((seed, k))) for k in range(10)]
    centres, labels = min(runs, key=lambda run: float(((points - run[0][run[1]]) ** 2).sum()))
    kinds = kinds_of(evidence)
    made = []
    for name, k in zip(GAIN_NAMES, np.argsort(centres[:, 0]), strict=True):
        members = [clip for clip, label in zip(clips, labels, strict=True) if label == k]
        if members:
            made.append(
                Cluster(
                    name,
                    members,
                    {score: float(np.mean([values[clip] for clip in members])) for score, values in gains.items()},
                    {
                        kind: float(np.mean([values[clip] for clip in members if clip in values]))
                        for kind, values in kinds.items()
                        if any(clip in values for clip in members)
                    },
                    _commonest([category_of(evidence, clip) for clip in members]),
                )
            )
    return made


def _commonest(names: list[str], most: int = 3) -> list[str]:
    counted = {name: names.count(name) for name in dict.fromkeys(names) if name}
    return sorted(counted, key=lambda name: -counted[name])[:most]
