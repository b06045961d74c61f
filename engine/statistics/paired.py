"""The difference between two arms on the same clips, with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .bootstrap import cluster, resampled_moments, standard_error, widened_interval
from .permutation import sign_flip_p_value
from .student import t_quantile

POWER = 0.8
FEW = 32  # independent clips or groups; below, README.md shows intervals that cover clearly less than they claim


@dataclass(frozen=True)
class PairedDifference:
    """Treated minus baseline, in the score's unit. None stands for what so few clips cannot tell."""

    n: int
    """Clips."""
    clusters: int
    """Independent groups of clips; n without groups."""
    mean: float
    low: float | None
    high: float | None
    """Ends of the interval for the mean."""
    confidence: float
    standard_error: float | None
    """Of the mean, cluster-robust."""
    win_rate: float
    """Share of clips on which treated is better, ties counted half, in [0, 1]."""
    effect_size: float | None
    """Cohen's d_z: mean over standard deviation of the differences; signed as the mean, also where less is better."""
    smallest_detectable: float | None
    """The true difference that as many clips of this spread would find significant with a power of 80 %."""
    p_value: float
    """Sign-flip permutation, two-sided; for one comparison."""
    warning: str
    """Why the interval should be read with care, a sentence; empty if nothing speaks against it."""

    def text(self, digits: int) -> str:
        """The mean and its interval with signs, +0.42 [+0.10, +0.71]; the mean alone where there is no interval."""
        mean = f"{self.mean:+.{digits}f}"
        return mean if self.low is None else f"{mean} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def paired_difference(
    treated: Sequence[float],
    baseline: Sequence[float],
    clusters: Sequence[str] | None = None,
    *,
    better: Literal["higher", "lower"] = "higher",
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> PairedDifference:
    """Compare scores of the same clips in the same order, [n] each; clusters: the group of each clip, whose clips look alike.

    mean: over clips. Interval: bootstrap-t over whole clusters, widened to Student's t (see bootstrap.py). d_z: mean / sd,
    sd with n - 1 (Lakens, Frontiers in Psychology 4:863, 2013). Smallest detectable difference: (t_(1+confidence)/2 + t_0.8) standard
    errors, quantiles for clusters - 1 degrees of freedom (Bloom, "Minimum detectable effects", Evaluation Review 19(5),
    1995). The same inputs and seed give the same numbers.
    Raises ValueError for no clips, lengths that disagree, and values that are not finite.
    """
    if not 0 < len(treated) == len(baseline) == len(treated if clusters is None else clusters):
        told = "" if clusters is None else f" and {len(clusters)} clusters"
        raise ValueError(f"{len(treated)} treated and {len(baseline)} baseline values{told}; give as many of each")
    differences = np.asarray(treated, dtype=float) - np.asarray(baseline, dtype=float)
    if not np.isfinite(differences).all():
        raise ValueError("a score is NaN or infinite; scores must be finite to be compared")
    data = cluster(differences, None if clusters is None else np.asarray(clusters, dtype=str))
    n, count = len(differences), len(data.sums)
    wins = differences if better == "higher" else -differences
    low = high = error = effect_size = smallest = None
    if count > 1:
        error = standard_error(data)
        low, high = widened_interval(data, resampled_moments(data, seed, resamples), confidence)
        spread = float(differences.std(ddof=1))
        effect_size = data.mean / spread if spread > 1e-12 * np.abs(differences).max() else None
        smallest = (t_quantile((1 + confidence) / 2, count - 1) + t_quantile(POWER, count - 1)) * error
    return PairedDifference(
        n=n,
        clusters=count,
        mean=data.mean,
        low=low,
        high=high,
        confidence=confidence,
        standard_error=error,
        win_rate=float((wins > 0).mean() + (wins == 0).mean() / 2),
        effect_size=effect_size,
        smallest_detectable=smallest,
        p_value=sign_flip_p_value(data, seed, resamples),
        warning=_warning(count, "clip" if clusters is None else "group", error),
    )


def _warning(count: int, unit: str, error: float | None) -> str:
    if error is None:
        return f"only one independent {unit}, so there is no interval"
    if error == 0:
        return f"all {count} {unit}s show the same difference, so the interval has no width"
    if count < FEW:
        return f"only {count} independent {unit}s: the interval may miss the true mean more often than it says"
    return ""
