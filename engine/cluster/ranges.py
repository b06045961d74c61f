"""Which task of an array takes which clips."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError

LEAD = 600.0
"""Seconds ahead of the time limit at which the batch file asks for its signal; Slurm may send it a minute earlier."""
STARTING = 600.0
"""Seconds that are not counted on: starting, loading and compiling."""


@dataclass(frozen=True)
class Ranges:
    """Task k takes clips k * clips to (k + 1) * clips - 1; tasks: those k with something left to do."""

    clips: int
    tasks: tuple[int, ...]
    seconds: float
    """Work of a full range."""

    @property
    def array(self) -> str:
        """The tasks as sbatch's --array takes them: 0-3,7."""
        runs: list[list[int]] = []
        for task in self.tasks:
            if runs and task == runs[-1][-1] + 1:
                runs[-1] = [runs[-1][0], task]
            else:
                runs.append([task])
        return ",".join("-".join(map(str, run)) for run in runs)


def plan_ranges(
    unfinished: Sequence[bool],
    *,
    seconds_a_clip: float,
    limit: float,
    target: float,
    largest_array: int,
    gpus: int = 1,
    together: int = 1,
) -> Ranges:
    """Ranges of equal length that a task is likely to finish in `target` seconds, and in any case below its time limit.

    unfinished: of each clip of the list, whether it lacks a result. limit: the tasks' time limit in seconds; gpus: tasks that
    share a range; largest_array: Slurm's MaxArraySize, which indices stay below: where it forces longer ranges than fit into
    the limit, tasks are requeued and go on. together: clips in a row that must not be split, of which ranges hold a multiple.
    Raises UserError where not even one clip fits into the limit.
    """
    usable = limit - LEAD - STARTING
    if seconds_a_clip > usable:
        raise UserError(
            f"a clip takes {seconds_a_clip:.0f} s and a time limit of {limit:.0f} s leaves {max(0.0, usable):.0f} s of work: no task "
            "would ever finish one; ask for more with --time"
        )
    clips = max(gpus, int(min(target, usable) / seconds_a_clip) * gpus, -(-len(unfinished) // largest_array))
    clips = -(-clips // together) * together
    starts = range(0, len(unfinished), clips)
    tasks = tuple(k for k, start in enumerate(starts) if any(unfinished[start : start + clips]))
    return Ranges(clips, tasks, clips * seconds_a_clip / gpus)


def seconds_of(text: str) -> float:
    """Seconds of a time limit as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises UserError for anything else.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    words = [*parts, *([days] if dash else [])]
    if not all(word.isascii() and word.isdigit() for word in words) or len(parts) > 3:
        raise UserError(f"--time was {text!r}; give hours:minutes:seconds or days-hours:minutes:seconds, as 48:00:00")
    numbers = [int(part) for part in parts]
    if dash or len(numbers) == 3:
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) == 2:
        numbers = [0, *numbers]
    else:
        numbers = [0, *numbers, 0]
    hours, minutes, seconds = numbers
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds


def limit_text(seconds: float) -> str:
    """Whole minutes, rounded up, as hours:minutes:00."""
    minutes = -int(-seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02d}:00"
