"""What a method made of a clip, as a result: scored and written, the device's share apart from the processors'.

A result's `cost.seconds` are those in which the run was at this clip and at no other, so they add up to the run's: `read` is waiting
until the frames are on the device, `score` scoring on the device and waiting for the clip before to be finished. What was done beside
the device's work on another clip took `cost.overlapped` (seconds of the thread: read, score, write); where nothing was, that key is
missing and `cost.seconds` hold all of it but for writing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .clip import Outcome, describe, timed
from .data.clips import Clip, clip_hash
from .diagnostics import Curves
from .files import sha256_json, sha256_tensor, write_json
from .gate import SEEN, Decision
from .overlap import Begun, Overlap
from .records import kept, write_kept
from .references import means
from .rundir import check_paired, clip_settings
from .session import Session

Finish = Callable[..., dict[str, Any]]
"""finish(again=(), waited=None) -> the result: the processors' share of scoring and writing one, which touches no device and may be
called again. again: retries of it; waited: None where the run waits for this, else the seconds that it waited for the clip before."""

CPU = torch.device("cpu")
CONTINUAL = "continual adaptation: a result depends on the clips before it in the list (adaptation.reset)"


@dataclass(frozen=True)
class Shown:
    """A clip's frames. content: hash of its file and start; frames: uint8 [F, 3, H, W]; pixels: [3, F, H, W] in [-1, 1];
    read_seconds: that reading took; truth_flow: of the real frames, where flow is scored; see `references.begin_truth_flow`.
    """

    content: str
    frames: Tensor
    pixels: Tensor
    read_seconds: float = 0.0
    truth_flow: Begun[Tensor] | None = None


def record(
    session: Session,
    arm: str,
    clip: Clip,
    shown: Shown,
    seconds: dict[str, float],
    curves: Curves | None,
    retries: tuple[str, ...],
    overlap: Overlap,
    outcome: Outcome,
    decision: Decision | None = None,
) -> Finish:
    """Do what of scoring and writing an outcome needs the device, or what lies on it; returns what does the rest.

    seconds: of reading, encoding and the begin of scoring; retries: why it was tried again; decision: the gate's.
    """
    window, pixels, flow = session.recipe.window, shown.pixels, shown.truth_flow
    seconds = seconds | outcome.seconds
    marks = [*session.marks, *([CONTINUAL] if session.continual(arm) else [])]
    if decision:
        seconds["adapt"] += decision.seconds
        marks += [SEEN] if decision.seen else []
    scoring: dict[str, float] = {}
    with timed(scoring, "score", session.models.dit.device):
        truth_flow = flow.result() if flow else None
        begun = [session.begin_scores(made, pixels, truth_flow) for made in (outcome.pixels, *outcome.more)]
    seconds["score"] = seconds.pop("score") + scoring["score"]  # the last key
    write_references = session.write_references(clip, shown.content, pixels, truth_flow)
    settings = session.settings(arm)
    made_from = {
        "scored frames": sha256_tensor(shown.frames[window.scored.start : window.scored.stop]),
        **outcome.made_from,
    }
    result = {
        "clip": clip.id,
        "arm": arm,
        **clip_settings(clip),
        "meta": clip.meta,
        "marks": marks,
        "warnings": [*session.warnings],
        "retries": [*retries],
        "keys": {"settings": sha256_json(settings), "protocol": sha256_json(session.protocol), "clip": shown.content},
        "settings": settings,
        "seeds": session.describe_seeds(clip.id),
        "window": session.describe_window(),
        "paths": session.describe_paths(),
        "adapted_on": {one.id: clip_hash(one) for one in session.adapts_on(arm, clip)},
        "made_from": made_from,
        "generated": sha256_tensor(outcome.latents),
        "adaptation": describe(outcome),
        **({"gate": decision.describe()} if decision else {}),
    }
    cost: dict[str, Any] = {"peak_memory_bytes": outcome.peak_memory_bytes, **outcome.compiled}
    if outcome.layers:
        cost["layers"] = outcome.layers
    if arm != session.baseline and (baseline := session.directory.result(session.baseline, clip.id)):
        check_paired(baseline, result)
    files, found_curves = kept(session, shown.frames, outcome), curves and curves.found
    beside = {"read": shown.read_seconds, "score": flow.seconds if flow else 0.0} if overlap.on else {}

    def finish(again: tuple[str, ...] = (), waited: float | None = None) -> dict[str, Any]:
        took: dict[str, float] = {}
        with timed(took, "score", CPU):
            scores, *more = (one(overlap.processors) for one in begun)
        with timed(took, "write", CPU):
            write_references(overlap.processors)
            write_kept(session, arm, clip, files)
            if found_curves is not None:
                write_json(session.directory.clip(arm, clip.id) / "curves.json", found_curves)
        if waited is None:
            spent, overlapped = seconds | {"score": seconds["score"] + took["score"]}, beside
        else:
            spent = seconds | {"score": seconds["score"] + waited}
            overlapped = beside | {"score": beside["score"] + took["score"], "write": took["write"]}
        finished = result | {
            "retries": [*retries, *again],
            "scores": scores,
            **({"samples": [means(one) for one in (scores, *more)]} if more else {}),
            "cost": {"seconds": spent, **({"overlapped": overlapped} if overlapped else {}), **cost},
        }
        session.directory.write_result(arm, clip.id, finished)
        return finished

    return finish
