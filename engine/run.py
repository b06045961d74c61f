"""A recipe, run: every arm on every clip, each result written as soon as it is there.

On a GPU the next clip is read, and the last one finished, while the device works on the one between (overlap.py): a result is then on
disk before the next but one begins.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from .clip import Known, Outcome, Progress, continue_clip, timed
from .cluster.attempts import persist
from .cluster.machine import NO_SPACE, system_errors_told
from .cluster.place import share_compile_cache, this_place, under_torchrun
from .cluster.presence import Presence, present
from .continual import Carried
from .data.clips import Clip, clip_hash
from .data.prepared import check_prepared
from .data.read import read_clip
from .data.video import to_model
from .diagnostics import Curves, HeldOut
from .errors import Interrupted, MachineFailed
from .files import remove_abandoned
from .fisher import prepare_fisher, validation_clips
from .gate import decide
from .methods import adapts
from .methods.none import NoAdapter
from .methods.protocol import Adapter, GradientAdapter
from .models.checkpoint import state_hash
from .models.stdit3 import Caption
from .overlap import Begun, Overlap, pays
from .plan import plan_lines
from .preflight import preflight
from .progress import RunProgress, result_line
from .records import write_failure, write_head
from .result import Finish, Shown, record
from .search import confirmation, summarise, trajectories
from .session import Session
from .start import prepare
from .stop import StopFlag, stop_flag
from .study import run_study, trials_left
from .summary import marks_of, print_summary, write_comparisons, write_last_summary, write_summary

if TYPE_CHECKING:
    from .recipe import Recipe

Made = TypeVar("Made")


def run(recipe: "Recipe", *, batch_start: int | None = None, batch_end: int | None = None, quiet: bool = False) -> int:
    """Run a recipe on clips batch_start .. batch_end - 1; returns the exit status.

    0: every clip has a result; 1: some clips failed (each is named with its reason); 130: stopped by SIGINT or SIGTERM, 75: by
    SIGUSR1, and the same command goes on where it stopped. Of several tasks that srun or torchrun started together, each takes
    its share of the clips. Raises UserError for what concerns the whole run, MachineFailed where a GPU or file system fails.
    """
    place = this_place()
    share_compile_cache(Path(recipe.output_dir))
    session = prepare(recipe, batch_start, batch_end, place, print if not quiet else lambda text: None)
    directory, arms = session.directory, list(session.arms)
    todo = session.unfinished()
    trained = dict.fromkeys(todo, 0)
    for arm in [arm for arm, waiting in todo.items() if waiting]:
        adapter = session.attach(arm)  # what the network cannot take is said before the first clip
        trained[arm] = adapter.change().trained
        adapter.detach()
    if not quiet and len(arms) > 1:
        print("\n".join(plan_lines(session, todo, trained)), flush=True)
    failed = 0
    clips = sum(map(len, todo.values()))
    optuna = recipe.search is not None and recipe.search.sampler == "optuna"
    if optuna:
        clips += trials_left(session, place, batch_start, batch_end) * len(session.clips)
    with (
        system_errors_told(directory.root),
        stop_flag() as stop,
        RunProgress(clips, quiet) as progress,
        present(directory.root, clips) as presence,
    ):
        write_head(session)
        remove_abandoned(directory.root, (directory.root / "recipe.yaml").stat().st_mtime)
        if clips:
            session = replace(session, marks=session.marks + preflight(session, partial(read, session)))
        for warning in session.warnings:
            progress.say(f"warning: {warning}")
        try:
            for group in trajectories(recipe, arms):
                failed += run_arms(session, group, todo, progress, presence, stop)
            trials = []
            if optuna:
                trials = run_study(
                    session,
                    lambda one, arm, clips, halt: run_arms(one, [arm], {arm: clips}, progress, presence, stop, halt),
                    progress.say,
                )
                arms += dict.fromkeys(trial["arm"] for trial in trials)
            for sentence in write_comparisons(
                directory, session.clips, list(recipe.arms), recipe.window, bool(session.marks), stop.check
            ):
                progress.say(sentence)
        except Interrupted as reason:
            write_summary(directory, session.listed, arms)
            print(f"{reason}; finished clips are kept, and the same command goes on from here", file=sys.stderr)
            return reason.exit_status
        rows = write_last_summary(directory, session.listed, arms)
        searched = summarise(session, trials) if recipe.search else None
    shown = [arm for arm in arms if arm not in {trial["arm"] for trial in trials if trial["state"] != "complete"}]
    if not quiet:
        print_summary(rows, shown, tuple(dict.fromkeys([*session.marks, *marks_of(rows)])))
        print(f"results: {directory.root}   videos side by side: {directory.root / 'comparisons'}")
    if failed:
        where = directory.root / "arms" / "*" / "clips" / "*" / "failure.json"
        print(f"results missing: {failed}; the reasons are in {where}", file=sys.stderr)
        if under_torchrun():
            return 0  # or it would end the other tasks; `vidtta status` tells of the failed clips
    if searched and recipe.search and recipe.search.confirm and not failed:
        if not quiet:
            print(f"best on these clips: {searched['best']}; confirming it on {recipe.search.confirm}")
        return run(confirmation(recipe, searched), quiet=quiet)
    return 1 if failed else 0


def run_arms(
    session: Session,
    group: list[str],
    todo: dict[str, list[Clip]],
    progress: RunProgress,
    presence: Presence,
    stop: StopFlag,
    halt: Callable[[Clip], bool] | None = None,
) -> int:
    """One method on its clips, or several that share its trajectory, from the fewest steps to the most; returns how many results
    failed. Afterwards the network is bit for bit as before. halt(clip): whether to end before a clip, by the results so far.
    """
    waiting = {arm: {clip.id for clip in todo[arm]} for arm in group if todo[arm]}
    if not waiting:
        return 0
    arm = list(waiting)[-1]  # the one with the most steps passes through the others
    # In the order of what waits, where clips that took a process down come last; continual adaptation has an order of its own.
    clips = list({clip.id: clip for name in reversed(waiting) for clip in todo[name]}.values())
    if session.continual(arm):
        order = [clip.id for clip in session.clips]
        clips.sort(key=lambda clip: order.index(clip.id))

    def step(phase: str, done: int, total: int) -> None:
        progress.step(phase, done, total)
        stop.check(in_clip=phase != "captions")

    placebo = session.arms[arm].placebo
    others = [session.other(clip) for clip in clips] if placebo == "other_clip" else []
    earlier = [one for clip in clips for one in session.adapted_before(arm, clip)]
    captions = session.captions(list({clip.id: clip for clip in [*clips, *others, *earlier]}.values()), step)
    adapter = session.attach(arm)
    carried = Carried(session, arm, adapter, partial(known_of, session, captions))
    failed = 0

    def attempt(make: Callable[[tuple[str, ...]], Made], clip: Clip, now: list[str]) -> Made | None:
        """What make(retries) gives; None where the clip fails, whose reason is then recorded in the arms of `now`."""
        nonlocal failed
        try:
            return persist(make, session.models.dit, session.directory.root, stop.check, progress.say)
        except Interrupted:
            raise
        except MachineFailed as error:
            with suppress(OSError):
                write_failure(session, arm, clip, error)  # so that whoever goes on tries this clip last
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            for name in now:
                if session.directory.result(name, clip.id) is None:
                    failed += 1
                    reason = write_failure(session, name, clip, error)
                    progress.finished(f"{name}  {clip.id}  FAILED: {reason}")
            return None

    def settle(clip: Clip, now: list[str], finish: Finish, finished: Begun[dict[str, Any]]) -> None:
        result = attempt(lambda again: finish(again) if again else finished.result(), clip, now)
        if result is None:
            return
        for name in now:
            one = result if name == arm else session.directory.result(name, clip.id)
            progress.finished(result_line(name, clip.id, one or result))

    try:
        if isinstance(adapter, GradientAdapter) and (
            found := prepare_fisher(session, arm, adapter.masters, partial(known_latents, session), step)
        ):
            adapter.fisher = found[0]
        observer = curves_of(session, arm, step)
        with Overlap(pays(session.models.dit.device)) as overlap:
            for clip, loading in overlap.each(clips, partial(load, session)):
                stop.check()
                if halt:
                    overlap.settle()
                    if halt(clip):
                        break
                now = [name for name, ids in waiting.items() if clip.id in ids and not session.finished(name, clip)]
                if not now:
                    progress.finished(f"{arm}  {clip.id}  made by another task")
                    continue
                progress.clip(arm, clip.id)
                presence.clip(arm, clip.id)

                def begin(
                    retries: tuple[str, ...],
                    clip: Clip = clip,
                    now: list[str] = now,
                    loading: Begun[Shown] = loading,
                ) -> Finish:
                    if retries:
                        carried.forget()
                        loading = overlap.start(partial(load, session, clip))
                    carried.bring_to(clip, step)
                    snapshots = [name for name in now if name != arm]
                    finish = run_clip(
                        session, arm, clip, captions, adapter, step, observer, snapshots, retries, overlap, loading
                    )
                    carried.adapted_on(clip)
                    return finish

                finish = attempt(begin, clip, now)
                if finish is None:
                    carried.forget()
                    continue
                if overlap.on:
                    finish = partial(finish, waited=overlap.settle())
                overlap.hand_over(partial(settle, clip, now, finish, overlap.start(finish)))
    except MachineFailed:
        raise  # the process ends; a failed GPU would not restore anything
    except BaseException:
        adapter.detach()
        raise
    adapter.detach()
    if state_hash(session.models.dit) != session.models.hashes["dit"]:
        for name in waiting:
            for clip in clips:
                session.directory.remove_result(name, clip.id)
        raise RuntimeError(f"arm {arm} did not restore the network's weights; its results of this run were removed")
    return failed


def load(session: Session, clip: Clip) -> Shown:
    """The frames of a clip's window, at the recipe's rate and size, on the CPU.

    Raises UserError where the file does not give them, or gives others than its manifest says.
    """
    window, data = session.recipe.window, session.recipe.data
    content = clip_hash(clip)
    frames = read_clip(clip, frames=window.total_frames, fps=window.fps, height=data.height, width=data.width)
    check_prepared(clip, frames, window.fps)
    return Shown(content, frames, to_model(frames))


def read(session: Session, clip: Clip) -> Shown:
    """`load`, with the pixels on the device."""
    return on_device(session, load(session, clip))


def on_device(session: Session, shown: Shown) -> Shown:
    return replace(shown, pixels=shown.pixels.to(session.models.dit.device))


def curves_of(session: Session, arm: str, progress: Progress) -> Curves | None:
    """The diagnostics of an arm, where the recipe wants them and the arm adapts."""
    settings, recipe = session.recipe.diagnostics, session.recipe
    if not settings.wanted or not adapts(session.arms[arm].method):
        return None
    held_out = []
    if settings.held_out:
        clips = validation_clips(
            recipe.data, settings.held_out, settings.held_out_limit, session.listed, "diagnostics.held_out"
        )
        captions = session.captions(clips, progress)
        held_out = [HeldOut(known_of(session, captions, clip), read(session, clip).pixels) for clip in clips]
    return Curves(settings, session.experiment, session.score, held_out)


def known_of(session: Session, captions: dict[str, Caption], clip: Clip) -> Known:
    """All that a method may know of a clip."""
    return Known(clip.id, known_latents(session, clip), captions[clip.id].to(session.models.dit.device))


def known_latents(session: Session, clip: Clip) -> Tensor:
    """Latents of a clip's known frames, [1, C, K, h, w]."""
    shown = read(session, clip)
    return session.known_latents(clip, shown.content, shown.pixels)[0]


def run_clip(
    session: Session,
    arm: str,
    clip: Clip,
    captions: dict[str, Caption],
    adapter: Adapter,
    progress: Progress,
    curves: Curves | None,
    snapshots: Sequence[str],
    retries: tuple[str, ...],
    overlap: Overlap,
    loading: Begun[Shown],
) -> Finish:
    """One clip through one method: read, encode, adapt, sample, decode, score; returns what finishes and writes it, see `record`.

    snapshots: arms of fewer steps on the same trajectory, whose results are written on the way; retries: why it is tried again.
    """
    device, placebo = session.models.dit.device, session.arms[arm].placebo
    seconds: dict[str, float] = {}
    with timed(seconds, "read", device):
        shown = on_device(session, loading.result())
    latents, seconds["encode"] = session.known_latents(clip, shown.content, shown.pixels)
    with timed(seconds, "score", device):
        flow = session.begin_truth_flow(shown.pixels)
        truth_flow = overlap.start(partial(flow, overlap.processors)) if flow else None
    shown = replace(shown, truth_flow=truth_flow, read_seconds=loading.seconds)
    known = Known(clip.id, latents, captions[clip.id].to(device))
    decision = decide(session, arm, clip, shown.content, shown.frames, known, adapter)
    if decision and not decision.adapted:
        with adapter.suspended():
            outcome = continue_clip(session.experiment, known, NoAdapter(), progress=progress)
        return record(session, arm, clip, shown, seconds, None, retries, overlap, outcome, decision)
    other = known_of(session, captions, session.other(clip)) if placebo == "other_clip" else None

    def snapshot(name: str, outcome: Outcome) -> None:
        record(session, name, clip, shown, seconds, None, retries, overlap, outcome)()

    outcome = continue_clip(
        session.experiment,
        known,
        adapter,
        adapt_on=other,
        randomize=session.placebo_generator(clip.id) if placebo == "random" else None,
        keep_state="adapter" in session.recipe.keep,
        restore=not session.continual(arm),
        observer=curves,
        snapshots={session.steps(name): partial(snapshot, name) for name in snapshots},
        progress=progress,
    )
    return record(session, arm, clip, shown, seconds, curves, retries, overlap, outcome, decision)
