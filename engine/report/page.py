"""The page: one HTML file that opens from disk without a network, everything inside but the videos.

Text is escaped by the template engine; numbers for the plots lie in a JSON block in which no tag can begin. A content security
policy with a nonce lets the page's own scripts run and nothing else, and lets nothing be fetched but videos beside the page.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..rundir import read_json
from . import tables
from .answer import Answer, seed_variance
from .gather import Evidence
from .payload import payload

HERE = Path(__file__).parent
SCRIPTS = ("theme.js", "tables.js", "plots.js", "charts.js", "gallery.js")
PLOTLY = "plotly-cartesian.min.js"


def render(evidence: Evidence, found: Answer, page: Path, links: dict[str, str] | None = None) -> str:
    """The page's HTML. page: where it will lie, for the addresses of videos; links: title -> address of files beside it."""
    focus = next(arm for arm in evidence.arms if arm.label == found.arm)
    data = payload(evidence, page, focus)
    first = next(iter(evidence.baseline.results.values()))
    made = [tables.methods_table(evidence), tables.motion_table(evidence)]
    kinds = [
        tables.cluster_table(evidence, focus),
        tables.correlation_table(evidence),
        tables.category_table(evidence, focus),
    ]
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = Markup("\n".join(_read(HERE / "templates" / name) for name in SCRIPTS))  # our own files, not a user's text
    plotly = Markup(_read(HERE / "vendor" / PLOTLY))
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return environment.get_template("report.html").render(
        title=" + ".join(root.resolve().name for root in evidence.roots),
        answer=found,
        evidence=evidence,
        data=_json(text),
        nonce=hashlib.sha256(text.encode()).hexdigest()[:32],
        style=Markup(_read(HERE / "templates" / "report.css")),
        script=script,
        plotly=plotly,
        tables=[table for table in made if table],
        kinds=[table for table in kinds if table],
        focus=focus,
        seeds=[(arm.label, text) for arm in evidence.methods if (text := seed_variance(arm))],
        window=first.get("window", {}),
        links=links or {},
        searches=data["searches"],
        has_steps=any(data["steps"].values()),
        has_categories=len(data["categories"]) > 1,
        has_videos=any(any(videos) for videos in data["clips"]["videos"].values()),
        runs=[_run(root) for root in evidence.roots],
        paths=_paths(evidence),
        failures=evidence.failures,
    )


def _json(text: str) -> Markup:
    """JSON for a script element: without the characters that could end it or begin a comment."""
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _run(root: Path) -> dict[str, Any]:
    """What a run directory says of itself."""

    def pretty(name: str) -> str:
        found = read_json(root / name)
        return json.dumps(found, indent=2, ensure_ascii=False) if found else "not written"

    recipe = root / "recipe.yaml"
    return {
        "name": str(root),
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "not written",
        "environment": pretty("environment.json"),
        "choices": pretty("choices.json"),
    }


def _paths(evidence: Evidence) -> list[tuple[str, str, int]]:
    """Which code paths ran: (arms, paths, results) for each distinct set of paths."""
    found: dict[str, tuple[list[str], int]] = {}
    for arm in evidence.arms:
        for result in arm.results.values():
            key = json.dumps(result["paths"], indent=2, ensure_ascii=False)
            arms, count = found.get(key, ([], 0))
            found[key] = (arms if arm.label in arms else [*arms, arm.label], count + 1)
    return [(", ".join(arms), key, count) for key, (arms, count) in found.items()]
