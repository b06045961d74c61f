"""What a run writes beside its results: recipe, environment and choices at its start; why a clip has no result; what `keep` names."""

import sys
import traceback

import torch
from torch import Tensor

from .clip import Outcome
from .data.clips import Clip
from .data.video import to_uint8, write_video
from .environment import describe_environment
from .errors import MachineFailed, UserError
from .files import write_json, write_json_once, write_tensors, write_text
from .rundir import first_difference, read_json
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
    write_json_once(root / "choices.json", ours)
    held = read_json(root / "choices.json") or {}
    theirs = {name: value for name, value in held.items() if name != "measured"}
    if theirs != ours:
        where = first_difference(theirs, ours)
        print(f"warning: earlier results in {root} took other paths, so bits may differ ({where})", file=sys.stderr)


def write_kept(session: Session, arm: str, clip: Clip, frames_F3HW: Tensor, outcome: Outcome) -> None:
    """The files that the recipe's `keep` names: the known frames followed by the generated ones, latents, adapted state."""
    folder, keep, window = session.directory.clip(arm, clip.id), session.recipe.keep, session.recipe.window
    if "video" in keep:
        video = torch.cat([frames_F3HW[: window.known_frames], to_uint8(outcome.pixels).cpu()])
        write_video(folder / "video.mp4", video, window.fps)
    for name, tensors in (("latents", {"latents": outcome.latents}), ("adapter", outcome.state)):
        if name in keep and tensors:
            write_tensors(folder / f"{name}.safetensors", tensors)
