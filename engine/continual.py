"""Continual adaptation (`adaptation.reset: never` or a number of clips): the weights carry over from clip to clip.

A clip's result then depends on the clips before it in the list, since the last reset, and on no other: a task that does not hold
that state (a resumed run) makes it again by adapting on those clips in order, without sampling. So results stay independent of
kills, at the price of that time, and no state of a network lies on disk. Tasks that would each make the whole way again are refused: clips
are split over several tasks only where the weights are reset, so `never` takes one task. The optimizer's
moments start from zero at each clip; penalties pull towards the unadapted weights.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from .clip import Known, Progress, task_of
from .cluster.place import Place
from .data.clips import Clip
from .errors import UserError
from .methods import adapts
from .methods.protocol import Adapter

if TYPE_CHECKING:
    from .recipe import Recipe
    from .session import Session


def stretch(recipe: "Recipe", clips: int) -> int:
    """How many clips in a row belong to one task, since each starts from the one before: 1 where adaptation is episodic, all of
    so many where weights are never reset."""
    reset = recipe.adaptation.reset
    if reset == "clip" or not any(map(adapts, recipe.arms.values())):
        return 1
    return clips if reset == "never" else int(reset)


def share_stretches(
    recipe: "Recipe", clips: list[Clip], start: int | None, end: int | None, place: Place
) -> list[Clip]:
    """The clips of this task: those from start to end (as --batch-start and --batch-end say), dealt out by stretches among the tasks
    that were started together. Raises UserError where that cuts through a stretch."""
    length, first = stretch(recipe, len(clips)), start or 0
    if length > 1 and (first % length or (place.world > 1 and length >= len(clips))):
        told = f"{place.world} tasks" if place.world > 1 else f"--batch-start {first}"
        allowed = (
            "run it as one task from the first clip" if length >= len(clips) else f"begin at a multiple of {length}"
        )
        raise UserError(
            f"adaptation.reset is {recipe.adaptation.reset}, so a clip starts from where the one before it ended, and {told} would "
            f"cut through that; {allowed}, or set adaptation.reset=clip"
        )
    chosen = clips[start:end]
    return [
        clip for part in place.share([chosen[k : k + length] for k in range(0, len(chosen), length)]) for clip in part
    ]


class Carried:
    """The clips that the weights in force have been adapted on, in order."""

    def __init__(self, session: "Session", arm: str, adapter: Adapter, known_of: Callable[[Clip], Known]) -> None:
        self.session = session
        self.arm = arm
        self.adapter = adapter
        self.known_of = known_of
        self.clips: list[str] = []

    @property
    def episodic(self) -> bool:
        """Whether every clip starts from the base weights."""
        return not self.session.continual(self.arm)

    def bring_to(self, clip: Clip, progress: Progress) -> None:
        """Bring the weights to the state in which `clip` is adapted on."""
        earlier = self.session.adapted_before(self.arm, clip)
        wanted = [one.id for one in earlier]
        if self.clips != wanted[: len(self.clips)]:
            self.forget()
        for one in earlier[len(self.clips) :]:
            task = task_of(self.session.experiment, self.known_of(one))
            self.adapter.adapt(task, lambda step, loss: progress("adapt", step + 1, self.adapter.steps))
            self.clips.append(one.id)

    def adapted_on(self, clip: Clip) -> None:
        """The weights were left adapted on `clip` too."""
        if not self.episodic:
            self.clips.append(clip.id)

    def forget(self) -> None:
        """Back to the base weights."""
        self.adapter.restore()
        self.clips = []
