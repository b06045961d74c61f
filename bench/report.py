"""How large a report of 1,941 clips is, how long it takes to make, and how soon its page answers to a click.

Run: python -m vidtta.bench.report [--clips 1941] [--keep DIR]

The results are made up (bench/synthetic_run.py): seven arms, ten categories, all scores with their frames, no videos. The page is
opened from disk in a headless Chromium, whose path Playwright or the system knows, three times; each time by the median:
`interactive` is when the page's own scripts have run and tables sort, `drawn` when the first chart is on the screen, `sorted` how
long a click on a column takes. Exits with 1 for a page above 15 MB.
"""

import argparse
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from .synthetic_run import write_synthetic_run

LARGEST = 15_000_000
"""Bytes of a page."""
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=1941)
    parser.add_argument("--keep", type=Path, help="where the run is written and stays; else a folder that is removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.keep or Path(folder) / "run"
        if not root.exists():
            write_synthetic_run(root, arguments.clips)
        return measure(root)


def measure(root: Path) -> int:
    """Print the figures of one run; returns the exit status."""
    from ..engine.report import make_report

    start = time.perf_counter()
    make_report([root])
    seconds = time.perf_counter() - start
    page = root / "analysis_report.html"
    size, memory = page.stat().st_size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"made in {seconds:.1f} s, {size / 1e6:.1f} MB (allowed {LARGEST / 1e6:.0f}), peak memory {memory:.2f} GiB")
    for name, milliseconds in browse(page).items():
        print(f"{name}: {milliseconds:.0f} ms")
    return 1 if size > LARGEST else 0


def browse(page: Path, rounds: int = 3) -> dict[str, float]:
    """Milliseconds from opening the page, the median of fresh browser contexts; empty, and a word, where there is no browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("playwright is not installed, so the page was not opened; pip install playwright")
        return {}
    found: dict[str, list[float]] = {"interactive": [], "drawn": [], "sorted": []}
    with sync_playwright() as playwright:
        path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for _ in range(rounds):
            tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            tab.goto(page.resolve().as_uri())
            found["interactive"].append(float(tab.get_attribute("html[data-ready]", "data-ready") or "nan"))
            tab.wait_for_selector(".chart .main-svg")
            found["drawn"].append(tab.evaluate("performance.now()"))
            click = "() => { const t = performance.now(); document.querySelector('#table-categories th:nth-child(4) button').click();"
            found["sorted"].append(tab.evaluate(click + " return performance.now() - t; }"))
        browser.close()
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    sys.exit(main())
