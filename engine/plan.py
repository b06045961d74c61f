"""What a run of several arms will do, said before it begins: clips, what is done, time, what is shared, disk.

Time is estimated from results of this run directory alone: an arm's own, else its steps at the mean seconds a step of arms of the same
kind, on top of the baseline's other phases. An arm that nothing measured yet is said to be unknown, never guessed.
"""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.clips import Clip
    from .session import Session

PHASES = ("read", "encode", "sample", "decode", "score")


def plan_lines(session: "Session", todo: Mapping[str, list["Clip"]], trained: Mapping[str, int]) -> Iterator[str]:
    """Sentences to print. todo: clips without a result, by arm; trained: numbers that an arm trains."""
    measured = {arm: _costs(session, arm) for arm in session.arms}
    clips = len(session.clips)
    yield f"plan: {clips} clips, {len(session.arms)} arms; shared by all: known latents, captions, references, the baseline"
    total, unknown = 0.0, []
    for arm, waiting in todo.items():
        seconds = estimate(session, arm, measured)
        cost = "time not measured yet" if seconds is None else f"about {seconds:.1f} s a clip"
        yield f"  {arm}: {clips - len(waiting)} of {clips} done, {cost}"
        if seconds is not None:
            total += seconds * len(waiting)
        elif waiting:
            unknown.append(arm)
    rest = f", and {len(unknown)} arms not measured yet" if unknown else ""
    yield f"  left: about {total / 60:.1f} min{rest}"
    if size := disk(session, todo, trained):
        yield f"  keep [{', '.join(session.recipe.keep)}] will take about {size / 2**20:,.1f} MiB, videos not counted"


def _costs(session: "Session", arm: str) -> list[dict[str, Any]]:
    found = (session.directory.result(arm, clip.id) for clip in session.listed)
    return [result["cost"]["seconds"] | {"steps": result["adaptation"]["steps"]} for result in found if result]


def estimate(session: "Session", arm: str, measured: Mapping[str, list[dict[str, Any]]]) -> float | None:
    """Seconds a clip of an arm, None where nothing measured tells. Arms that share a trajectory are counted as if alone."""
    if own := measured[arm]:
        return fmean(sum(row[phase] for phase in (*PHASES, "adapt")) for row in own)
    method, baseline = session.arms[arm].method, measured[session.baseline]
    same = [
        row["adapt"] / row["steps"]
        for name, rows in measured.items()
        if session.arms[name].method.kind == method.kind
        for row in rows
        if row["steps"]
    ]
    if not (baseline and same):
        return None
    return fmean(sum(row[phase] for phase in PHASES) for row in baseline) + session.steps(arm) * fmean(same)


def disk(session: "Session", todo: Mapping[str, list["Clip"]], trained: Mapping[str, int]) -> int:
    """Bytes that latents and adapters of the clips to do will take; both are float32."""
    data, window, keep = session.recipe.data, session.recipe.window, session.recipe.keep
    latents = 4 * session.models.dit.config.in_channels * window.latent_frames * (data.height // 8) * (data.width // 8)
    return sum(
        len(waiting) * (("latents" in keep) * latents + ("adapter" in keep) * 4 * trained[arm])
        for arm, waiting in todo.items()
    )
