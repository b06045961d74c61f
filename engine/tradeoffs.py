"""What `vidtta compare` and `vidtta decide` say of arms against each other: placebos, equal time, and the front of quality against cost.

Seconds are those of encoding, adapting, sampling and decoding a clip; reading and scoring cost every arm the same.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .arms import PLACEBOS, Placebo
from .files import sha256_json
from .statistics import PairedDifference, pair_results
from .statistics.pairing import HIGHER_IS_BETTER, Result
from .statistics.pareto import pareto_front

if TYPE_CHECKING:
    from .compare import Compared

PHASES = ("encode", "adapt", "sample", "decode")


def method_key(row: "Compared") -> str:
    """Equal for an arm and its placebos, and for nothing else."""
    settings = next(iter(row.pairs.treated.values()))["settings"]
    return sha256_json([settings["method"], settings.get("adaptation"), settings.get("gate")])


def placebo_of(row: "Compared") -> Placebo | None:
    """other_clip or random, None for a method itself."""
    return next((result["settings"].get("placebo") for result in row.pairs.treated.values()), None)


def placebos(row: "Compared", compared: Sequence["Compared"]) -> dict[Placebo, "Compared"]:
    """The placebos of an arm that share clips with the baseline, by kind."""
    found = {
        placebo_of(other): other for other in compared if other.pairs.treated and method_key(other) == method_key(row)
    }
    return {kind: found[kind] for kind in PLACEBOS if kind in found}


def against(row: "Compared", other: "Compared", score: str) -> PairedDifference | None:
    """The paired difference of an arm to another one, on the clips that both have; None where there are none."""
    return pair_results(row.pairs.treated.values(), other.pairs.treated.values()).compare(score)


def beats(found: PairedDifference, score: str) -> bool:
    """Whether the interval of a difference lies on the better side of zero."""
    end = found.low if score in HIGHER_IS_BETTER else None if found.high is None else -found.high
    return end is not None and end > 0


def seconds_a_clip(results: Sequence[Result]) -> float | None:
    """Mean over results; None where one lacks a phase."""
    spent = [result["cost"]["seconds"] for result in results]
    if not spent or any(phase not in one for one in spent for phase in PHASES):
        return None
    quantised = sum(one.get("quantise", 0.0) for one in spent)  # a phase of float8 alone
    return (sum(one[phase] for one in spent for phase in PHASES) + quantised) / len(spent)


def peak_gib(results: Sequence[Result]) -> float | None:
    """Mean over results of the peak of memory, GiB; None where one lacks it."""
    peaks = [result["cost"].get("peak_memory_bytes") for result in results]
    return sum(peaks) / len(peaks) / 2**30 if peaks and None not in peaks else None


def front_lines(compared: Sequence["Compared"], score: str, name: str) -> Iterator[str]:
    """Which arms are on the front of a score against time, and against memory; the baseline counts, placebos do not."""
    sign = 1 if score in HIGHER_IS_BETTER else -1
    rows = [row for row in compared if row.scores[score] and placebo_of(row) is None]
    for unit, what, cost in (("s", "time", seconds_a_clip), ("GiB", "memory", peak_gib)):
        points: dict[str, tuple[float, float]] = {}
        for row in rows:
            spent, found = cost([*row.pairs.treated.values()]), row.scores[score]
            if spent is not None and found is not None:
                points[row.arm] = (spent, sign * found.mean)
        base = cost([*rows[0].pairs.baseline.values()]) if rows else None
        if not points or base is None:
            continue
        points["no adaptation"] = (base, 0.0)
        front = [f"{arm} ({points[arm][0]:.1f} {unit}, {sign * points[arm][1]:+.2f})" for arm in pareto_front(points)]
        behind = sorted(set(points) - set(pareto_front(points)))
        yield f"front of {name} against {what} a clip: {', '.join(front)}" + (
            f"; behind it: {', '.join(behind)}" if behind else ""
        )


def equal_time_lines(compared: Sequence["Compared"], score: str, name: str) -> Iterator[str]:
    """Each arm that samples more instead of adapting, against the adapting arm whose time a clip is nearest to its own."""
    timed = [(row, seconds_a_clip([*row.pairs.treated.values()])) for row in compared if placebo_of(row) is None]
    adapting = [(row, spent) for row, spent in timed if spent is not None and _kind(row) != "more_sampling"]
    for row, spent in timed:
        if spent is None or _kind(row) != "more_sampling" or not adapting:
            continue
        own = spent
        other, its = min(adapting, key=lambda pair: abs(pair[1] - own))
        if found := against(other, row, score):
            verdict = "it is worth its time" if beats(found, score) else "it is not shown to be worth its time"
            yield (
                f"{other.arm} ({its:.1f} s a clip) against the same time in more sampling, {row.arm} ({spent:.1f} s): "
                f"{found.text(2)} {name.partition(' ')[2]}".rstrip()
                + f", {verdict}"
            )


def _kind(row: "Compared") -> str:
    return next((result["settings"]["method"]["kind"] for result in row.pairs.treated.values()), "")
