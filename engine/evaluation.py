"""The loss at fixed noise levels, against predicting zero: whether a network predicts at all, and in the right direction.

The official evaluation's timesteps: the ten interior points of linspace(0, 1000, 12), without the timestep transform.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .adaptation import Draw, Task
from .errors import UserError
from .seeds import normal

TIMESTEPS = tuple(torch.linspace(0, 1000, 12)[1:-1].tolist())


class Level(NamedTuple):
    """One noise level. t: 0..1000; loss: of the network; zero_loss: of predicting zero."""

    t: float
    loss: float
    zero_loss: float


def fixed_draw(task: Task, index: int) -> Draw:
    """The draw at one of TIMESTEPS; its noise depends on (recipe seed, clip, timestep) alone."""
    noise = normal(tuple(task.latents.shape), task.recipe_seed, task.clip_id, "evaluation", index)
    return Draw(torch.tensor([TIMESTEPS[index]], device=task.latents.device), noise.to(task.latents.device))


@torch.no_grad()
def evaluate(task: Task) -> Iterator[Level]:
    """The loss at each timestep under the weights in force; the noise depends on (recipe seed, clip, timestep) alone."""
    text = task.captions()
    for index, t in enumerate(TIMESTEPS):
        draw = fixed_draw(task, index)
        yield Level(t, task.velocity_loss(draw, text).item(), task.zero_loss(draw).item())


def check_predicts(levels: list[Level], clip_id: str) -> None:
    """Raise UserError unless the mean loss is below that of predicting zero; a loss that is not a number fails too."""
    loss, zero = (sum(values) / len(levels) for values in list(zip(*levels, strict=True))[1:])
    if not loss < zero:
        raise UserError(
            f"model.dit predicts worse than zero on clip {clip_id} before adapting (loss {loss:.4f}, of zero {zero:.4f}): the "
            "weights are untrained, or a sign or a scale is wrong, and adapting would look like learning; run "
            "`vidtta doctor --weights`, or set model.allow_untrained=true to run all the same"
        )
