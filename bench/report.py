"""How large a report of 1,941 clips is, how long it takes to make, and how soon its page answers to a click.

Run: python -m vidtta.bench.report [--clips 1941] [--keep DIR] [--out FILE.json]       (no GPU; --check: 20 clips)

The results are made up (bench/synthetic_run.py): seven arms, ten categories, all scores with their frames, no videos. The page is
opened from disk in a headless Chromium, whose path Playwright or the system knows, three times; each time by the median:
`interactive` is when the page's own scripts have run and tables sort, `drawn` when the first chart is on the screen, `sorted` how
long a click on a column takes. A page above 15 MB is an error.
"""

import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import suite
from .suite import Row
from .synthetic_run import write_synthetic_run

LARGEST = 15_000_000
"""Bytes of a page."""
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@dataclass
class Page:
    """A run whose report is made and opened."""

    root: Path

    @property
    def file(self) -> Path:
        return self.root / "analysis_report.html"

    @cached_property
    def opened(self) -> dict[str, list[float]]:
        """Milliseconds from opening the page, of each round."""
        return browse(self.file)


def make(page: Page) -> Row:
    """Make the report of the run."""
    from ..engine.report import make_report

    start = time.perf_counter()
    make_report([page.root])
    milliseconds = 1e3 * (time.perf_counter() - start)
    size = page.file.stat().st_size
    if size > LARGEST:
        raise ValueError(f"the page has {size / 1e6:.1f} MB, allowed are {LARGEST / 1e6:.0f}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"ms": milliseconds, "peak_gib": memory, "page_bytes": size}


def opening(name: str) -> Callable[[Page], Row]:
    """What the browser measured under a name."""

    def run(page: Page) -> Row:
        times = page.opened[name]
        return {"ms": statistics.median(times), "times": times}

    return run


ROWS: dict[str, Callable[[Page], Row]] = {
    "report make": make,
    **{f"report {name}": opening(name) for name in ("interactive", "drawn", "sorted")},
}


def main() -> None:
    parser = suite.parser("report", __doc__, minutes=10.0)
    parser.add_argument("--clips", type=int, help="of the run; by default 1941, as a check 20")
    parser.add_argument("--keep", type=Path, help="where the run is written and stays; else a folder that is removed")
    arguments = parser.parse_args()
    names = suite.chosen(list(ROWS), arguments.only)
    if arguments.list:
        print("\n".join(names))
        return
    import torch

    from . import record

    about = record.environment(torch.device("cpu"), arguments.commit)

    def write(rows: list[Row]) -> None:
        if arguments.out:
            record.write(arguments.out, "report", about, rows)

    with tempfile.TemporaryDirectory() as folder:
        root = arguments.keep or Path(folder) / "run"
        if not root.exists():
            write_synthetic_run(root, arguments.clips or (20 if arguments.check else 1941))
        suite.finish(suite.run(ROWS, names, Page(root), 60 * arguments.minutes, write))


def browse(page: Path, rounds: int = 3) -> dict[str, list[float]]:
    """Milliseconds from opening the page, in fresh browser contexts; raises Absent where there is no browser."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise suite.Absent("playwright is not installed; pip install playwright") from error
    found: dict[str, list[float]] = {"interactive": [], "drawn": [], "sorted": []}
    with sync_playwright() as playwright:
        path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            raise suite.Absent("no Chromium can be started; playwright install chromium") from error
        for _ in range(rounds):
            tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            tab.goto(page.resolve().as_uri())
            found["interactive"].append(float(tab.get_attribute("html[data-ready]", "data-ready") or "nan"))
            tab.wait_for_selector(".chart .main-svg")
            found["drawn"].append(tab.evaluate("performance.now()"))
            click = "() => { const t = performance.now(); document.querySelector('#table-categories th:nth-child(4) button').click();"
            found["sorted"].append(tab.evaluate(click + " return performance.now() - t; }"))
        browser.close()
    return found


if __name__ == "__main__":
    main()
