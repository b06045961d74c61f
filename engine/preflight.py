"""Before the first clip: does the network predict at all, and in the right direction?

A flipped sign, a wrong scale or untrained weights give a loss above that of predicting zero, and adapting then looks like
learning. The null caption is used, so no text encoder is needed.
"""

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor

from .clip import Known, task_of
from .data.clips import Clip
from .errors import UserError
from .evaluation import check_predicts, evaluate
from .files import write_json
from .models.stdit3 import Caption

if TYPE_CHECKING:
    from .session import Session


def preflight(session: "Session", known_latents: Callable[[Clip], Tensor]) -> tuple[str, ...]:
    """Evaluate the base network on the first clip that can be read; returns what every output must be marked with.

    known_latents(clip): of its known frames, [1, C, K, h, w]; raises UserError where the clip cannot be read. Writes
    preflight.json. Raises UserError where the network predicts worse than zero, unless the recipe allows untrained weights:
    then that is the mark.
    """
    adapts = any(arm.method.kind != "none" for arm in session.arms.values())
    if not adapts or session.recipe.window.known_latents < 2:
        return ()
    for clip in session.listed:
        try:
            latents = known_latents(clip)
        except UserError:
            continue  # it fails on its own when its turn comes
        break
    else:
        return ()
    dit = session.models.dit
    null: Tensor = dit.y_embedder.y_embedding  # type: ignore[assignment]
    known = Known(clip.id, latents, Caption(null[None]))
    levels = list(evaluate(task_of(session.experiment, known)))
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
