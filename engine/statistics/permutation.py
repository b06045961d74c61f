"""Whether paired differences could be chance: sign-flip permutation, and its correction for several comparisons."""

from collections.abc import Mapping

import numpy as np

from .bootstrap import MOST_AT_ONCE, Clustered


def sign_flip_p_value(data: Clustered, seed: int = 0, resamples: int = 10_000) -> float:
    """Return the two-sided p-value of a mean difference of 0, in (0, 1].

    If treated and baseline were exchangeable, every cluster's sum could as well carry the other sign: p is the share of
    sign patterns whose mean is at least as far from 0 as the one seen. All 2^G patterns where these are at most
    `resamples`, else that many drawn ones and the one seen, so that p is never 0. With clusters of one and the same
    patterns, the mean orders them as t does. Sources: Fisher, "The design of experiments", 1935, section 21; for
    clusters Canay, Romano, Shaikh, "Randomization tests under an approximate symmetry assumption", Econometrica 85(3),
    2017; for the added one Phipson & Smyth, 2010, arXiv:1603.05766.
    """
    clusters = len(data.sums)
    seen = abs(data.sums.sum()) * (1 - 1e-9)  # sums of one value in another order differ by rounding
    if 2**clusters <= resamples:
        patterns = (np.arange(2**clusters)[:, None] >> np.arange(clusters) & 1) * 2 - 1
        return float((np.abs(patterns @ data.sums) >= seen).mean())
    generator = np.random.default_rng(seed)
    block, extreme = max(1, MOST_AT_ONCE // clusters), 0
    for start in range(0, resamples, block):
        flips = generator.integers(2, size=(min(block, resamples - start), clusters), dtype=np.int8) * 2.0 - 1
        extreme += int((np.abs(flips @ data.sums) >= seen).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for the number of comparisons, under the same names.

    Sorted from small to large, the i-th of m (counted from 0) becomes max over j <= i of min(1, (m - j) p_j): to call
    significant what lies below alpha keeps the chance of one false claim or more below alpha, whatever the dependence
    between comparisons. Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6(2), 1979.
    """
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}
