"""Tables of a report: one form that the page shows and sorts, and that is written as CSV, Markdown and LaTeX."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..references import REFERENCES
from ..statistics import PairedDifference
from ..statistics.pairing import HIGHER_IS_BETTER
from . import series
from .gather import FRAME_SCORES, Arm, Evidence
from .kinds import KINDS, by_category, category_of, clusters, correlations, kinds_of
from .names import PLACEBO_NAMES, name_of

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "_": r"\_",
        "%": r"\%",
        "&": r"\&",
        "#": r"\#",
        "$": r"\$",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "Δ": r"$\Delta$",
    }
)


@dataclass(frozen=True)
class Cell:
    """value: what sorts and goes into a CSV; text: what is read; tone: better, worse, or nothing."""

    value: Any
    text: str
    tone: str = ""


NOTHING = Cell(None, "-")


@dataclass(frozen=True)
class Table:
    """name: of its files; columns: (title, what it means)."""

    name: str
    caption: str
    columns: list[tuple[str, str]]
    rows: list[list[Cell]]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which stand to the right."""
        values = [row[column].value for row in self.rows if row[column].value is not None]
        return not any(isinstance(value, str) for value in values)


def number(value: float | None, digits: int, sign: bool = False) -> Cell:
    if value is None:
        return NOTHING
    return Cell(value, f"{value:{'+' if sign else ''},.{digits}f}")


def difference(found: PairedDifference | None, score: str) -> Cell:
    """Mean and interval; better or worse where the interval leaves out zero."""
    if found is None:
        return NOTHING
    tone = ""
    if found.low is not None and found.high is not None and not found.low <= 0 <= found.high:
        tone = "better" if (found.mean > 0) == (score in HIGHER_IS_BETTER) else "worse"
    return Cell(found.mean, found.text(name_of(score)[2]), tone)


def methods_table(evidence: Evidence) -> Table:
    """Every arm and reference: absolute means over the clips that all arms finished, differences over each arm's own pairs."""
    shown = series.frame_scores(evidence)
    columns = [("arm", "the name of its folder"), ("method", "its kind"), ("clips", "pairs with the baseline")]
    for score in shown:
        title, unit, _ = name_of(score)
        unit = f" {unit}" if unit else ""
        columns.append((f"{title}{unit}", f"mean over the {len(evidence.common):,} clips that every arm finished"))
        columns.append((f"Δ {title}", "mean difference to the baseline on the same clips, with its 95 % interval"))
    columns += [
        ("wins", "share of clips with a higher PSNR than the baseline"),
        ("p", "sign flips, PSNR, Holm's correction over the arms"),
        ("d_z", "effect size of the PSNR difference: mean over standard deviation"),
        ("detectable", "the PSNR difference in dB that as many clips would find with a power of 80 %"),
        ("adapt s", "mean seconds of adaptation a clip"),
        ("total s", "mean seconds a clip: read, encode, adapt, sample, decode, score"),
        ("peak GiB", "mean peak memory of the device"),
        ("parameters", "trained numbers"),
    ]
    rows = [_reference_row(evidence, name, title, shown, len(columns)) for name, title in REFERENCES.items()]
    rows = [row for row in rows if row] + [_arm_row(evidence, arm, shown) for arm in evidence.arms]
    return Table("methods", "Quality and cost", columns, rows)


def _arm_row(evidence: Evidence, arm: Arm, shown: list[str]) -> list[Cell]:
    kind = f"placebo: {PLACEBO_NAMES.get(arm.placebo, arm.placebo)}" if arm.placebo else arm.kind
    psnr = arm.difference("psnr")
    count = psnr.n if psnr else len(arm.clips)
    row = [Cell(arm.label, arm.label), Cell(kind, kind), Cell(count, f"{count:,}")]
    for score in shown:
        mean = arm.mean(lambda result, score=score: result["scores"][score]["mean"], evidence.common)
        row += [number(mean, name_of(score)[2]), difference(arm.difference(score), score)]
    cost, p = series.cost_of(arm), arm.p_values.get("psnr")
    trained = cost["parameters"]
    return [
        *row,
        Cell(psnr.win_rate, f"{psnr.win_rate:.0%}") if psnr else NOTHING,
        Cell(p, "<0.001" if p < 0.001 else f"{p:.3f}") if p is not None else NOTHING,
        number(psnr.effect_size if psnr else None, 2, sign=True),
        number(psnr.smallest_detectable if psnr else None, 2),
        number(cost["adapt"], 2),
        number(cost["total"], 2),
        number(cost["memory"], 2),
        number(trained, 0),
    ]


def _reference_row(evidence: Evidence, name: str, title: str, shown: list[str], width: int) -> list[Cell]:
    held = evidence.references.get(name, {})
    if not evidence.common or any(clip not in held for clip in evidence.common):
        return []
    row = [Cell(title, title), Cell("reference", "reference"), number(len(held), 0)]
    for score in shown:
        values = [held[clip].get(score, {}).get("mean") for clip in evidence.common]
        mean = None if None in values else sum(values) / len(values)
        row += [number(mean, name_of(score)[2]), NOTHING]
    return row + [NOTHING] * (width - len(row))


def motion_table(evidence: Evidence) -> Table | None:
    """How each arm moves beside the truth; errors, so a negative difference is better. None where nothing was measured."""
    shown = [score for score in evidence.scores if score not in FRAME_SCORES]
    if not shown:
        return None
    columns = [("arm", "the name of its folder")]
    for score in shown:
        title, unit, _ = name_of(score)
        columns.append(
            (f"{title}{f' {unit}' if unit else ''}", "mean over the clips that every arm finished; less is better")
        )
        columns.append((f"Δ {title}", "mean difference to the baseline with its 95 % interval"))
    rows = []
    for name, title in REFERENCES.items():
        held = evidence.references.get(name, {})
        row = [Cell(title, title)]
        for score in shown:
            values = [held.get(clip, {}).get(score, {}).get("mean") for clip in evidence.common]
            mean = None if None in values or not values else sum(values) / len(values)
            row += [number(mean, name_of(score)[2]), NOTHING]
        rows.append(row)
    for arm in evidence.arms:
        row = [Cell(arm.label, arm.label)]
        for score in shown:
            mean = arm.mean(lambda result, score=score: result["scores"][score]["mean"], evidence.common)
            row += [number(mean, name_of(score)[2]), difference(arm.difference(score), score)]
        rows.append(row)
    return Table("motion", "Motion beside the truth's own", columns, rows)


def category_table(evidence: Evidence, arm: Arm) -> Table | None:
    """Which categories gain and lose, None where clips have none."""
    found = by_category(evidence, arm)
    if not found:
        return None
    columns = [
        ("category", "the manifest's column class"),
        ("clips", ""),
        ("groups", "independent groups of clips"),
        (
            "Δ PSNR dB",
            f"mean difference of {arm.label} to the baseline with its 95 % interval, not corrected for the number of categories",
        ),
        ("wins", "share of clips with a higher PSNR than the baseline"),
    ]
    rows = [
        [
            Cell(one.name, one.name),
            number(one.gain.n, 0),
            number(one.gain.clusters, 0),
            difference(one.gain, "psnr"),
            Cell(one.gain.win_rate, f"{one.gain.win_rate:.0%}"),
        ]
        for one in found
    ]
    return Table("categories", f"Categories that gain and lose by {arm.label}", columns, rows)


def cluster_table(evidence: Evidence, arm: Arm) -> Table | None:
    """Clusters of clips by improvement; None for few clips."""
    found = clusters(evidence, arm)
    if not found:
        return None
    scores, kinds = list(found[0].gain), [kind for kind in KINDS if all(kind in one.kinds for one in found)]
    columns = [("cluster", "k-means on the standardised differences"), ("clips", "")]
    columns += [(f"Δ {name_of(score)[0]}", "mean over the cluster's clips") for score in scores]
    columns += [(KINDS[kind][0], f"mean over the cluster's clips; {KINDS[kind][1]}") for kind in kinds]
    columns += [("common categories", "")]
    rows = [
        [
            Cell(one.name, one.name),
            number(len(one.clips), 0),
            *(number(one.gain[score], name_of(score)[2], sign=True) for score in scores),
            *(number(one.kinds[kind], 3) for kind in kinds),
            Cell(", ".join(one.categories), ", ".join(one.categories)) if one.categories else NOTHING,
        ]
        for k, one in enumerate(found)
    ]
    return Table("clusters", f"Clips clustered by what {arm.label} changes", columns, rows)


def correlation_table(evidence: Evidence) -> Table | None:
    """Whether richer or livelier clips gain more; None where no kind is known."""
    kinds, rows = list(kinds_of(evidence)), []
    for arm in evidence.methods:
        found = correlations(evidence, arm)
        cells = []
        for kind in kinds:
            rho, p, _ = found.get(kind, (None, None, 0))
            told = "" if p is None else f" (p {'<0.001' if p < 0.001 else f'= {p:.3f}'})"
            cells.append(NOTHING if rho is None else Cell(rho, f"{rho:+.2f}{told}"))
        rows.append([Cell(arm.label, arm.label), number(max((n for *_, n in found.values()), default=0), 0), *cells])
    columns = [("arm", ""), ("clips", "")]
    columns += [
        (
            KINDS[kind][0],
            f"Spearman's rank correlation with the PSNR difference, not corrected for their number; {KINDS[kind][1]}",
        )
        for kind in kinds
    ]
    return Table("correlations", "Rank correlation of the gain with the kind of clip", columns, rows) if kinds else None


def clips_csv(evidence: Evidence, focus: Arm) -> str:
    """A row a clip: what its manifest says, its kind, its cluster under the focus arm, and every arm's improvement."""
    kinds, shown = kinds_of(evidence), series.frame_scores(evidence)
    cluster = {clip: one.name for one in clusters(evidence, focus) for clip in one.clips}
    meta = list(dict.fromkeys(key for clip in evidence.clips.values() for key in clip.get("meta", {})))
    base = {s: evidence.baseline.by_clip(lambda r, s=s: r["scores"][s]["mean"]) for s in shown}
    gains = {(arm.label, s): arm.gains(s) for arm in evidence.treated for s in shown}
    head = ["clip", "category", "caption", *(f"meta_{key}" for key in meta), *kinds, "cluster"]
    head += [f"{evidence.baseline.label}_{s}" for s in shown] + [f"{label}_gain_{s}" for label, s in gains]
    rows = (
        [
            clip,
            category_of(evidence, clip),
            result.get("caption", ""),
            *(result.get("meta", {}).get(key, "") for key in meta),
            *(values.get(clip, "") for values in kinds.values()),
            cluster.get(clip, ""),
            *(values.get(clip, "") for values in base.values()),
            *(values.get(clip, "") for values in gains.values()),
        ]
        for clip, result in evidence.clips.items()
    )
    return _csv([head, *rows])


def to_csv(table: Table) -> str:
    return _csv([[title for title, _ in table.columns], *([_csv_value(cell) for cell in row] for row in table.rows)])


def _csv_value(cell: Cell) -> Any:
    """The number where it says all; with its interval the text."""
    return (
        cell.text
        if isinstance(cell.value, float) and ("[" in cell.text or "(" in cell.text)
        else ""
        if cell.value is None
        else cell.value
    )


def to_markdown(table: Table) -> str:
    lines = [[title for title, _ in table.columns], ["---"] * len(table.columns)]
    lines += [[cell.text for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(_markdown(text) for text in line)} |" for line in lines) + "\n"


def _markdown(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def to_latex(table: Table) -> str:
    """A tabular for booktabs, to be included between \\begin{table} and \\end{table}."""
    form = "".join("r" if table.numeric(k) else "l" for k in range(len(table.columns)))
    lines = [f"\\begin{{tabular}}{{{form}}}", "\\toprule", _latex_row(title for title, _ in table.columns), "\\midrule"]
    lines += [_latex_row(cell.text for cell in row) for row in table.rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex_row(texts: Iterable[str]) -> str:
    return " & ".join(latex(text) for text in texts) + r" \\"


def latex(text: str) -> str:
    """Text for LaTeX, every character of its own meaning taken literally; a leading minus or a bracket stays in the cell."""
    escaped = text.translate(LATEX)
    return f"{{{escaped}}}" if escaped.startswith(("[", "*")) else escaped


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
