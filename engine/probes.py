"""Whether what is given to the networks depends on what it must not depend on: change one thing, compare bits.

A leak shows in no loss and in no score but as a method that does too well. Each probe runs the code that a run runs, once
before the first clip: three encodings of the known frames, and three times the network up to its first layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .adaptation import Draw, Task
from .errors import UserError
from .flow import NUM_TIMESTEPS
from .window import Window

SAME_LATENTS = 0.1  # relative distance: far above what another card rounds, far below that to another clip's latents


def check_latents(encode: Callable[[Tensor], Tensor], latents: Tensor, pixels_3FHW: Tensor, window: Window) -> None:
    """Check a clip's known latents, [1, C, K, h, w], against what `encode` makes of its pixels and of altered ones.

    Raises UserError where they depend on a frame after the known ones, where a known frame that the window promises to use
    does not count, and where they are not this clip's.
    """
    known, used = window.known_frames, encode(pixels_3FHW)
    if not torch.equal(encode(_altered(pixels_3FHW, 1, known, window.total_frames)), used):
        raise UserError(
            f"the known latents depend on frames after the {known} known ones: those must be encoded alone, or scores measure a leak"
        )
    left_out = 16 if window.known_chunks == "whole" else 4  # fewer than that many frames have no latent of their own
    if torch.equal(encode(_altered(pixels_3FHW, 1, max(0, known - left_out), known)), used):
        raise UserError(
            f"the last {left_out} of {known} known frames do not count: fewer frames condition than window.known_frames says"
        )
    apart = ((latents.float() - used.float()).norm() / used.float().norm()).item()
    if not apart < SAME_LATENTS:
        raise UserError(
            f"the stored known latents are not those of the clip's known frames (relative distance {apart:.2g}); "
            "remove shared/latents and the arms of this run directory"
        )


def check_task(task_on: Callable[[Tensor], Task], latents: Tensor) -> None:
    """Check what adapting shows the network of the frames to predict, at the highest noise level: nothing.

    There the noised latents are the noise alone, so all that enters the first layer must be the same bits whatever those
    frames hold. task_on: the task on known latents; latents: a clip's, [1, C, K, h, w]. Raises UserError where the input
    depends on the frames to predict, or does not depend on those that condition.
    """
    task, frames = task_on(latents), latents.shape[2]
    given = 0 if task.settings.objective == "denoise" else task.settings.context_latents
    draw = Draw(torch.full((1,), NUM_TIMESTEPS, device=latents.device), task.draw(0).noise)
    before = _first_input(task, draw)
    if not _same(_first_input(task_on(_altered(latents, 2, given, frames)), draw), before):
        raise UserError(
            "adapting shows the network the frames that it is to predict: its input at the highest noise level depends on them"
        )
    if given and _same(_first_input(task_on(_altered(latents, 2, 0, given)), draw), before):
        raise UserError(
            "adapting does not show the network the frames that condition: its input does not depend on them"
        )


def _altered(value: Tensor, dim: int, first: int, last: int) -> Tensor:
    """A copy with random numbers in [-1, 1) at positions first .. last - 1 of an axis."""
    copy = value.clone()
    part = copy.narrow(dim, first, last - first)
    part.copy_(torch.rand(part.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    return copy


class _Seen(Exception):
    """Ends a forward pass whose first layer has been reached; its argument: the tensors that this was given."""


class _Stop:
    """In place of a path for the layers (models/paths.py): the first one is not computed."""

    def prepare(self, *_: object) -> Callable[..., Tensor]:
        def stop(layer: nn.Module, *inputs: object) -> Tensor:
            raise _Seen([value for value in inputs if isinstance(value, Tensor)])

        return stop


@torch.no_grad()
def _first_input(task: Task, draw: Draw) -> list[Tensor]:
    """The tensors that the loss of a draw gives the first layer; nothing after that runs."""
    paths = task.model.paths
    task.model.paths = _Stop()  # type: ignore[assignment]
    try:
        task.loss(draw)
    except _Seen as seen:
        return seen.args[0]
    finally:
        task.model.paths = paths
    raise AssertionError("the network's first layer did not run")


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
