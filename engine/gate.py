"""The gate: adapt to a clip only where a saved predictor foresees a gain, from what is known of the clip before adapting.

A clip that is not adapted to is continued by the base network, so its video is the baseline's to the bit. The features and the loss before
the first step are made for every clip, adapted to or not, and their time counts as adapting.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adaptation import Task
from .clip import Known, task_of
from .data.clips import Clip
from .errors import UserError
from .methods import AnyMethod, Delta, DeltaClosedForm
from .methods.protocol import Adapter
from .predictor import Fitted, fitted_settings, frame_features, group_name, load_predictor
from .rundir import first_difference

if TYPE_CHECKING:
    from .recipe import Recipe
    from .session import Session

SEEN = "the gate's predictor was fitted on this clip or its group, so what it foresees here says nothing of other clips"


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Adapt to some clips only."""

    predictor: str
    """File of `vidtta adaptive RUN --arm ARM --out FILE`, fitted on clips that this method adapted to with these settings."""
    threshold: float = 0.0
    """Adapt where the foreseen gain, dB of PSNR, is above this."""


@dataclass(frozen=True)
class Decision:
    """What the gate said of a clip. predicted: dB; seconds: that it took; seen: whether the predictor was fitted on the clip or on
    others of its group."""

    predicted: float
    threshold: float
    adapted: bool
    features: dict[str, Any]
    seconds: float
    seen: bool

    def describe(self) -> dict[str, Any]:
        """As a result holds it; plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Gate:
    """A loaded predictor. sha256: of its file's content, part of what shapes a result."""

    fitted: Fitted
    sha256: str
    threshold: float

    def describe(self) -> dict[str, Any]:
        """What of the gate shapes an arm's results."""
        return {"predictor": self.sha256, "threshold": self.threshold}

    def decide(
        self, clip: Clip, content: str, known_F3HW: Tensor, task: Task, adapter: Adapter, method: AnyMethod
    ) -> Decision:
        """Whether to adapt. content: the clip's hash; known: its known frames alone, uint8 [F, 3, H, W]; task: on them."""
        start = time.perf_counter()
        features: dict[str, Any] = dict(frame_features(known_F3HW.cpu().numpy()))
        with adapter.suspended():
            features["first_loss"] = first_loss(task, method)
        features["class"] = clip.meta.get("class", "")
        predicted = float(self.fitted.predictor.predict([features])[0])
        seen = content in self.fitted.videos or group_name(clip.meta, clip.id) in self.fitted.groups
        seconds = time.perf_counter() - start
        return Decision(predicted, self.threshold, predicted > self.threshold, features, seconds, seen)


def decide(
    session: "Session", arm: str, clip: Clip, content: str, frames_F3HW: Tensor, known: Known, adapter: Adapter
) -> Decision | None:
    """What an arm's gate says of a clip; None where it has none. frames: the clip's, of which the known ones alone are used."""
    gate = session.gate(arm)
    if gate is None:
        return None
    frames, task = frames_F3HW[: session.recipe.window.known_frames], task_of(session.experiment, known)
    return gate.decide(clip, content, frames, task, adapter, session.arms[arm].method)


@torch.no_grad()
def first_loss(task: Task, method: AnyMethod) -> float:
    """The loss that a method's first step begins from: on draw 0, and of a delta, whose steps take all draws, their mean."""
    draws = task.settings.draws if isinstance(method, Delta | DeltaClosedForm) else 1
    assert draws != "fresh"
    text = task.captions()
    return torch.stack([task.loss(task.draw(k), text) for k in range(draws)]).mean().item()


def load_gate(name: str, settings: GateSettings, arm_settings: dict[str, Any]) -> Gate:
    """Read an arm's predictor. Raises UserError where it is none, or was fitted to a method under other settings than the arm's."""
    try:
        fitted, digest = load_predictor(Path(settings.predictor))
    except UserError as error:
        raise UserError(f"gate.{name}.predictor: {error}") from error
    ours = fitted_settings(arm_settings)
    if ours != fitted.settings:
        raise UserError(
            f"gate.{name}.predictor: {settings.predictor} foresees the gain of other settings "
            f"({first_difference(fitted.settings, ours)}); fit one on a run with these, or change them back"
        )
    return Gate(fitted, digest, settings.threshold)


def check_gates(recipe: "Recipe") -> str | None:
    """What is wrong with a recipe's gates, a sentence; None if nothing is."""
    from .methods import adapts

    for name in recipe.gate:
        if name not in recipe.arms or not adapts(recipe.arms[name]):
            adapting = [arm for arm, method in recipe.arms.items() if adapts(method)]
            return f"names {name!r}, which is no arm that adapts; those are {adapting}"
        if recipe.search and recipe.search.arm == name:
            return f"names {name!r}, which search searches; a predictor belongs to one setting, so leave one of the two out"
    if recipe.gate and recipe.adaptation.reset != "clip":
        return f"needs adaptation.reset to be clip, was {recipe.adaptation.reset}; leave one of the two out"
    if recipe.gate and recipe.window.known_frames < 2:
        return f"needs two known frames for its features, was window.known_frames={recipe.window.known_frames}"
    return None
