"""`vidtta decide`: which of the plan's four outcomes each arm of a run has, and the recipe to run next.

For the primary score, signed so that more is better, of the paired differences to the baseline (statistics/README.md):

    improvement   the interval lies above 0, the mean is at least `smallest`, and the win rate at least `win_rate`
    degradation   the interval lies below 0 and the mean is at most -`smallest`
    mixed         neither, and at least `mixed_share` of the clips gain `smallest` and as many lose it. With several samples or seeds a
                  clip, the clips must also differ by more than the sampler's noise does; with one that cannot be told, and is said
    none          neither of these. Where the run could not have shown `smallest`, that is said: it is then no evidence of absence

An improvement must also beat the arm's placebos, where the run has them: adapted on another clip, and changed at random by an equal norm.
The interval of the paired difference to each must lie above 0; else the outcome is none, and it is said which placebo did as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from .arms import PLACEBOS
from .compare import SCORES, Compared, compare_arms, read_results
from .errors import UserError
from .statistics import variance_components
from .statistics.pairing import HIGHER_IS_BETTER
from .tradeoffs import against, beats, placebo_of, placebos

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


def decide_arm(row: Compared, thresholds: Thresholds, compared: Sequence[Compared] = ()) -> Decision | None:
    """The outcome of one arm; None where it shares no clip with the baseline, or a result lacks the score. compared: all arms of
    the run, among which its placebos are looked for."""
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
        better, sentences = _beside_placebos(row, thresholds.metric, compared)
        outcome = "improvement" if better else "none"
        said += sentences
    elif ends and ends[1] < 0 and mean <= -small:
        outcome = "degradation"
    elif min(gain, loss) >= thresholds.mixed_share and (parts is None or parts.between_clips > parts.sampling):
        outcome = "mixed"
        if parts is None:
            said.append("one sample a clip cannot tell this from the sampler's noise: give samples=10")
    elif found.smallest_detectable is None:
        said.append("one independent clip has no interval, so it shows nothing")
    elif found.smallest_detectable > small:
        said.append(
            f"this many clips could have shown {found.smallest_detectable:.3g} and no less, so this is no evidence of absence: "
            "take more clips"
        )
    if found.warning:
        said.append(found.warning)
    return Decision(outcome, tuple(said))


def _beside_placebos(row: Compared, score: str, compared: Sequence[Compared]) -> tuple[bool, list[str]]:
    """Whether an arm that gains does so beyond each of its placebos, and what to say of it."""
    found = placebos(row, compared)
    better, said = True, []
    for kind, placebo in found.items():
        beside = against(row, placebo, score)
        if beside is None:
            continue
        said.append(f"against its placebo, {PLACEBOS[kind]}: {beside.text(SCORES[score][1])}")
        if not beats(beside, score):
            better, owed = False, "this clip" if kind == "other_clip" else "what was learnt"
            said[-1] += f"; not shown to be better, so the gain may not be owed to {owed}, and is no improvement"
    if compared and not found:
        said.append("no placebo ran, so this may be what any adapting brings: give placebos: [ARM]")
    return better, said


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
        if kind := placebo_of(row):
            yield f"{row.arm}: a placebo, {PLACEBOS[kind]}"
            yield from _score_lines(row, thresholds)
            continue
        decision = decide_arm(row, thresholds, compared)
        if decision is None:
            yield f"{row.arm}: no clip in common with the baseline, or no {thresholds.metric}"
            continue
        yield f"{row.arm}: {decision.outcome}"
        yield from _score_lines(row, thresholds)
        for reason in decision.reasons:
            yield f"  {reason}"
        yield f"  next: {NEXT[decision.outcome]}"


def _score_lines(row: Compared, thresholds: Thresholds) -> Iterator[str]:
    for score, (name, digits) in SCORES.items():
        if found := row.scores[score]:
            primary = ", primary" if score == thresholds.metric else ""
            yield f"  {name} {found.text(digits)}, better on {found.win_rate:.0%} of {found.n} clips{primary}"
