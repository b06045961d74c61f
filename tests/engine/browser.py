"""A headless Chromium for tests: the system's, or the one that Playwright has downloaded; tests are skipped where there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A Playwright browser; skips the calling test where none can be started."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        found = next((path for name in NAMES if (path := shutil.which(name))), None)
        if found is None and not Path(started.chromium.executable_path).exists():
            pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path, and playwright has none")
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"] if root else [])
        try:
            yield browser
        finally:
            browser.close()
