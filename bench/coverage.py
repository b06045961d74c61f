"""How often intervals for a mean paired difference hold the true one, by simulation.

Run: python -m vidtta.bench.coverage [--trials 2000] [--resamples 1000]

Differences are drawn from distributions of known mean and unit variance: normal; skewed (lognormal, skewness 6.2); heavy-tailed
(Student's t with 3 degrees of freedom). With clusters of 5, half of the variance belongs to the cluster. For each the share of
trials whose 95 % interval holds the mean is printed, as the tables of engine/statistics/README.md; two intervals that were
considered and not chosen are made here. Needs no GPU: about a minute on one core.
"""

import argparse
from statistics import NormalDist

import numpy as np

from ..engine.statistics.bootstrap import (
    Clustered,
    bootstrap_t_interval,
    cluster,
    mean_and_error,
    resampled_moments,
    student_reach,
    widened_interval,
)

CONFIDENCE = 0.95
TAILS = np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
SIZES = (4, 8, 16, 32, 64, 200)
METHODS = ("percentile", "BCa", "bootstrap-t", "Student's t", "chosen")
LOGNORMAL_MEAN, LOGNORMAL_SD = np.exp(0.5), np.sqrt((np.e - 1) * np.e)


def draw(kind: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Values of mean 0 and variance 1."""
    if kind == "normal":
        return generator.standard_normal(shape)
    if kind == "skewed":
        return (generator.lognormal(size=shape) - LOGNORMAL_MEAN) / LOGNORMAL_SD
    return generator.standard_t(3, shape) / np.sqrt(3)


def percentile_interval(data: Clustered, resampled: np.ndarray) -> tuple[float, float]:
    """The quantiles of the resampled means."""
    low, high = data.mean + np.quantile(mean_and_error(resampled, len(data.sums))[0], TAILS)
    return float(low), float(high)


def bca_interval(data: Clustered, resampled: np.ndarray) -> tuple[float, float]:
    """Quantiles moved for bias and acceleration, the latter from the jackknife over clusters (Efron, 1987)."""
    moved = mean_and_error(resampled, len(data.sums))[0]
    normal, edge = NormalDist(), 0.5 / len(moved)
    bias = normal.inv_cdf(float(np.clip((moved < 0).mean() + (moved == 0).mean() / 2, edge, 1 - edge)))
    without = (data.sums.sum() - data.sums) / (data.sizes.sum() - data.sizes)
    influence = without.mean() - without
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    ends = [bias + normal.inv_cdf(float(tail)) for tail in TAILS]
    low, high = data.mean + np.quantile(moved, [normal.cdf(bias + z / (1 - acceleration * z)) for z in ends])
    return float(low), float(high)


def intervals(data: Clustered, seed: int, resamples: int) -> dict[str, tuple[float, float]]:
    """Every method's interval from the same resamples."""
    resampled = resampled_moments(data, seed, resamples)
    reach = student_reach(data, CONFIDENCE)
    return {
        "percentile": percentile_interval(data, resampled),
        "BCa": bca_interval(data, resampled),
        "bootstrap-t": bootstrap_t_interval(data, resampled, CONFIDENCE),
        "Student's t": (data.mean - reach, data.mean + reach),
        "chosen": widened_interval(data, resampled, CONFIDENCE),
    }


def coverage(kind: str, n: int, cluster_size: int, trials: int, resamples: int) -> dict[str, tuple[float, float]]:
    """The share of trials whose interval holds the true mean, and the interval's median width, by method."""
    generator = np.random.default_rng((n, cluster_size))
    names = np.arange(n) // cluster_size
    share = 0.5 if cluster_size > 1 else 0.0
    held: dict[str, int] = dict.fromkeys(METHODS, 0)
    widths: dict[str, list[float]] = {method: [] for method in METHODS}
    for trial in range(trials):
        own, common = draw(kind, (n,), generator), draw(kind, (names[-1] + 1,), generator)
        data = cluster(np.sqrt(1 - share) * own + np.sqrt(share) * common[names], names)
        for method, (low, high) in intervals(data, trial, resamples).items():
            held[method] += low <= 0 <= high
            widths[method].append(high - low)
    return {method: (held[method] / trials, float(np.median(widths[method]))) for method in METHODS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    for size, title in ((1, "Without clusters"), (5, "In clusters of 5")):
        print(f"\n{title}: coverage in %, median width in standard deviations of a difference\n")
        print(f"| differences | n | {' | '.join(METHODS)} |")
        print("| --- " * (2 + len(METHODS)) + "|")
        for kind in ("normal", "skewed", "heavy-tailed"):
            for n in (n for n in SIZES if n > size):  # one cluster has no interval
                found = coverage(kind, n, size, arguments.trials, arguments.resamples)
                cells = (f"{100 * share:.1f} ({width:.2f})" for share, width in found.values())
                print(f"| {kind} | {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
