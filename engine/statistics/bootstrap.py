"""Intervals for the mean of values that come in clusters, by resampling whole clusters.

Axes: R resamples, G clusters. A cluster counts by its sum and its size; values without clusters are clusters of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .student import t_quantile

MOST_AT_ONCE = 4_000_000  # numbers in a block of resamples, to bound memory


@dataclass(frozen=True)
class Clustered:
    """Values by cluster. sums, sizes: [G] float64."""

    sums: np.ndarray
    sizes: np.ndarray

    @property
    def mean(self) -> float:
        """Over values, not over clusters."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def moments(self) -> np.ndarray:
        """What the mean of a resample, counted from `mean`, and its standard error follow from; [G, 5]."""
        s, n = self.sums - self.mean * self.sizes, self.sizes
        s[np.abs(s) <= 1e-12 * np.abs(self.sums).max()] = 0  # equal values: what is left is rounding
        return np.stack((s, n, s * s, s * n, n * n), axis=1)


def cluster(values: np.ndarray, clusters: np.ndarray | None = None) -> Clustered:
    """Sum values [n] by their clusters' names [n]; without names each value is its own cluster."""
    if clusters is None:
        return Clustered(values, np.ones(len(values)))
    _, index = np.unique(clusters, return_inverse=True)
    return Clustered(np.bincount(index, values), np.bincount(index).astype(float))


def mean_and_error(moments: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and cluster-robust standard error from summed moments [..., 5] of `count` clusters.

    With s_g and n_g the sum and size of cluster g: mean = sum s_g / sum n_g, and its standard error is
    sqrt(G / (G - 1) sum (s_g - mean n_g)^2) / sum n_g, which is sd / sqrt(n) for clusters of one. Source: Cochran,
    "Sampling techniques", 3rd ed., 1977, section 9A.2 (whole clusters of unequal size, without the finite correction).
    """
    s, n, ss, sn, nn = np.moveaxis(moments, -1, 0)
    mean = s / n
    residual = ss - 2 * mean * sn + mean**2 * nn
    residual = np.where(residual > 1e-12 * ss, residual, 0)  # one cluster drawn again and again: rounding alone
    return mean, np.sqrt(residual * count / (count - 1)) / n


def standard_error(data: Clustered) -> float:
    """Of the mean; there must be two clusters."""
    return float(mean_and_error(data.moments.sum(0), len(data.sums))[1])


def resampled_moments(data: Clustered, seed: int, resamples: int) -> np.ndarray:
    """Summed moments of `resamples` draws of G clusters with replacement, [R, 5]; the same seed draws the same ones."""
    return np.concatenate([counts @ data.moments for counts in _counts(len(data.sums), seed, resamples)])


def _counts(clusters: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each cluster is drawn in each resample, in blocks [r, G]."""
    generator = np.random.default_rng(seed)
    block = max(1, MOST_AT_ONCE // clusters)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(float)


def student_reach(data: Clustered, confidence: float) -> float:
    """How far Student's t interval reaches to either side of the mean; exact for normal values without clusters."""
    return t_quantile((1 + confidence) / 2, len(data.sums) - 1) * standard_error(data)


def bootstrap_t_interval(data: Clustered, resampled: np.ndarray, confidence: float) -> tuple[float, float]:
    """The studentised bootstrap: [mean - q_high error, mean - q_low error], q the quantiles of (mean* - mean) / error*.

    A resample whose values are all equal has error* = 0 and an infinite quotient; where these are so many that a
    quantile is infinite, so is that end. Source: Efron & Tibshirani, "An introduction to the bootstrap", 1993, section 12.5.
    """
    error = standard_error(data)
    moved, errors = mean_and_error(resampled, len(data.sums))
    quotient = np.zeros(len(moved))
    with np.errstate(divide="ignore"):
        np.divide(moved, errors, out=quotient, where=np.abs(moved) > 1e-9 * error)
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    low, high = np.quantile(quotient, tails, method="nearest")  # interpolating with infinity would give NaN
    return data.mean - float(high) * error, data.mean - float(low) * error


def widened_interval(data: Clustered, resampled: np.ndarray, confidence: float) -> tuple[float, float]:
    """The bootstrap-t interval, widened where Student's t reaches farther; an end that would be infinite is Student's.

    Bootstrap-t follows skewed values; Student's t is exact for normal ones and errs on the wide side for heavy tails.
    README.md beside this file has the coverage of each.
    """
    reach = student_reach(data, confidence)
    low, high = bootstrap_t_interval(data, resampled, confidence) if reach else (data.mean, data.mean)
    return (
        min(low, data.mean - reach) if np.isfinite(low) else data.mean - reach,
        max(high, data.mean + reach) if np.isfinite(high) else data.mean + reach,
    )
