"""`vidtta compare`: every arm of some runs against the baseline of the same protocol, with intervals."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import sha256_json
from .rundir import first_difference, read_json
from .statistics import PairedDifference, Pairs, holm, pair_results, variance_components
from .statistics.pairing import Result, Unit
from .tradeoffs import equal_time_lines, front_lines

SCORES = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM", 4), "lpips": ("LPIPS", 4)}
MOST_NAMED = 5  # clips in a sentence


@dataclass(frozen=True)
class Compared:
    """One arm against the baseline. scores: by score name, None where there is no pair or a result lacks it."""

    arm: str
    pairs: Pairs
    scores: dict[str, PairedDifference | None]

    @property
    def adapt_seconds(self) -> float:
        """Mean over clips and seeds."""
        seconds = [result["cost"]["seconds"]["adapt"] for result in self.pairs.treated.values()]
        return sum(seconds) / len(seconds)


def compare(roots: list[Path]) -> int:
    """Print the comparison of the arms in these run directories; returns the exit status.

    Raises UserError for a folder that holds no results, for runs of different protocols (seeds apart), for results that do
    not pair, and where there is no baseline.
    """
    found = {root: read_results(root) for root in roots}
    compared = compare_arms(found)
    print_comparison(compared)
    for mark in dict.fromkeys(mark for results in found.values() for result in results for mark in result["marks"]):
        print(f"NOTE: {mark}")
    for root in roots:
        if failures := len(list(root.glob("arms/*/clips/*/failure.json"))):
            print(f"NOTE: {root}: results missing: {failures}; the reasons are in arms/*/clips/*/failure.json")
    return 0


def read_results(root: Path, keep: Callable[[dict[str, Any]], Result] = lambda result: result) -> list[Result]:
    """Every finished result of a run directory, in the order of arms and clips; of each, what `keep` returns."""
    results = (read_json(path) for path in sorted(root.glob("arms/*/clips/*/result.json")))
    finished: list[Result] = [keep(result) for result in results if result is not None]
    if not finished:
        raise UserError(f"{root}: no finished result lies in it; give the output_dir of a run")
    return finished


def compare_arms(found: dict[Path, list[Result]]) -> list[Compared]:
    """Each arm against the baseline of its own run, else of another one; runs that differ in the seed alone are one arm's seeds."""
    _refuse_other_protocols(found)
    baselines: dict[Path, dict[Unit, Result]] = {}
    arms: dict[str, list[tuple[Path, Result]]] = {}
    for root, results in found.items():
        for result in results:
            if result["settings"]["method"]["kind"] == "none":
                baselines.setdefault(root, {})[result["clip"], result["seeds"]["recipe"]] = result
            else:
                arms.setdefault(sha256_json(_without_seed(result["settings"])), []).append((root, result))
    if not baselines:
        raise UserError(f"{_names(found)}: no arm of kind none, so there is no baseline; add a run that has one")
    if not arms:
        raise UserError(f"{_names(found)}: the baseline is the only arm; add a run with a method")
    names = [treated[0][1]["arm"] for treated in arms.values()]
    compared = []
    for name, treated in zip(names, arms.values(), strict=True):
        own = dict.fromkeys(root for root, _ in treated)
        baseline: dict[Unit, Result] = {}
        for root in sorted(baselines, key=lambda root: root in own):  # one's own run comes last and stays
            baseline |= baselines[root]
        pairs = pair_results([result for _, result in treated], baseline.values())
        scores = {score: pairs.compare(score) for score in SCORES}
        label = name if names.count(name) == 1 else f"{treated[0][0]}: {name}"  # one name, other settings
        compared.append(Compared(label, pairs, scores))
    return compared


def print_comparison(compared: list[Compared]) -> None:
    """A table of differences to the baseline that fits 80 columns, then what should be known of them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    title = "difference to the baseline on the same clips: mean, 95 % interval"
    table = Table(title=title, box=box.HORIZONTALS, show_lines=True, pad_edge=False)
    table.add_column("arm", overflow="fold")
    for head in ("", "difference", "interval", "wins", "p, Holm"):
        table.add_column(head, no_wrap=True, justify="right" if head else "left")
    p_values = {
        score: holm({str(i): found.p_value for i, row in enumerate(compared) if (found := row.scores[score])})
        for score in SCORES
    }
    for i, row in enumerate(compared):
        lines = []
        for score, (name, digits) in SCORES.items():
            found = row.scores[score]
            if found is None:
                lines.append((name, "-", "-", "-", "-"))
                continue
            mean, _, interval = found.text(digits).partition(" ")
            lines.append((name, mean, interval or "-", f"{found.win_rate:.0%}", _probability(p_values[score][str(i)])))
        table.add_row(f"{row.arm}\n{_clips(row)}", *("\n".join(column) for column in zip(*lines, strict=True)))
    console.print(table)
    said: dict[str, list[str]] = {}
    for row in compared:
        for sentence in _remarks(row):
            said.setdefault(sentence, []).append(row.arm)
    for sentence, arms in said.items():
        console.print(f"{', '.join(arms)}: {sentence}", soft_wrap=True)
    name, _ = SCORES["psnr"]
    for sentence in (*equal_time_lines(compared, "psnr", name), *front_lines(compared, "psnr", name)):
        console.print(sentence, soft_wrap=True)


def _probability(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _clips(row: Compared) -> str:
    psnr = row.scores["psnr"]
    if psnr is None:
        return "no clip in common"
    groups = "" if psnr.clusters == psnr.n else f"\ngroups: {psnr.clusters}"
    return f"clips: {psnr.n}{groups}\nadapt {row.adapt_seconds:.2f} s"


def _remarks(row: Compared) -> Iterable[str]:
    """What a reader should know beside the numbers, a sentence each."""
    for arm, missing in (("it", row.pairs.missing_in_treated), ("the baseline", row.pairs.missing_in_baseline)):
        if missing:
            named = [f"{clip} (seed {seed})" for clip, seed in missing[:MOST_NAMED]]
            more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
            yield f"left out, because {arm} has no result for them: {', '.join(named)}{more}"
    psnr = row.scores["psnr"]
    if psnr is None:
        return
    if psnr.warning:
        yield psnr.warning
    if psnr.low is not None and psnr.high is not None and psnr.low <= 0 <= psnr.high and psnr.smallest_detectable:
        yield f"PSNR shows no difference; a true one of {psnr.smallest_detectable:.2f} dB would show in 80 % of such runs"
    values = row.pairs.differences("psnr") or {}
    if len(values) > 1 and max(map(len, values.values())) > 1:
        parts = variance_components(values)
        yield (
            f"the PSNR difference varies by {parts.between_clips**0.5:.2f} dB from clip to clip "
            f"and by {parts.sampling**0.5:.2f} dB from seed to seed on one clip"
        )
    both = [(row.pairs.baseline[unit], result) for unit, result in row.pairs.treated.items()]
    paths = [(_shaping(before), _shaping(now)) for before, now in both]
    if other := next((first_difference(*pair) for pair in paths if pair[0] != pair[1]), None):
        yield f"the baseline took another path ({other}), which may shift scores by itself"


def _shaping(result: Result) -> dict[str, Any]:
    """Of a result's paths, those that shape a baseline's video too; why they were chosen is words."""
    return {
        name: value
        for name, value in (result.get("paths") or {}).items()
        if name not in ("why", "training", "features")
    }


def _refuse_other_protocols(found: dict[Path, list[Result]]) -> None:
    (first, results), *_ = found.items()
    expected = _without_seed(results[0]["settings"])["protocol"]
    for root, results in found.items():
        for result in results:
            protocol = _without_seed(result["settings"])["protocol"]
            if protocol != expected:
                raise UserError(
                    f"{root}: its protocol is not that of {first} ({first_difference(expected, protocol)}); "
                    "compare runs that differ in the method or the seed alone"
                )


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"protocol": {name: value for name, value in settings["protocol"].items() if name != "seed"}}


def _names(found: dict[Path, list[Result]]) -> str:
    return ", ".join(map(str, found))
