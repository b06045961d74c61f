"""Whether one arm differs from another, and how sure that is. Needs numpy alone."""

from .paired import PairedDifference, paired_difference
from .pairing import Pairs, pair_results
from .permutation import holm, sign_flip_p_value
from .variance import VarianceComponents, variance_components

__all__ = [
    "PairedDifference",
    "Pairs",
    "VarianceComponents",
    "holm",
    "pair_results",
    "paired_difference",
    "sign_flip_p_value",
    "variance_components",
]
