"""What a run writes beside its results: the recipe, the environment and the choices at its start; why a clip has no result."""

import sys
import traceback

from .choose import held_choices
from .data.clips import Clip
from .environment import describe_environment
from .errors import MachineFailed, UserError
from .files import write_json, write_text
from .rundir import first_difference
from .session import Session


def write_failure(session: Session, arm: str, clip: Clip, error: Exception) -> str:
    """Record why a clip has no result, with the traceback unless it is the clip's own fault; returns the reason."""
    foreseen = isinstance(error, UserError | MachineFailed | FloatingPointError | ValueError)
    reason = str(error) if foreseen else f"{type(error).__name__}: {error}"
    trace = None if isinstance(error, UserError) else traceback.format_exc()
    failure = {"clip": clip.id, "arm": arm, "reason": reason, "traceback": trace}
    session.directory.write_failure(arm, clip.id, failure)
    return reason


def write_head(session: Session) -> None:
    """The run's recipe, environment and choices; the first task of a shared run directory writes the choices."""
    from .recipe import dump_recipe

    root = session.directory.root
    try:
        write_text(root / "recipe.yaml", dump_recipe(session.recipe))
    except OSError as error:
        raise UserError(f"output_dir {root}: cannot be written ({error.strerror}); choose another") from error
    if not (root / "environment.json").exists():  # the first task's; each result names its own code and paths
        write_json(root / "environment.json", describe_environment(session.models.dit.device))
    ours = session.describe_paths()
    theirs = held_choices(root, ours)
    if theirs != ours:
        where = first_difference(theirs, ours)
        print(f"warning: earlier results in {root} took other paths, so bits may differ ({where})", file=sys.stderr)
