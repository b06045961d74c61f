"""The arms of a run: its methods, and the placebos that show how much of a method's gain any change of the weights brings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .methods import AnyMethod
from .search import cells

if TYPE_CHECKING:
    from .recipe import Recipe

Placebo = Literal["other_clip", "random"]
PLACEBOS: dict[Placebo, str] = {"other_clip": "adapted on another clip", "random": "a random change of equal norm"}


@dataclass(frozen=True)
class Arm:
    """A method under a name. placebo: adapt on the next clip of the list instead, or adapt and then replace the change of each
    trained tensor by a random one of equal norm; None is the method itself.
    """

    name: str
    method: AnyMethod
    placebo: Placebo | None = None
    gate: str | None = None
    """The arm whose gate decides on each clip, its own or that of the arm it is a placebo of; None adapts to every clip."""


def arms_of(recipe: "Recipe") -> dict[str, Arm]:
    """All arms in the order they run: the recipe's own, the cells of a search in the place of the arm that it searches, then the
    placebos of those it names, as `<arm>-other_clip` and so on."""
    gate = {name: name for name in recipe.gate}
    arms = [
        Arm(name, method, gate=gate.get(name))
        for name, method in recipe.arms.items()
        if not recipe.search or name != recipe.search.arm
    ]
    if recipe.search and recipe.search.sampler == "grid":
        grid = cells(recipe.search, recipe.arms[recipe.search.arm])
        arms += [Arm(name, method) for name, (_, method) in grid.items()]
    arms += [
        Arm(f"{name}-{placebo}", recipe.arms[name], placebo, gate.get(name))
        for name in recipe.placebos
        for placebo in PLACEBOS
    ]
    return {arm.name: arm for arm in arms}
