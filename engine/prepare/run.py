"""The path: list the source, choose, convert what is not done yet, write manifest and rejects.

A clip's state is written last and marks it done, and nothing depends on the order in which clips end. So the same
command goes on where it was stopped, and ends in the same bytes however often that happened.
"""

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import Interrupted, UserError
from ..files import sha256_json, write_json
from ..stop import stop_flag
from .captions import caption_of, load_captions
from .output import STORAGE, begin, clip_path, locked, read_state, state_path, write_table
from .progress import Progress
from .sampling import Candidate, in_order
from .settings import Kind, Settings
from .sources import Reject, Source, open_source
from .workers import Job, end_workers, executor, usual_workers, work

MANIFEST = [
    *("path", "id", "caption", "start", "class", "group", "split1", "split2", "split3"),
    *("source", "source_start", "source_size", "frames", "fps", "size", "conditioning_frames", "bars"),
    *("frames_sha256", "source_sha256"),
]
REJECTS = ["source", "id", "class", "reason"]

State = dict[str, Any]
"""What was done with a video: facts about its clip, or under "rejected" why there is none."""


def prepare(
    kind: Kind,
    source: Path,
    out: Path,
    settings: Settings,
    *,
    splits: Path | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> int:
    """Prepare clips in `out`; return 0, or 1 when not one could be prepared.

    Raises UserError for what the user can mend, Interrupted on SIGINT or SIGTERM, OutOfTime on SIGUSR1; the same command then goes on.
    """
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies within the source {source}; give a folder elsewhere as --out")
    with locked(out), _system_errors_told():
        found = open_source(kind, source, splits)
        versions = {name: importlib.metadata.version(name) for name in ("av", "torch")}
        begun_with = begin(out, _identity(kind, found, settings), versions)
        captions = load_captions(out / "captions.txt", kind, found.candidates)
        states: dict[str, State] = {}
        with stop_flag() as stop, Progress(quiet) as progress:
            if begun_with != versions:
                progress.say(f"warning: begun with {begun_with}, now {versions}; other versions may give other bits")
            try:
                chosen = _choose_and_convert(
                    found, out, settings, workers or usual_workers(), states, stop.check, progress
                )
            except Interrupted as error:
                where = f"after {progress.done} of {progress.total} clips"
                raise type(error)(f"{where}; the same command goes on from there") from error
        if kind == "folder":
            place = {clip.id: number for number, clip in enumerate(found.candidates)}
            chosen.sort(key=lambda clip: place[clip.id])
        rows = [
            _row(clip, states[clip.id], settings, found.splits.get(clip.id.lower(), {}), caption_of(clip, captions))
            for clip in chosen
            if "rejected" not in states[clip.id]
        ]
        rejects = found.refused + [
            Reject(clip.source, states[clip.id]["rejected"], clip.id, clip.label)
            for clip in found.candidates
            if "rejected" in states.get(clip.id, {})
        ]
        write_table(out / "manifest.csv", MANIFEST, rows)
        write_table(out / "rejects.csv", REJECTS, [_reject_row(reject) for reject in rejects])
    if settings.count is not None and len(chosen) < settings.count:
        print(f"{source} has {len(found.candidates)} clips to choose from, not the {settings.count} asked for")
    print(f"prepared {len(rows)}, rejected {len(rejects)}{f' (see {out}/rejects.csv)' if rejects else ''}")
    return 0 if rows else 1


@contextmanager
def _system_errors_told() -> Iterator[None]:
    """Say in one sentence that the disk is full or cannot be written; what is finished stays."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error}; make room or mend the folder, and run the same command again") from error


def _choose_and_convert(
    found: Source,
    out: Path,
    settings: Settings,
    workers: int,
    states: dict[str, State],
    check: Callable[[], None],
    progress: Progress,
) -> list[Candidate]:
    """The chosen clips, each with its state in `states`; with `replace`, none of them rejected while there are others.

    Taking a clip off the list never pushes another out of the sample, so each round only adds clips.
    """
    while True:
        rejected = {clip_id for clip_id, state in states.items() if "rejected" in state} if settings.replace else set()
        choice = (clip for clip in found.candidates if clip.id not in rejected)
        chosen = in_order(choice, settings.seed)[: settings.count]
        new = [clip for clip in chosen if clip.id not in states]
        if not new:
            return chosen
        progress.expect(len(new))
        states |= {clip.id: state for clip in new if (state := read_state(out, clip.id)) is not None}
        missing = [clip for clip in new if clip.id not in states]
        progress.finished(len(new) - len(missing))
        if missing:
            _convert(found, missing, out, settings, min(workers, len(missing)), states, check, progress)


def _convert(
    found: Source,
    missing: Sequence[Candidate],
    out: Path,
    settings: Settings,
    workers: int,
    states: dict[str, State],
    check: Callable[[], None],
    progress: Progress,
) -> None:
    """Convert clips side by side and add their states. No more than one unpacked file waits for a worker."""
    pending: dict[Future[State], tuple[Candidate, Path]] = {}

    def finish(clip: Candidate, state: State) -> None:
        states[clip.id] = state
        progress.finished()
        if reason := state.get("rejected"):
            progress.say(f"rejected {clip.source}: {reason}")

    def collect(at_most: int) -> None:
        """Wait until no more than `at_most` clips are pending."""
        while len(pending) > at_most:
            done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            check()
            for future in done:
                state = future.result()
                clip, video = pending.pop(future)
                _remove_unpacked(video, out)
                finish(clip, state)

    with ExitStack() as at_end:
        at_end.callback(lambda: [_remove_unpacked(video, out) for _, video in pending.values()])
        pool = executor(workers)
        at_end.callback(lambda: pool.shutdown(cancel_futures=True))
        try:
            for clip, video in found.files(missing, out):
                check()
                if isinstance(video, Path):
                    pending[pool.submit(work, Job(clip.id, video, out, settings))] = clip, video
                else:
                    write_json(state_path(out, clip.id), {"rejected": video})
                    finish(clip, {"rejected": video})
                collect(workers if workers > 1 else 0)
            collect(0)
        except BrokenProcessPool as error:
            check()
            raise UserError(
                "a worker process was killed, often for want of memory; run the same command again, with fewer --workers"
            ) from error
        except BaseException:
            end_workers()
            raise


def _remove_unpacked(video: Path, out: Path) -> None:
    if video.parent == out:  # a source's own videos never lie there
        video.unlink(missing_ok=True)


def _identity(kind: Kind, found: Source, settings: Settings) -> dict[str, Any]:
    """What prepared clips depend on. The source's place is not part of it, its clips' names and sizes are."""
    listed = sorted((clip.source, clip.size) for clip in found.candidates)
    videos = f"{len(listed)} videos, SHA-256 of names and sizes {sha256_json(listed)[:16]}"
    return {"kind": kind, "source": videos, **asdict(settings), "storage": STORAGE}


def _row(clip: Candidate, state: State, settings: Settings, splits: dict[int, str], caption: str) -> dict[str, Any]:
    return {
        "path": f"clips/{clip_path(Path(), clip.id).name}",
        "id": clip.id,
        "caption": caption,
        "start": 0,
        "class": clip.label,
        "group": clip.group,
        **{f"split{number}": splits.get(number, "") for number in (1, 2, 3)},
        "source": clip.source,
        "source_start": state["source_start"],
        "source_size": state["source_size"],
        "frames": settings.frames,
        "fps": f"{settings.fps:g}",
        "size": f"{settings.width}x{settings.height}",
        "conditioning_frames": settings.conditioning_frames,
        "bars": " ".join(map(str, state["bars"])),
        "frames_sha256": state["frames_sha256"],
        "source_sha256": state["source_sha256"],
    }


def _reject_row(reject: Reject) -> dict[str, str]:
    return {"source": reject.source, "id": reject.id, "class": reject.label, "reason": reject.reason}
