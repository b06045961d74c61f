"""Hyperparameter search: a grid over any settings of one method, chosen on the run's clips and confirmed on others.

Each cell of the grid is an arm of the run, so resume, pairing and intervals are those of any arm. Cells that differ in `steps` alone
share one trajectory where that is exact: adapting runs once for the largest number of steps, and at each smaller one the
continuation is sampled and scored with the weights then in force, which draws from no random state and changes none. It is exact for
a rate that does not depend on the number of steps (constant, or with warm-up), draws by (seed, clip, k), no early stopping and
weights that start afresh at every clip; otherwise `snapshots: true` is refused.

With `sampler: optuna` trials are proposed one after the other from those before, and worse ones are pruned (study.py).
"""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .files import write_json, write_text
from .methods import AnyMethod
from .methods.optimize import AdamW
from .split import SPLIT, confirming_clips, write_manifest
from .statistics import pair_results
from .statistics.pairing import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from .recipe import Recipe
    from .session import Session

Value = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values that Optuna may propose for a key, ends included."""

    low: float
    """The smallest."""
    high: float
    """The largest."""
    log: bool = False
    """Propose evenly on a logarithmic scale."""
    whole: bool = False
    """Whole numbers alone, for keys such as `rank` and `steps`; others are proposed to three digits."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, was {self.low:g} to {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be positive on a logarithmic scale, was {self.low:g}")
        if self.whole and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"a range of whole numbers needs whole ends, was {self.low:g} to {self.high:g}")


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search over one arm's settings."""

    arm: str
    """The arm whose settings are searched; its cells take its place."""
    grid: dict[str, tuple[Value, ...] | Range]
    """Key of the method (`lr`, `l2.weight`) -> values to try; every combination is a cell. Under `sampler: optuna` also a range:
    `{low: 1e-6, high: 1e-4, log: true}`, and `whole: true` for whole numbers."""
    sampler: Literal["grid", "optuna"] = "grid"
    """grid: every combination; optuna: trials that each follow from those before (needs `pip install 'vidtta[search]'`)."""
    trials: int = 20
    """Settings that Optuna tries; raised later, the search goes on."""
    startup_trials: int = 5
    """The first so many are drawn at random, those after them by the tree-structured Parzen estimator."""
    prune_p: float = 0.1
    """End a trial where a Wilcoxon signed-rank test over its clips so far says with this p that it is worse than the best; 0 ends none."""
    prune_after: int = 4
    """Clips that a trial has at least."""
    snapshots: bool = True
    """Let one trajectory serve all numbers of steps; false runs every cell by itself."""
    metric: str = "psnr"
    """The score whose mean difference to the baseline chooses the best cell."""
    confirm: str = ""
    """Clips on which the best cell is confirmed, as `data.clips`; none may be among those. split: every second group of `data.clips`,
    which the search then leaves out. Empty: not confirmed."""
    confirm_limit: int = 16
    """Only the first so many of them."""
    few_moved: float = 0.5
    """Cells where a smaller share of the effective weights moved are marked."""

    def __post_init__(self) -> None:
        if not self.grid or not all(axis for axis in self.grid.values()):
            raise ValueError("grid should name at least one key with at least one value")
        for name in ("confirm_limit", "trials", "startup_trials", "prune_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if not 0 <= self.prune_p < 1:
            raise ValueError(f"prune_p must lie in [0, 1), was {self.prune_p}")
        ranges = [key for key, axis in self.grid.items() if isinstance(axis, Range)]
        if ranges and self.sampler == "grid":
            raise ValueError(f"grid gives {ranges[0]} a range, of which only sampler: optuna takes values; list them")


def cells(search: Search, method: AnyMethod) -> dict[str, tuple[dict[str, Value], AnyMethod]]:
    """Arm name -> (values, method) of every cell, in the order of the grid. Raises ValueError for a key or value it cannot take."""
    found = {}
    for combination in itertools.product(*(axis for axis in search.grid.values() if not isinstance(axis, Range))):
        values = dict(zip(search.grid, combination, strict=True))
        name, changed = cell(search, method, values)
        found[name] = (values, changed)
    return found


def cell(search: Search, method: AnyMethod, values: Mapping[str, Value]) -> tuple[str, AnyMethod]:
    """The arm of a setting: its name, and the method with these values. Raises ValueError as `cells` does."""
    changed: Any = method
    for key, value in values.items():
        changed = _with(changed, key.split("."), value, key)
    name = "-".join([search.arm, *(f"{key.replace('.', '_')}{_plain(value)}" for key, value in values.items())])
    return name, changed


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
    if search is None or search.sampler == "optuna" or not search.snapshots or "steps" not in search.grid:
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
    if search is None or search.sampler == "optuna" or not search.snapshots or "steps" not in search.grid:
        return [[arm] for arm in arms]
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, (values, _) in cells(search, recipe.arms[search.arm]).items():
        rest = repr({key: value for key, value in values.items() if key != "steps"})
        groups.setdefault(rest, []).append((int(values["steps"]), name))
    shared = [[name for _, name in sorted(group)] for group in groups.values()]
    own = {name for group in shared for name in group}
    return [[arm] for arm in arms if arm not in own] + shared


def summarise(session: "Session", trials: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any] | None:
    """Write search.json and search.csv: a row a cell with its paired difference to the baseline. None without complete cells.

    trials: of a search by Optuna, as study.json has them; a pruned or failed one is in the rows and is never the best.
    """
    recipe = session.recipe
    search = recipe.search
    assert search is not None

    def results(arm: str) -> list[Mapping[str, Any]]:
        found = (session.directory.result(arm, clip.id) for clip in session.listed)
        return [result for result in found if result is not None]

    baseline = results(session.baseline)
    rows: list[dict[str, Any]] = []
    spent = separate = 0.0
    states: dict[str, str] = {}
    if search.sampler == "optuna":
        grid = {trial["arm"]: trial["values"] for trial in trials}
        states = {trial["arm"]: trial["state"] for trial in reversed(trials)}  # proposed again it may be pruned later
    else:
        grid = {name: values for name, (values, _) in cells(search, recipe.arms[search.arm]).items()}
    for name, values in grid.items():
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
            | ({"state": states[name]} if states else {})
        )
    complete = [row for row in rows if states.get(row["arm"], "complete") == "complete"]
    if not complete:
        return None
    by_name = {row["arm"]: row for row in rows}
    for group in trajectories(recipe, list(grid)):
        done = [by_name[name] for name in group if name in by_name]
        if done:
            spent += max(row["adapt_seconds"] * row["clips"] for row in done)
    sign = 1 if search.metric in HIGHER_IS_BETTER else -1
    best = max(complete, key=lambda row: sign * row["difference"])
    found = {
        "metric": search.metric,
        "axes": _axes(search),
        "cells": rows,
        "best": best["arm"],
        "adapt_seconds": {
            "spent": spent,
            "of separate runs": separate,
            "saved": 1 - spent / separate if separate else 0,
        },
    }
    if states:
        run, whole = sum(row["clips"] for row in rows), max(row["clips"] for row in complete)
        found["trials"] = {
            state: sum(one["state"] == state for one in trials) for state in ("complete", "pruned", "failed")
        }
        found["trials"]["clips_not_run"] = whole * len(rows) - run
    write_json(session.directory.root / "search.json", found)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(session.directory.root / "search.csv", text.getvalue())
    return found


def _axes(search: Search) -> dict[str, list[Value]]:
    """The values along each axis, for a heat map; none where an axis is a range."""
    axes = {key: list(axis) for key, axis in search.grid.items() if not isinstance(axis, Range)}
    return axes if len(axes) == len(search.grid) else {}


def confirmation(recipe: "Recipe", found: Mapping[str, Any]) -> "Recipe":
    """The recipe that runs the best cell alone on the confirming clips, in a run directory of its own."""
    search = recipe.search
    assert search is not None
    (best,) = (row for row in found["cells"] if row["arm"] == found["best"])
    _, method = cell(search, recipe.arms[search.arm], {key: best[key] for key in search.grid})
    plain = {name: arm for name, arm in recipe.arms.items() if arm.kind == "none"}
    clips = search.confirm
    if clips == SPLIT:
        clips = str(Path(recipe.output_dir) / "confirm.csv")
        write_manifest(Path(clips), confirming_clips(recipe))
    data = replace(recipe.data, clips=clips, captions="", limit=search.confirm_limit)
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
        made = (
            _ends(search, recipe.arms[search.arm])
            if search.sampler == "optuna"
            else cells(search, recipe.arms[search.arm])
        )
        for name, (_, method) in made.items():
            method.check(recipe.adaptation)
            if name in recipe.arms:
                return f"would make an arm named {name!r}, which arms already has; rename that arm"
        lists = [axis for axis in search.grid.values() if not isinstance(axis, Range)]
        if search.sampler == "grid" and len(made) < len(list(itertools.product(*lists))):
            return "grid gives two cells one name; its values must differ"
    except ValueError as error:
        return str(error)
    if search.arm in recipe.placebos:
        return f"searches arm {search.arm!r}, which placebos names; leave it out there"
    if reason := inexact(recipe):
        return f"snapshots would not be exact: {reason}; set snapshots: false"
    return None


def _ends(search: Search, method: AnyMethod) -> dict[str, tuple[dict[str, Value], AnyMethod]]:
    """What Optuna may propose for each key, the others as the recipe has them: each value of a list, the ends of a range."""
    found = {}
    for key, axis in search.grid.items():
        whole = isinstance(axis, Range) and axis.whole
        for value in (axis.low, axis.high) if isinstance(axis, Range) else axis:
            value = int(value) if whole else value
            name, changed = cell(search, method, {key: value})
            found[name] = ({key: value}, changed)
    return found


def raise_unless_disjoint(session: "Session") -> None:
    """Raise UserError where the confirming clips are among those that choose."""
    from .fisher import check_disjoint, validation_clips

    search = session.recipe.search
    if search and search.confirm == SPLIT:
        check_disjoint(
            confirming_clips(session.recipe), session.listed, "search.confirm", "the other half of data.clips"
        )
    elif search and search.confirm:
        validation_clips(session.recipe.data, search.confirm, search.confirm_limit, session.listed, "search.confirm")
