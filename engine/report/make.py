"""`vidtta report`: read runs, write the page, and on request the figures and tables of a paper."""

from pathlib import Path

from ..files import write_text
from .answer import answer
from .gather import gather
from .page import render
from .paper import write_paper
from .payload import address

PAGE = "analysis_report.html"


def make_report(roots: list[Path], out: Path | None = None, figures: Path | None = None) -> int:
    """Write the page (by default analysis_report.html in the first run) and say where; returns the exit status.

    figures: a folder for SVG, PDF, CSV, Markdown and LaTeX; none are written without it.
    Raises UserError for what `vidtta compare` refuses too.
    """
    evidence = gather(roots)
    found = answer(evidence)
    page = out or roots[0] / PAGE
    written = write_paper(evidence, found, figures) if figures else []
    write_text(page, render(evidence, found, page, {file.name: address(file, page) for file in written}))
    print(found.sentence)
    for remark in found.remarks:
        print(f"  {remark}")
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    if figures:
        print(f"figures and tables: {figures} ({len(written)} files; results.tex includes them)")
    return 0
