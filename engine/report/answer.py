"""Whether adapting helped, in one sentence with its interval, and what a reader must know beside it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..references import REFERENCES
from ..statistics import PairedDifference, paired_difference, variance_components
from ..statistics.pairing import group_of
from .gather import Arm, Evidence
from .names import PLACEBO_NAMES, name_of

ALPHA = 0.05


@dataclass(frozen=True)
class Answer:
    """verdict: helped, hurt or unclear; arm: the label of the arm that it is about."""

    verdict: str
    sentence: str
    arm: str
    remarks: list[str]


def answer(evidence: Evidence) -> Answer:
    """Of the method whose PSNR gains most on average; what speaks for and against it follows as remarks."""
    candidates = evidence.methods or evidence.treated
    scored = [(found.mean, arm, found) for arm in candidates if (found := arm.difference("psnr"))]
    _, arm, found = max(scored, key=lambda one: one[0])
    p = arm.p_values.get("psnr", found.p_value)
    clips = f"{found.n:,} clip{'s' if found.n > 1 else ''}"
    interval = "" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]"
    change = f"{abs(found.mean):.2f} dB"
    certain = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0) and p < ALPHA
    best = f"{arm.label}, the best of {len(candidates)} methods," if len(candidates) > 1 else arm.label
    if certain and found.mean > 0:
        verdict = "helped"
        sentence = (
            f"Adapting helped: {best} raises PSNR by {change}{interval} over the unadapted model on {clips}, "
            f"and is better on {100 * found.win_rate:.0f} % of them."
        )
    elif certain:
        verdict = "hurt"
        sentence = (
            f"Adapting hurt: even {best} lowers PSNR by {change}{interval} under the unadapted model on {clips}, "
            f"and is better on only {100 * found.win_rate:.0f} % of them."
        )
    else:
        verdict = "unclear"
        sentence = f"No clear effect: {best} changes PSNR by {found.mean:+.2f} dB{interval} on {clips}."
    return Answer(verdict, sentence, arm.label, [*_remarks(evidence, arm, found, p, verdict)])


def _remarks(evidence: Evidence, arm: Arm, found: PairedDifference, p: float, verdict: str) -> Iterator[str]:
    if interval_is_missing := found.low is None:
        yield f"{found.warning[:1].upper()}{found.warning[1:]}."
    count = sum(1 for other in evidence.treated if "psnr" in other.p_values)
    corrected = f", corrected for {count} comparisons" if count > 1 else ""
    yield f"p {'< 0.001' if p < 0.001 else f'= {p:.3f}'} by sign flips{corrected}; the interval is 95 %, for {arm.label} alone."
    if verdict == "unclear" and found.smallest_detectable:
        yield f"A true difference of {found.smallest_detectable:.2f} dB would show in 80 % of such runs; a smaller one need not."
    for placebo in (other for other in evidence.treated if other.parent == arm.label):
        if text := _beside_placebo(arm, placebo):
            yield text
    yield from _agreement(arm, found)
    yield from _beside_references(evidence, arm)
    if found.warning and not interval_is_missing:
        yield f"{found.warning[:1].upper()}{found.warning[1:]}."
    if seeds := seed_variance(arm):
        yield seeds


def _beside_placebo(arm: Arm, placebo: Arm) -> str:
    """How much of the gain belongs to the clip that was adapted on."""
    own, other = arm.gains("psnr"), placebo.gains("psnr")
    clips = [clip for clip in own if clip in other]
    if not clips or placebo.compared is None or (gain := placebo.difference("psnr")) is None:
        return ""
    first = {clip: result for (clip, _), result in reversed(arm.results.items())}
    groups = [group_of(first[clip]) or clip for clip in clips]
    rest = paired_difference([own[c] for c in clips], [other[c] for c in clips], groups)
    means = PLACEBO_NAMES.get(placebo.placebo, placebo.placebo)
    return f"Placebo, {means}: {gain.text(2)} dB. {arm.label} gains {rest.text(2)} dB beyond it."


def _agreement(arm: Arm, psnr: PairedDifference) -> Iterator[str]:
    """What SSIM and LPIPS say."""
    told = []
    for score in ("ssim", "lpips"):
        found = arm.difference(score)
        if found is None:
            continue
        better = found.mean > 0 if score != "lpips" else found.mean < 0
        sure = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
        name, unit, digits = name_of(score)
        says = "agrees" if better == (psnr.mean > 0) else "disagrees"
        told.append(f"{name} {says if sure else 'is undecided'}: {found.text(digits)}{unit}")
    if told:
        yield "; ".join(told) + "."


def _beside_references(evidence: Evidence, arm: Arm) -> Iterator[str]:
    clips = list(arm.gains("psnr"))
    ours = arm.mean(lambda result: result["scores"]["psnr"]["mean"], clips)
    held = evidence.references.get("copy_last_frame", {})
    values = [held[clip]["psnr"]["mean"] for clip in clips if clip in held]
    if ours is not None and len(values) == len(clips) and ours < (still := float(np.mean(values))):
        yield f"With {ours:.2f} dB it stays below holding the last known frame ({still:.2f} dB): {REFERENCES['copy_last_frame']} wins."


def seed_variance(arm: Arm) -> str:
    """How far the gain varies from clip to clip and from seed to seed; empty where each clip was sampled once."""
    values = (arm.compared.pairs.differences("psnr") if arm.compared else None) or {}
    if len(values) < 2 or max(map(len, values.values())) < 2:
        return ""
    parts = variance_components(values)
    return (
        f"The gain varies by {parts.between_clips**0.5:.2f} dB from clip to clip and by {parts.sampling**0.5:.2f} dB from seed "
        "to seed on one clip."
    )
