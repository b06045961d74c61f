"""Continual adaptation (`adaptation.reset: never` or a number of clips): the weights carry over from clip to clip.

A clip's result then depends on the clips before it in the list, since the last reset, and on no other: a task that does not hold
that state (another shard, a resumed run) makes it again by adapting on those clips in order, without sampling. So results stay
independent of shards and of kills, at the price of that time, and no state of a network lies on disk. The optimizer's
moments start from zero at each clip; penalties pull towards the unadapted weights.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from .clip import Known, Progress, task_of
from .data.clips import Clip
from .methods.protocol import Adapter

if TYPE_CHECKING:
    from .session import Session


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
