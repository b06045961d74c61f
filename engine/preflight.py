"""Before the first clip: is nothing shown that must not be, and does the network predict at all, in the right direction?

A leak makes any method look good (probes.py). A flipped sign, a wrong scale or untrained weights give a loss above that of
predicting zero, and adapting then looks like learning. The null caption is used, so no text encoder is needed.
"""

from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor

from .adaptation import Task
from .clip import Known, task_of
from .data.clips import Clip
from .errors import UserError
from .evaluation import check_predicts, evaluate
from .files import write_json
from .methods import adapts
from .models.stdit3 import Caption
from .probes import check_latents, check_task

if TYPE_CHECKING:
    from .result import Shown
    from .session import Session


def preflight(session: "Session", read: Callable[[Clip], "Shown"]) -> tuple[str, ...]:
    """Try the path and the base network on the first clip that can be read; returns what every output must be marked with.

    read(clip) raises UserError where the clip cannot be read. Writes preflight.json. Raises UserError where something leaks
    or is left out, or where the network predicts worse than zero, unless the recipe allows untrained weights: then that is
    the mark.
    """
    for clip in session.listed:
        try:
            shown = read(clip)
        except UserError:
            continue  # it fails on its own when its turn comes
        break
    else:
        return ()
    window = session.recipe.window
    latents, _ = session.known_latents(clip, shown.content, shown.pixels)
    check_latents(partial(session.encode, clip), latents, shown.pixels, window)
    if not any(adapts(arm.method) for arm in session.arms.values()) or window.known_latents < 2:
        return ()
    null: Tensor = session.models.dit.y_embedder.y_embedding  # type: ignore[assignment]

    def task_on(latents: Tensor) -> Task:
        return task_of(session.experiment, Known(clip.id, latents, Caption(null[None])))

    check_task(task_on, latents)
    levels = list(evaluate(task_on(latents)))
    write_json(
        session.directory.root / "preflight.json",
        {"clip": clip.id, "levels": [{k: v if isfinite(v) else None for k, v in x._asdict().items()} for x in levels]},
    )
    try:
        check_predicts(levels, clip.id)
    except UserError:
        if not session.recipe.model.allow_untrained:
            raise
        return ("the network predicts worse than zero before adapting (preflight.json)",)
    return ()
