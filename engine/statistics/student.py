"""Quantiles of Student's t distribution, so that no library is needed for them."""

import math
from functools import lru_cache

import numpy as np


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t at `probability` in (0, 1), for a whole number of degrees of freedom.

    The distribution function is a finite sum in theta = atan(t / sqrt(degrees)) (Abramowitz & Stegun, "Handbook of
    mathematical functions", 1964, 26.7.3 and 26.7.4), inverted by bisection; exact to about 1e-12 of the value.
    """
    assert 0 < probability < 1 <= degrees, (probability, degrees)
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    below, above = 0.0, math.pi / 2
    for _ in range(60):
        middle = (below + above) / 2
        if _within(middle, degrees) < 2 * probability - 1:
            below = middle
        else:
            above = middle
    return math.sqrt(degrees) * math.tan(below)


def _within(theta: float, degrees: int) -> float:
    """The probability of lying between -t and t."""
    odd = degrees % 2
    steps = np.arange(2 + odd, degrees - 1, 2)  # each term is the one before times (k - 1) / k cos^2
    terms = np.cumprod([1.0, *((steps - 1) / steps * math.cos(theta) ** 2)])
    if odd:
        series = math.cos(theta) * terms.sum() if degrees > 1 else 0.0
        return 2 / math.pi * (theta + math.sin(theta) * series)
    return math.sin(theta) * terms.sum()
