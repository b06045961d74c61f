"""The folder for a paper: figures, tables in three forms, a row a clip, and a LaTeX file that includes them."""

from pathlib import Path

from ..files import write_text
from . import tables
from .answer import Answer
from .figures import write_figures
from .gather import Evidence
from .tables import Table, latex

HEAD = r"""% Results, made by vidtta report; compile with pdflatex in this folder, or \input the parts into a paper.
\documentclass[10pt,twocolumn]{article}
\usepackage[utf8]{inputenc}
\usepackage[T1]{fontenc}
\usepackage{booktabs,graphicx}
\begin{document}
\section{Results}
"""
COST_COLUMNS = ("adapt s", "total s", "peak GiB", "parameters")
LEFT_OUT = ("method", "d_z", "detectable")


def write_paper(evidence: Evidence, found: Answer, folder: Path) -> list[Path]:
    """Write everything into the folder; returns the files, results.tex first."""
    focus = next(arm for arm in evidence.arms if arm.label == found.arm)
    made = [
        tables.methods_table(evidence),
        tables.motion_table(evidence),
        tables.category_table(evidence, focus),
        tables.cluster_table(evidence, focus),
        tables.correlation_table(evidence),
    ]
    kept = [table for table in made if table]
    for table in kept:
        write_text(folder / f"{table.name}.csv", tables.to_csv(table))
        write_text(folder / f"{table.name}.md", tables.to_markdown(table))
    printed = [part for table in kept for part in _for_a_page(table)]
    for table in printed:
        write_text(folder / f"{table.name}.tex", tables.to_latex(table))
    write_text(folder / "clips.csv", tables.clips_csv(evidence, focus))
    captions = write_figures(evidence, focus, folder)
    write_text(folder / "results.tex", _skeleton(evidence, found, printed, captions))
    names = ["results.tex", "clips.csv"]
    names += [f"{table.name}.{form}" for table in kept for form in ("csv", "md")]
    names += [f"{table.name}.tex" for table in printed]
    names += [f"{name}.{form}" for name in captions for form in ("svg", "pdf")]
    return [folder / name for name in names]


def _for_a_page(table: Table) -> list[Table]:
    """A table as a paper has room for it: the methods' as one of quality and one of cost."""
    if table.name != "methods":
        return [table]
    cost = [k for k, (title, _) in enumerate(table.columns) if title in COST_COLUMNS]
    quality = [k for k in range(len(table.columns)) if k not in cost and table.columns[k][0] not in LEFT_OUT]
    arms = [row for row in table.rows if row[cost[0]].value is not None]  # references cost nothing
    return [
        _columns(
            table, table.rows, quality, "methods", "Difference to the baseline on the same clips, with 95 % intervals"
        ),
        _columns(table, arms, [0, *cost], "cost", "What each method costs a clip"),
    ]


def _columns(table: Table, rows: list[list[tables.Cell]], keep: list[int], name: str, caption: str) -> Table:
    return Table(name, caption, [table.columns[k] for k in keep], [[row[k] for k in keep] for row in rows])


def _skeleton(evidence: Evidence, found: Answer, printed: list[Table], captions: dict[str, str]) -> str:
    parts = [HEAD, latex(found.sentence), ""]
    parts += [latex(remark) for remark in found.remarks]
    parts += [f"\\textbf{{{latex(mark)}.}}" for mark in evidence.marks]
    parts.append("")
    for table in printed:
        parts += [
            r"\begin{table*}[t]",
            r"\centering\footnotesize",
            f"\\caption{{{latex(table.caption)}}}\\label{{tab:{table.name}}}",
            f"\\resizebox{{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}}{{!}}{{\\input{{{table.name}.tex}}}}",
            r"\end{table*}",
            "",
        ]
    for name, caption in captions.items():
        parts += [
            r"\begin{figure}[t]",
            r"\centering",
            f"\\includegraphics[width=\\linewidth]{{{name}.pdf}}",
            f"\\caption{{{latex(caption)}}}\\label{{fig:{name.replace('_', '-')}}}",
            r"\end{figure}",
            "",
        ]
    return "\n".join([*parts, r"\end{document}", ""])
