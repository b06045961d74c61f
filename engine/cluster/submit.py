"""`vidtta submit RECIPE`: an array of tasks for a run, its comparison and report behind it, and the next stage behind that.

A recipe's tasks are worked out from the clips without a result, the measured time a clip, the time limit and the cluster's
MaxArraySize. Submitting again is safe at any time: what is finished is left out, and jobs of the same run that are still
queued are waited for.
"""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..arms import arms_of
from ..continual import stretch
from ..errors import UserError
from ..rundir import RunDirectory
from ..split import clips_of
from . import slurm
from .ranges import LEAD, STARTING, Ranges, limit_text, plan_ranges, seconds_of
from .status import cost_of, duration

if TYPE_CHECKING:
    from ..recipe import Recipe

FILES = Path(__file__).resolve().parents[2] / "slurm"
ASSUMED = 120.0
"""Seconds a clip and arm where nothing is measured: several times what the slowest plain method takes on an H200."""
SAMPLE = 200
"""Results an arm that the mean time is taken of."""
AFTER = ("compare", "report")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the options of the command say."""

    limit: str = "48:00:00"
    """Longest time limit of a task."""
    hours: float = 4.0
    """Work of a task: short ones start sooner, and a slow one holds up less."""
    gpus: int = 1
    """GPUs of a task of the array, one process each."""
    at_once: int | None = None
    """Tasks that may run at the same time."""
    seconds_a_clip: float | None = None
    """Time of a clip in all arms, instead of the measured one."""
    after: str | None = None
    """A job that must end well before the first task starts."""
    options: tuple[str, ...] = ()
    """More options for every sbatch."""
    allow_failed: bool = False
    """Go on to the report and the next stage although clips failed."""


@dataclass(frozen=True)
class Stage:
    """A recipe as the user named it, resolved, with its ranges. why: how the time a clip is known."""

    name: str
    recipe: "Recipe"
    clips: int
    unfinished: int
    ranges: Ranges
    seconds_a_clip: float
    why: str

    @property
    def root(self) -> Path:
        return Path(self.recipe.output_dir)

    @property
    def job_name(self) -> str:
        """The same for every submission of one run directory, and of no other."""
        return f"vidtta-{self.root.name}-{hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:6]}"


def submit(recipes: Sequence[str], overrides: Sequence[str], wishes: Wishes, *, dry_run: bool = False) -> int:
    """Plan every stage, then submit them, each array after the one before; prints what was done and how to watch.

    Nothing is submitted unless all can be planned; where sbatch refuses one, those before it are cancelled.
    """
    try:
        largest = slurm.largest_array()
    except UserError:
        if not dry_run:
            raise
        largest = slurm.DEFAULT_ARRAY
        print(f"no cluster answers: ranges for arrays of at most {largest} tasks")
    stages = [plan_stage(name, overrides, wishes, largest) for name in recipes]
    if len({stage.root.resolve() for stage in stages}) < len(stages):
        raise UserError(
            "two stages have the same output_dir; leave output_dir out of the overrides, or submit one recipe"
        )
    if wishes.after and not dry_run and not slurm.exists(wishes.after):
        raise UserError(f"--after was {wishes.after}, a job that Slurm does not know, so it would hold nothing back")
    submitted: list[str] = []
    after = wishes.after
    try:
        for stage in stages:
            after = _submit_stage(stage, overrides, wishes, after, submitted, dry_run=dry_run)
    except BaseException:
        if submitted:
            slurm.cancel(submitted)
            print(f"cancelled {', '.join(submitted)}")
        raise
    return 0


def plan_stage(name: str, overrides: Sequence[str], wishes: Wishes, largest_array: int) -> Stage:
    """What is left of a recipe, in ranges. Raises UserError for a recipe or a list of clips that cannot be read."""
    from ..recipe import load_recipe

    recipe = load_recipe(name, overrides)
    clips = clips_of(recipe)
    directory, arms = RunDirectory(Path(recipe.output_dir)), list(arms_of(recipe))
    paths = [[directory.clip(arm, clip.id) / "result.json" for arm in arms] for clip in clips]
    unfinished = [not all(path.exists() for path in row) for row in paths]
    together = stretch(recipe, len(clips))
    if together >= len(clips) > 1 and wishes.gpus > 1:
        raise UserError(
            f"{name}: adaptation.reset is {recipe.adaptation.reset}, so a clip starts from where the one before it ended and --gpus "
            f"{wishes.gpus} would cut through that; leave --gpus out, or set adaptation.reset=clip"
        )
    seconds, why = (wishes.seconds_a_clip, "as given") if wishes.seconds_a_clip else measure(directory, arms)
    ranges = plan_ranges(
        unfinished,
        seconds_a_clip=seconds,
        limit=seconds_of(wishes.limit),
        target=wishes.hours * 3600,
        largest_array=largest_array,
        gpus=wishes.gpus,
        together=together,
    )
    return Stage(name, recipe, len(clips), sum(unfinished), ranges, seconds, why)


def measure(directory: RunDirectory, arms: Sequence[str]) -> tuple[float, str]:
    """Seconds of a clip in all arms, and how they are known: by results of this run, an arm without any by the others' mean."""
    means, count = [], 0
    for arm in arms:
        names = sorted(path.parent.name for path in (directory.root / "arms" / arm / "clips").glob("*/result.json"))
        costs = [cost_of(result) for name in names[:SAMPLE] if (result := directory.result(arm, name))]
        count += len(costs)
        if costs:
            means.append(sum(costs) / len(costs))
    if not means:
        return ASSUMED * len(arms), "assumed: run one clip to measure it, or give --seconds-a-clip"
    return max(sum(means) / len(means) * len(arms), 1e-3), f"measured on {count} results"


def _submit_stage(
    stage: Stage, overrides: Sequence[str], wishes: Wishes, after: str | None, submitted: list[str], *, dry_run: bool
) -> str | None:
    """Submit a stage's array and what comes behind it; returns the array's number, or what it would have waited for."""
    ranges, logs = stage.ranges, (stage.root / "logs").absolute()
    print(
        f"{stage.name}: {stage.clips} clips, {stage.unfinished} unfinished, {stage.seconds_a_clip:.1f} s a clip ({stage.why}); "
        f"results: {stage.root}"
    )
    common = [f"--job-name={stage.job_name}"]
    if not dry_run:
        logs.mkdir(parents=True, exist_ok=True)
    if ranges.tasks:
        limit = limit_text(min(seconds_of(wishes.limit), 2 * ranges.seconds + LEAD + STARTING))
        throttle = f"%{wishes.at_once}" if wishes.at_once else ""
        print(
            f"  {len(ranges.tasks)} tasks of {ranges.clips} clips, about {duration(ranges.seconds)} each, limit {limit}"
        )
        earlier = [] if dry_run else slurm.queued(stage.job_name)
        conditions = [f"afterok:{after}"] * bool(after) + [f"afterany:{':'.join(earlier)}"] * bool(earlier)
        array = [
            *common,
            f"--array={ranges.array}{throttle}",
            f"--time={limit}",
            f"--ntasks={wishes.gpus}",
            f"--output={_pattern(logs)}/%A_%a.out",
            *_depend(",".join(conditions)),
            *(["--export=ALL,VIDTTA_ALLOW_FAILED=1"] if wishes.allow_failed else []),
            *wishes.options,
            str(FILES / "run.sbatch"),
            stage.name,
            str(ranges.clips),
            *overrides,
        ]
        after = _submit(array, submitted, "ARRAY", dry_run=dry_run)
        if earlier:
            print(
                f"  jobs {', '.join(earlier)} of this run are still queued: the new array begins when they have ended"
            )
    else:
        print("  nothing left to run")
    behind = []
    for name in AFTER:
        job = [*common, f"--output={_pattern(logs)}/{name}-%j.out", *_depend(f"afterok:{after}" if after else "")]
        job += wishes.options
        behind.append(
            _submit([*job, str(FILES / f"{name}.sbatch"), str(stage.root)], submitted, name.upper(), dry_run=dry_run)
        )
    if not dry_run:
        jobs = [after] if ranges.tasks and after else []
        print(
            f"  submitted: {' '.join([*(f'array {job}' for job in jobs), *map(' '.join, zip(AFTER, behind, strict=True))])}"
        )
        print("  what waits for a job that fails is cancelled; submit again to go on with what is missing")
        print(f"  watch: vidtta status {shlex.quote(str(stage.root))}; squeue --me; logs in {logs}")
    return after


def _depend(condition: str) -> list[str]:
    """Without the second option a job whose condition can never hold waits for ever."""
    return [f"--dependency={condition}", "--kill-on-invalid-dep=yes"] if condition else []


def _submit(arguments: list[str], submitted: list[str], placeholder: str, *, dry_run: bool) -> str:
    if dry_run:
        print(f"  sbatch {shlex.join(arguments)}")
        return placeholder
    job = slurm.submit(*arguments)
    submitted.append(job)
    return job


def _pattern(folder: Path) -> str:
    """A folder in a pattern of sbatch, where a per cent sign begins a replacement."""
    return str(folder).replace("%", "%%")
