"""How much of a score's spread comes from the clips and how much from the sampler's noise."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VarianceComponents:
    """Variances in the score's squared unit; clips and values: how many there were."""

    clips: int
    values: int
    between_clips: float
    """Variance of the clips' true means."""
    sampling: float
    """Variance between sampling seeds on one clip."""

    @property
    def clip_share(self) -> float | None:
        """The intraclass correlation: the share of the clips in the variance of one value, in [0, 1]; None if nothing varies."""
        total = self.between_clips + self.sampling
        return self.between_clips / total if total else None

    def standard_error(self, clips: int, seeds: int) -> float:
        """That of a mean over so many clips with so many seeds each: sqrt(between / clips + sampling / (clips seeds))."""
        return math.sqrt(self.between_clips / clips + self.sampling / (clips * seeds))


def variance_components(values: Mapping[str, Sequence[float]]) -> VarianceComponents:
    """Separate the two from the values of each clip, one a sampling seed, by the one-way random-effects analysis of variance.

    With k clips of n_i values (N in all), means m_i and grand mean m: MSW = sum_ij (y_ij - m_i)^2 / (N - k),
    MSB = sum_i n_i (m_i - m)^2 / (k - 1), n0 = (N - sum n_i^2 / N) / (k - 1); sampling = MSW, between = max(0, (MSB - MSW) / n0).
    Source: Searle, Casella, McCulloch, "Variance components", 1992, section 3.6 (unbalanced data).
    Raises ValueError for fewer than two clips, or if no clip has two values.
    """
    groups = [np.asarray(v, dtype=float) for v in values.values()]
    sizes = np.array([len(group) for group in groups], dtype=float)
    k, total = len(groups), int(sizes.sum())
    if k < 2 or total <= k or sizes.min() < 1:
        raise ValueError(f"{k} clips with {total} values; it takes two clips, and two values on one of them")
    means = np.array([group.mean() for group in groups])
    within = sum(float(((g - m) ** 2).sum()) for g, m in zip(groups, means, strict=True)) / (total - k)
    grand = (sizes @ means) / total
    between = float(sizes @ (means - grand) ** 2) / (k - 1)
    n0 = (total - (sizes**2).sum() / total) / (k - 1)
    return VarianceComponents(k, total, max(0.0, (between - within) / n0), within)
