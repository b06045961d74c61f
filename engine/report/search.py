"""Searches over settings that runs wrote as search.json, as grids for heat maps."""

import itertools
from pathlib import Path
from typing import Any

from ..rundir import read_json
from ..statistics.pairing import HIGHER_IS_BETTER
from .names import name_of

MOST_MAPS = 12  # of one search, where it has more than two axes


def read_searches(roots: list[Path]) -> list[dict[str, Any]]:
    """A grid for each search; one with more than two axes gives a grid for each setting of the others, at most MOST_MAPS.

    x, y: the values of the last two axes; z: [y][x] the mean difference to the baseline, None where a cell is missing; text: it
    and its interval, with a dot where few weights moved; chosen: (column, row) of the best cell.
    """
    found = (read_json(root / "search.json") for root in roots)
    return [grid for search in found if search and search.get("axes") for grid in _grids(search)]


def _grids(search: dict[str, Any]) -> list[dict[str, Any]]:
    axes = list(search["axes"].items())
    x_name, x = axes[-1]
    y_name, y = axes[-2] if len(axes) > 1 else ("", [""])
    rest = axes[:-2]
    title, unit, digits = name_of(search["metric"])
    cells = {_place(cell, [name for name, _ in axes]): cell for cell in search["cells"]}
    grids = []
    for fixed in itertools.islice(itertools.product(*(values for _, values in rest)), MOST_MAPS):
        rows = [
            [cells.get(tuple(map(repr, (*fixed, *([b] if y_name else []), a)))) for a in x] for b in y
        ]  # by the text of a value, since 1 and 1.0 are one setting's two forms and lists have no hash
        where = ", ".join(f"{name} {value}" for (name, _), value in zip(rest, fixed, strict=True))
        grids.append(
            {
                "title": f"{title} difference{f', {unit}' if unit else ''}{f', at {where}' if where else ''}",
                "x_name": x_name,
                "y_name": y_name,
                "x": [str(value) for value in x],
                "y": [str(value) for value in y],
                "z": [[None if cell is None else cell["difference"] for cell in row] for row in rows],
                "text": [[_text(cell, digits) for cell in row] for row in rows],
                "chosen": [
                    [i, j]
                    for j, row in enumerate(rows)
                    for i, cell in enumerate(row)
                    if cell and cell["arm"] == search.get("best")
                ],
                "better": 1 if search["metric"] in HIGHER_IS_BETTER else -1,
            }
        )
    return grids


def _place(cell: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    return tuple(repr(cell.get(name)) for name in names)


def _text(cell: dict[str, Any] | None, digits: int) -> str:
    if cell is None:
        return ""
    low, high = cell.get("low"), cell.get("high")
    interval = "" if low is None or high is None else f"\n[{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{cell['difference']:+.{digits}f}{' •' if cell.get('few_moved') else ''}{interval}"
