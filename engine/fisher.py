"""The empirical diagonal Fisher information that elastic weight consolidation weighs by (arXiv:1612.00796).

A sample is a validation clip with a draw of timestep and noise. Its log-likelihood is that of a Gaussian around the predicted
velocity, whose variance is the base network's own mean squared error m on that sample, held fixed: -N m(w) / (2 m) over N
numbers. The diagonal is the mean over samples of its squared gradient at the base weights, (N / (2 m) dm/dw)^2. It is empirical: the
gradients are taken at the real clips, not at samples of the model's own distribution (arXiv:1905.12558 says what that changes).
Gradients are of one sample at a time: a batch would square a mean instead.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adaptation import Task
from .clip import Known, Progress, task_of
from .data.clips import Clip, Data, clip_hash, list_clips
from .errors import UserError
from .files import sha256_json, sha256_tensor, write_tensors
from .methods.optimize import AdamW, Masters
from .methods.parts import Fisher

if TYPE_CHECKING:
    from .session import Session


def empirical_fisher(
    parameters: Sequence[Tensor],
    tasks: Iterable[Task],
    draws: int,
    on_sample: Callable[[int], None] = lambda done: None,
) -> Fisher:
    """Over draws 0 .. draws - 1 of each task at the weights in force, which must require gradients; float32, as the parameters.

    A parameter that no sample's loss depends on has information 0.
    """
    diagonal = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    samples = numbers = 0
    for task in tasks:
        for k in range(draws):
            draw = task.draw(k)
            loss = task.velocity_loss(draw)
            numbers = task.target(draw).numel()
            scale = numbers / (2 * loss.item())
            for total, gradient in zip(
                diagonal, torch.autograd.grad(loss, list(parameters), allow_unused=True), strict=True
            ):
                if gradient is not None:
                    total += (gradient.float() * scale).square()
            samples += 1
            on_sample(samples)
    if not samples:
        raise ValueError("no sample, so there is no Fisher information")
    return Fisher([total / samples for total in diagonal], numbers)


def check_disjoint(clips: Sequence[Clip], others: Sequence[Clip], name: str, what: str) -> None:
    """Raise UserError where two lists share a clip: by id, by content, or by the group whose clips come from one video.

    name: the key that lists `clips`; what: what the other list is called.
    """
    groups = {_group(clip) for clip in others} - {None}
    ids, sizes = {clip.id for clip in others}, {}
    for clip in others:
        sizes.setdefault(_size(clip), []).append(clip)
    for clip in clips:
        why = None
        if clip.id in ids:
            why = f"the clip {clip.id}"
        elif _group(clip) in groups:
            why = f"the group {_group(clip)} (of clip {clip.id})"
        elif any(clip_hash(clip) == clip_hash(other) for other in sizes.get(_size(clip), ())):
            why = f"the video of clip {clip.id} under another name"
        if why:
            raise UserError(f"{name} shares {why} with {what}; the two must be disjoint, so name other clips")


def _group(clip: Clip) -> str | None:
    return f"{clip.meta.get('class', '')}/{clip.meta['group']}" if clip.meta.get("group") else None


def _size(clip: Clip) -> int | None:
    return clip.path.stat().st_size if clip.world is None and clip.path.is_file() else None


def validation_clips(data: Data, clips: str, limit: int, listed: Sequence[Clip], name: str) -> list[Clip]:
    """The clips that a setting names, at the recipe's size, none of them among `listed`."""
    found = list_clips(replace(data, clips=clips, captions="", limit=limit), Path.cwd())
    check_disjoint(found, listed, name, "data.clips")
    return found


def prepare_fisher(
    session: "Session", arm: str, masters: Masters, latents_of: Callable[[Clip], Tensor], progress: Progress
) -> tuple[Fisher, str] | None:
    """The Fisher information of an arm's EWC, and the key it is kept under; None where the arm has no such penalty.

    Computed once for a method, its data and the weights, kept in shared/fisher with the hash of every tensor, and read again where
    those hashes hold. Called with the base weights in force.
    """
    method = session.arms[arm].method
    if not isinstance(method, AdamW) or method.ewc is None:
        return None
    ewc, recipe = method.ewc, session.recipe
    clips = validation_clips(recipe.data, ewc.clips, ewc.limit, session.listed, f"arms.{arm}.ewc.clips")
    shapes = [list(p.shape) for p in masters.parameters]
    # What a method adds to an optimizer's settings says what is trained and from where: LoRA's alpha, targets, start.
    own = {name: value for name, value in asdict(method).items() if name not in {f.name for f in fields(AdamW)}}
    key = sha256_json(
        [
            session.protocol,
            asdict(recipe.adaptation),
            {"kind": method.kind, **own},
            shapes,
            ewc.draws,
            [clip_hash(c) for c in clips],
        ]
    )
    path = session.directory.shared / "fisher" / f"{key[:16]}.safetensors"
    stored = _read(path, key, len(shapes))
    if stored is None:
        captions, device = session.captions(clips, progress), session.models.dit.device
        tasks = (
            task_of(session.experiment, Known(clip.id, latents_of(clip), captions[clip.id].to(device)))
            for clip in clips
        )
        total = len(clips) * ewc.draws
        made = empirical_fisher(masters.parameters, tasks, ewc.draws, lambda done: progress("fisher", done, total))
        tensors = {f"{i:05d}": tensor for i, tensor in enumerate(made.diagonal)}
        hashes = {name: sha256_tensor(tensor) for name, tensor in tensors.items()}
        write_tensors(path, tensors, {"key": key, "numbers": str(made.numbers), **hashes})
        stored = made
    return Fisher([tensor.to(session.models.dit.device) for tensor in stored.diagonal], stored.numbers), key


def _read(path: Path, key: str, count: int) -> Fisher | None:
    """What is kept at a path; None where there is nothing, or not what its hashes say."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = [file.get_tensor(f"{i:05d}") for i in range(count)]
    except (OSError, SafetensorError):
        return None
    whole = all(metadata.get(f"{i:05d}") == sha256_tensor(tensor) for i, tensor in enumerate(tensors))
    return Fisher(tensors, int(metadata["numbers"])) if whole and metadata.get("key") == key else None
