"""What a run writes beside its results: recipe, environment and choices at its start; why a clip has no result; what `keep` names."""

import sys
import traceback
from typing import Any

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


def kept(session: Session, frames_F3HW: Tensor, outcome: Outcome) -> dict[str, Any]:
    """What the recipe's `keep` names, by file name, on the CPU: the known frames followed by the generated ones as uint8
    [F, 3, H, W], latents and adapted state as tensors by name."""
    keep, found = session.recipe.keep, {}
    if "video" in keep:
        known = frames_F3HW[: session.recipe.window.known_frames]
        found["video.mp4"] = torch.cat([known, to_uint8(outcome.pixels).cpu()])
    for name, tensors in (("latents", {"latents": outcome.latents}), ("adapter", outcome.state)):
        if name in keep and tensors:
            found[f"{name}.safetensors"] = {key: tensor.cpu() for key, tensor in tensors.items()}
    return found


def write_kept(session: Session, arm: str, clip: Clip, found: dict[str, Any]) -> None:
    """Write what `kept` found."""
    for name, value in found.items():
        path = session.directory.clip(arm, clip.id) / name
        if isinstance(value, Tensor):
            write_video(path, value, session.recipe.window.fps)
        else:
            write_tensors(path, value)
