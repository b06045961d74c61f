"""`vidtta decide`: which of the plan's four outcomes each arm of a run has, and the recipe to run next.

For the primary score, signed so that more is better, of the paired differences to the baseline (statistics/README.md):

    improvement   the interval lies above 0, the mean is at least `smallest`, and the win rate at least `win_rate`
    degradation   the interval lies below 0 and the mean is at most -`smallest`
    mixed         neither, and at least `mixed_share` of the clips gain `smallest` and as many lose it. With several samples or seeds a
                  clip, the clips must also differ by more than the sampler's noise does; with one that cannot be told, and is said
    none          neither of these. Where the run could not have shown `smallest`, that is said: it is then no evidence of absence
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from .compare import SCORES, Compared, compare_arms, read_results
from .errors import UserError
from .statistics import variance_components
from .statistics.pairing import HIGHER_IS_BETTER

Outcome = Literal["improvement", "none", "degradation", "mixed"]
NEXT: dict[Outcome, str] = {
    "improvement": "06_lora and 07_final_layer (is less enough?), then 08_method_comparison",
    "none": "02_hyperparameter_search, then 03_diagnostic_aggressive",
    "degradation": "04_regularized_few_step, 04_regularized_l2 and 04_regularized_ewc",
    "mixed": "the same recipe with samples=10; then 05_adaptive (which clips gain?)",
}


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What counts; overrides are KEY=VALUE."""

    metric: str = "psnr"
    """The primary score: psnr, ssim or lpips."""
    smallest: float = 0.1
    """The smallest mean difference that matters, in the score's unit."""
    win_rate: float = 0.6
    """Share of clips that a clear improvement wins."""
    mixed_share: float = 0.25
    """Share of clips that must gain, and share that must lose, `smallest` or more."""


@dataclass(frozen=True)
class Decision:
    """An outcome and the sentences that support it."""

    outcome: Outcome
    reasons: tuple[str, ...]


def parse_thresholds(overrides: Sequence[str]) -> Thresholds:
    """Thresholds from `key=value`. Raises UserError in one sentence."""
    thresholds = Thresholds()
    known = [field.name for field in fields(Thresholds)]
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            raise UserError(f"threshold {text}: should read KEY=VALUE with a key of {', '.join(known)}")
        if key == "metric":
            if value not in SCORES:
                raise UserError(f"threshold metric: should be one of {', '.join(SCORES)}, was {value!r}")
            thresholds = replace(thresholds, metric=value)
            continue
        try:
            number = float(value)
        except ValueError as error:
            raise UserError(f"threshold {key}: should be a number, was {value!r}") from error
        if not 0 < number < float("inf"):
            raise UserError(f"threshold {key}: should be positive and finite, was {value}")
        thresholds = replace(thresholds, **{key: number})
    return thresholds


def decide_arm(row: Compared, thresholds: Thresholds) -> Decision | None:
    """The outcome of one arm; None where it shares no clip with the baseline, or a result lacks the score."""
    found, values = row.scores[thresholds.metric], row.pairs.differences(thresholds.metric)
    if found is None or not values:
        return None
    sign = 1 if thresholds.metric in HIGHER_IS_BETTER else -1
    ends = None if found.low is None or found.high is None else sorted((sign * found.low, sign * found.high))
    mean, small = sign * found.mean, thresholds.smallest
    means = [sign * sum(one) / len(one) for one in values.values()]
    gain, loss = (sum(s * value >= small for value in means) / len(means) for s in (1, -1))
    sampled = len(values) > 1 and max(map(len, values.values())) > 1
    parts = variance_components(values) if sampled else None
    said = [f"gain of at least {small:g} on {gain:.0%} of the clips, loss on {loss:.0%}"]
    if parts:
        said.append(
            f"standard deviation from clip to clip {parts.between_clips**0.5:.3g}, from sample to sample {parts.sampling**0.5:.3g}"
        )
    outcome: Outcome = "none"
    if ends and ends[0] > 0 and mean >= small and found.win_rate >= thresholds.win_rate:
        outcome = "improvement"
    elif ends and ends[1] < 0 and mean <= -small:
        outcome = "degradation"
    elif min(gain, loss) >= thresholds.mixed_share and (parts is None or parts.between_clips > parts.sampling):
        outcome = "mixed"
        if parts is None:
            said.append("one sample a clip cannot tell this from the sampler's noise: give samples=10")
    if outcome == "none":
        if found.smallest_detectable is None:
            said.append("one independent clip has no interval, so it shows nothing")
        elif found.smallest_detectable > small:
            said.append(
                f"this many clips could have shown {found.smallest_detectable:.3g} and no less, so this is no evidence of absence: "
                "take more clips"
            )
    if found.warning:
        said.append(found.warning)
    return Decision(outcome, tuple(said))


def decide(root: Path, overrides: Sequence[str]) -> int:
    """Print the outcome of every arm of a run; returns the exit status. Raises UserError as `vidtta compare` does."""
    thresholds = parse_thresholds(overrides)
    for line in decision_lines(compare_arms({root: read_results(root)}), thresholds):
        print(line)
    return 0


def decision_lines(compared: Sequence[Compared], thresholds: Thresholds) -> Iterator[str]:
    """What `decide` prints."""
    settings = ", ".join(f"{field.name}={getattr(thresholds, field.name)}" for field in fields(Thresholds))
    yield f"thresholds: {settings}"
    for row in compared:
        decision = decide_arm(row, thresholds)
        if decision is None:
            yield f"{row.arm}: no clip in common with the baseline, or no {thresholds.metric}"
            continue
        yield f"{row.arm}: {decision.outcome}"
        for score, (name, digits) in SCORES.items():
            if found := row.scores[score]:
                primary = ", primary" if score == thresholds.metric else ""
                yield f"  {name} {found.text(digits)}, better on {found.win_rate:.0%} of {found.n} clips{primary}"
        for reason in decision.reasons:
            yield f"  {reason}"
        yield f"  next: {NEXT[decision.outcome]}"
