"""Hyperparameter search: a grid over any settings of one method, chosen on the run's clips and confirmed on others.

Each cell of the grid is an arm of the run, so resume, pairing and intervals are those of any arm. Cells that differ in `steps` alone
share one trajectory where that is exact: adapting runs once for the largest number of steps, and at each smaller one the
continuation is sampled and scored with the weights then in force, which draws from no random state and changes none. It is exact for
a rate that does not depend on the number of steps (constant, or with warm-up), draws by (seed, clip, k), no early stopping and
weights that start afresh at every clip; otherwise `snapshots: true` is refused.
"""

import csv
import io
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_json, write_text
from .methods import AnyMethod
from .methods.optimize import AdamW
from .statistics import pair_results
from .statistics.pairing import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from .recipe import Recipe
    from .session import Session

Value = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class Search:
    """A grid over one arm's settings."""

    arm: str
    """The arm whose settings are searched; its cells take its place."""
    grid: dict[str, tuple[Value, ...]]
    """Key of the method (`lr`, `l2.weight`) -> values to try; every combination is a cell."""
    snapshots: bool = True
    """Let one trajectory serve all numbers of steps; false runs every cell by itself."""
    metric: str = "psnr"
    """The score whose mean difference to the baseline chooses the best cell."""
    confirm: str = ""
    """Clips on which the best cell is confirmed, as `data.clips`; none may be among those. Empty: not confirmed."""
    confirm_limit: int = 16
    """Only the first so many of them."""
    few_moved: float = 0.5
    """Cells where a smaller share of the effective weights moved are marked."""

    def __post_init__(self) -> None:
        if not self.grid or not all(self.grid.values()):
            raise ValueError("grid should name at least one key with at least one value")
        if self.confirm_limit < 1:
            raise ValueError(f"confirm_limit must be at least 1, was {self.confirm_limit}")


def cells(search: Search, method: AnyMethod) -> dict[str, tuple[dict[str, Value], AnyMethod]]:
    """Arm name -> (values, method) of every cell, in the order of the grid. Raises ValueError for a key or value it cannot take."""
    found = {}
    for combination in itertools.product(*search.grid.values()):
        values = dict(zip(search.grid, combination, strict=True))
        cell: Any = method
        for key, value in values.items():
            cell = _with(cell, key.split("."), value, key)
        name = "-".join([search.arm, *(f"{key.replace('.', '_')}{_plain(value)}" for key, value in values.items())])
        found[name] = (values, cell)
    return found


def _with(part: Any, path: list[str], value: Value, key: str) -> Any:
    name = path[0]
    if not is_dataclass(part) or isinstance(part, type) or not hasattr(part, name) or name == "kind":
        known = sorted(asdict(part)) if is_dataclass(part) and not isinstance(part, type) else []
        raise ValueError(f"grid names {key!r}, which the method lacks; it takes {', '.join(known)}")
    old = getattr(part, name)
    if len(path) > 1:
        return replace(part, **{name: _with(old, path[1:], value, key)})
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, bool | int | float | str) and type(old) is not type(value):
        raise ValueError(f"grid gives {key} the value {value!r}, of another type than {old!r}")
    return replace(part, **{name: value})


def _plain(value: Value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in text)


def inexact(recipe: "Recipe") -> str | None:
    """Why snapshots would not be what separate runs give; None where they are, or are not asked for."""
    search = recipe.search
    if search is None or not search.snapshots or "steps" not in search.grid:
        return None
    for _, method in cells(search, recipe.arms[search.arm]).values():
        if not isinstance(method, AdamW):
            return f"kind {method.kind} takes no gradient steps"
        if method.schedule != "constant":
            return f"schedule {method.schedule} depends on the number of steps"
        if method.early_stopping:
            return "early_stopping ends a trajectory by itself"
    if recipe.adaptation.reset != "clip":
        return f"adaptation.reset is {recipe.adaptation.reset}, so a clip starts from the last one's end"
    return None


def trajectories(recipe: "Recipe", arms: list[str]) -> list[list[str]]:
    """The arms in groups that share one trajectory, each from the fewest steps to the most; other arms alone."""
    search = recipe.search
    if search is None or not search.snapshots or "steps" not in search.grid:
        return [[arm] for arm in arms]
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, (values, _) in cells(search, recipe.arms[search.arm]).items():
        rest = repr({key: value for key, value in values.items() if key != "steps"})
        groups.setdefault(rest, []).append((int(values["steps"]), name))
    shared = [[name for _, name in sorted(group)] for group in groups.values()]
    own = {name for group in shared for name in group}
    return [[arm] for arm in arms if arm not in own] + shared


def summarise(session: "Session") -> dict[str, Any] | None:
    """Write search.json and search.csv: a row a cell with its paired difference to the baseline. None without complete cells."""
    recipe = session.recipe
    search = recipe.search
    assert search is not None

    def results(arm: str) -> list[Mapping[str, Any]]:
        found = (session.directory.result(arm, clip.id) for clip in session.listed)
        return [result for result in found if result is not None]

    baseline = results(session.baseline)
    rows: list[dict[str, Any]] = []
    spent = separate = 0.0
    grid = cells(search, recipe.arms[search.arm])
    for name, (values, _) in grid.items():
        treated = results(name)
        difference = pair_results(treated, baseline).compare(search.metric)
        if difference is None:
            continue
        changes = [result["adaptation"]["change"] for result in treated]
        moved = sum(change["changed"] for change in changes) / max(1, sum(change["trained"] for change in changes))
        seconds = sum(result["cost"]["seconds"]["adapt"] for result in treated)
        separate += seconds
        rows.append(
            {
                "arm": name,
                **values,
                "clips": difference.n,
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "win_rate": difference.win_rate,
                "moved": moved,
                "few_moved": moved < search.few_moved,
                "adapt_seconds": seconds / len(treated),
            }
        )
    if not rows:
        return None
    by_name = {row["arm"]: row for row in rows}
    for group in trajectories(recipe, list(grid)):
        done = [by_name[name] for name in group if name in by_name]
        if done:
            spent += max(row["adapt_seconds"] * row["clips"] for row in done)
    sign = 1 if search.metric in HIGHER_IS_BETTER else -1
    best = max(rows, key=lambda row: sign * row["difference"])
    found = {
        "metric": search.metric,
        "axes": {key: list(values) for key, values in search.grid.items()},
        "cells": rows,
        "best": best["arm"],
        "adapt_seconds": {
            "spent": spent,
            "of separate runs": separate,
            "saved": 1 - spent / separate if separate else 0,
        },
    }
    write_json(session.directory.root / "search.json", found)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(session.directory.root / "search.csv", text.getvalue())
    return found


def confirmation(recipe: "Recipe", found: Mapping[str, Any]) -> "Recipe":
    """The recipe that runs the best cell alone on the confirming clips, in a run directory of its own."""
    search = recipe.search
    assert search is not None
    _, method = cells(search, recipe.arms[search.arm])[found["best"]]
    plain = {name: arm for name, arm in recipe.arms.items() if arm.kind == "none"}
    data = replace(recipe.data, clips=search.confirm, captions="", limit=search.confirm_limit)
    return replace(
        recipe,
        output_dir=str(Path(recipe.output_dir) / "confirm"),
        data=data,
        arms={**plain, found["best"]: method},
        placebos=(),
        search=None,
    )


def check_search(recipe: "Recipe") -> str | None:
    """What is wrong with a search, a sentence; None if nothing is."""
    search = recipe.search
    if search is None:
        return None
    if search.arm not in recipe.arms or recipe.arms[search.arm].kind == "none":
        return f"arm names {search.arm!r}, which is no arm that adapts; those are {list(recipe.arms)[1:]}"
    try:
        made = cells(search, recipe.arms[search.arm])
        for name, (_, method) in made.items():
            method.check(recipe.adaptation)
            if name in recipe.arms:
                return f"would make an arm named {name!r}, which arms already has; rename that arm"
        if len(made) < len(list(itertools.product(*search.grid.values()))):
            return "grid gives two cells one name; its values must differ"
    except ValueError as error:
        return str(error)
    if search.arm in recipe.placebos:
        return f"searches arm {search.arm!r}, which placebos names; leave it out there"
    if reason := inexact(recipe):
        return f"snapshots would not be exact: {reason}; set snapshots: false"
    return None


def raise_unless_disjoint(session: "Session") -> None:
    """Raise UserError where the confirming clips are among those that choose."""
    from .fisher import validation_clips

    search = session.recipe.search
    if search and search.confirm:
        validation_clips(session.recipe.data, search.confirm, search.confirm_limit, session.listed, "search.confirm")
