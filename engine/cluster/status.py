"""`vidtta status RUN`: how far a run is, who works on it, and when it may be done. Reads the run directory and writes nothing."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arms import arms_of
from ..errors import UserError
from ..rundir import RunDirectory, read_json
from ..split import clips_of
from .presence import running

if TYPE_CHECKING:
    from ..recipe import Recipe

WINDOW = 3600.0
"""Seconds over which clips an hour are counted."""
SHOWN = 5
"""Failures shown with their reason."""
EXIT_DONE, EXIT_FAILED, EXIT_LEFT = 0, 1, 3


@dataclass
class ArmStatus:
    """Of one arm. failed: ids with their reasons, tried again by the next run; left: clips without a result, failed ones not counted."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left: int = 0
    seconds: list[float] = field(default_factory=list)
    """What each result cost, from reading the clip to scoring it."""
    finished: list[float] = field(default_factory=list)
    """When each result was written, in seconds since 1970."""

    @property
    def seconds_a_clip(self) -> float | None:
        return sum(self.seconds) / len(self.seconds) if self.seconds else None


@dataclass
class RunStatus:
    root: Path
    clips: int
    arms: dict[str, ArmStatus]
    tasks: list[dict[str, Any]]
    """What each live task said last, see presence.py."""
    now: float
    note: str = ""

    @property
    def left(self) -> int:
        return sum(arm.left for arm in self.arms.values())

    @property
    def failed(self) -> int:
        return sum(len(arm.failed) for arm in self.arms.values())

    @property
    def clips_an_hour(self) -> float | None:
        """Results of the last hour, an hour of work (up to the last one where no task runs); None where there are none."""
        recent = [
            (end, end - cost)
            for arm in self.arms.values()
            for end, cost in zip(arm.finished, arm.seconds, strict=True)
            if self.now - end <= WINDOW
        ]
        if not recent:
            return None
        until = self.now if self.tasks else max(end for end, _ in recent)
        begun = min(start for _, start in recent)
        return len(recent) / max(min(until - begun, WINDOW), 1e-3) * 3600

    @property
    def seconds_left(self) -> float | None:
        """Work left, by each arm's own mean (of an arm without a result, the mean of the others), divided among the live tasks."""
        known = {name: arm.seconds_a_clip for name, arm in self.arms.items()}
        means = [value for value in known.values() if value is not None]
        if not means:
            return None
        mean = sum(means) / len(means)
        work = sum(arm.left * (known[name] or mean) for name, arm in self.arms.items())
        return work / max(1, len(self.tasks))


def status_of(root: Path) -> RunStatus:
    """Read a run directory. Raises UserError where it is none."""
    from ..recipe import load_recipe

    if not (root / "recipe.yaml").exists():
        raise UserError(f"{root}: no run directory (it holds no recipe.yaml); name the output_dir of a run")
    recipe, directory, now = load_recipe(str(root / "recipe.yaml")), RunDirectory(root), time.time()
    ids, note = _clip_ids(recipe, directory)
    arms = {arm: _arm_status(directory, arm, ids) for arm in arms_of(recipe)} | _trials(recipe, directory, ids)
    return RunStatus(root, len(ids), arms, running(root, now), now, note)


def _clip_ids(recipe: "Recipe", directory: RunDirectory) -> tuple[list[str], str]:
    try:
        return [clip.id for clip in clips_of(recipe)], ""
    except UserError as error:
        found = sorted({path.parent.name for path in directory.root.glob("arms/*/clips/*/*.json")})
        return found, f"the list of clips cannot be read ({error}); counted are those that have a folder"


def _arm_status(directory: RunDirectory, arm: str, ids: list[str]) -> ArmStatus:
    status = ArmStatus()
    for clip_id in ids:
        result = directory.result(arm, clip_id)
        if result is not None:
            status.done += 1
            status.seconds.append(cost_of(result))
            status.finished.append((directory.clip(arm, clip_id) / "result.json").stat().st_mtime)
        elif failure := directory.failure(arm, clip_id):
            status.failed[clip_id] = str(failure.get("reason"))
        else:
            status.left += 1
    return status


def _trials(recipe: "Recipe", directory: RunDirectory, ids: list[str]) -> dict[str, ArmStatus]:
    """A search by Optuna: the arms of its finished trials, which leave nothing to do, and at most so many clips of those to come."""
    if recipe.search is None or recipe.search.sampler != "optuna":
        return {}
    trials = (read_json(directory.root / "study.json") or {"trials": []})["trials"]
    done = {trial["arm"]: [one for one in ids if directory.result(trial["arm"], one)] for trial in trials}
    left = recipe.search.trials - len(trials)
    to_come = {f"{left} trials to come": ArmStatus(left=left * len(ids))} if left > 0 else {}
    return {arm: _arm_status(directory, arm, made) for arm, made in done.items()} | to_come


def cost_of(result: Mapping[str, Any]) -> float:
    """Seconds that a result took, from reading the clip to scoring it."""
    return sum(result["cost"]["seconds"].values())


def print_status(root: Path) -> int:
    """Print a run's status; returns 0 when every clip has a result, 1 when those that have none failed, 3 when some are left."""
    from rich.console import Console
    from rich.table import Table

    status = status_of(root)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table("arm", "done", "failed", "left", "s a clip", title=f"{root}: {status.clips} clips")
    for name, arm in status.arms.items():
        mean = arm.seconds_a_clip
        table.add_row(name, str(arm.done), str(len(arm.failed)), str(arm.left), "-" if mean is None else f"{mean:.1f}")
    console.print(table)
    if status.note:
        console.print(f"NOTE: {status.note}")
    for line in _work_lines(status):
        console.print(line)
    shown = [f"{name}/{clip}: {reason}" for name, arm in status.arms.items() for clip, reason in arm.failed.items()]
    for line in shown[:SHOWN]:
        console.print(f"failed: {line}")
    if len(shown) > SHOWN:
        console.print(f"failed: and {len(shown) - SHOWN} more, see {root}/summary.csv")
    return EXIT_LEFT if status.left else EXIT_FAILED if status.failed else EXIT_DONE


def _work_lines(status: RunStatus) -> list[str]:
    lines = [f"running: {len(status.tasks)} task{'' if len(status.tasks) == 1 else 's'}"]
    for task in status.tasks:
        job = f"job {task['job']}, " if task["job"] else ""
        since = duration(status.now - task["clip_since"])
        lines.append(f"  {task['arm']}/{task['clip']} for {since} ({job}process {task['pid']} on {task['host']})")
    if (rate := status.clips_an_hour) is not None:
        lines.append(f"{rate:,.0f} clips an hour")
    if status.left and (seconds := status.seconds_left) is not None:
        end = datetime.fromtimestamp(status.now + seconds).strftime("%a %d %b %H:%M")
        who = f"with {len(status.tasks)} at work" if status.tasks else "once one task works on it"
        lines.append(f"expected end {end}, in {duration(seconds)}, {who}")
    return lines


def duration(seconds: float) -> str:
    """5 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
