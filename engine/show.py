"""`vidtta show RUN CLIP`: all that a run says of one clip, and on request its videos side by side."""

from pathlib import Path
from typing import Any

from .data.video import read_window, side_by_side, write_video
from .errors import UserError
from .recipe_files import perhaps
from .references import REFERENCES
from .rundir import RunDirectory, read_json
from .summary import video_size

SCORES = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM", 4), "lpips": ("LPIPS", 4)}


def show(root: Path, clip: str, *, arms: list[str] | None = None, video: Path | None = None) -> int:
    """Print a clip's scores, differences, losses, costs and files; returns the exit status.

    arms: these alone; video: also write `baseline | arms | truth` with labels there. Raises UserError for a clip or an arm that
    the run does not have, and where a video that is asked for was not kept.
    """
    directory = RunDirectory(root)
    results = _results(directory, clip)
    baseline = next((arm for arm, r in results.items() if r and r["settings"]["method"]["kind"] == "none"), "")
    if unknown := [arm for arm in arms or () if arm not in results]:
        raise UserError(
            f"{root}: no arm {unknown[0]!r}{perhaps(unknown[0], list(results))}; it has {', '.join(results)}"
        )
    if arms:
        results = {arm: r for arm, r in results.items() if arm in arms or arm == baseline}
    _print(directory, clip, results, baseline)
    if video is not None:
        _write(directory, clip, results, baseline, video)
        print(f"side by side: {video}")
    return 0


def _results(directory: RunDirectory, clip: str) -> dict[str, dict[str, Any] | None]:
    """By arm, the baseline first, the clip's result; None where it failed. Arms that have not reached the clip are left out."""
    folders = sorted(directory.root.glob("arms/*/clips"))
    found: dict[str, dict[str, Any] | None] = {}
    for folder in folders:
        arm = folder.parent.name
        result = directory.result(arm, clip)
        if result or directory.failure(arm, clip):
            found[arm] = result
    if not found:
        known = sorted({path.name for folder in folders for path in folder.iterdir()})
        if not known:
            raise UserError(f"{directory.root}: no result lies in it; give the output_dir of a run")
        raise UserError(
            f"{directory.root}: no clip {clip!r}{perhaps(clip, known)}; it has {len(known)}, for example {known[0]}"
        )
    first = [arm for arm, result in found.items() if result and result["settings"]["method"]["kind"] == "none"]
    return {arm: found[arm] for arm in [*first, *(arm for arm in found if arm not in first)]}


def _print(directory: RunDirectory, clip: str, results: dict[str, dict[str, Any] | None], baseline: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    made = [result for result in results.values() if result]
    if made:
        told = made[0]
        console.print(f"{clip}: {told['caption'] or 'no caption'}")
        for name, value in told["meta"].items():
            console.print(f"  {name}: {value}")
        for mark in dict.fromkeys(mark for result in made for mark in result["marks"]):
            console.print(f"NOTE: {mark}")
    table = Table(show_lines=True)
    table.add_column("arm", overflow="fold")
    for head in (*(name for name, _ in SCORES.values()), "loss", "adapt s", "peak GiB"):
        table.add_column(head, no_wrap=True)
    before = results.get(baseline)
    for arm, result in results.items():
        if result:
            table.add_row(arm, *(_score(result, before, score) for score in SCORES), _losses(result), *_cost(result))
    references = (read_json(directory.reference(clip)) or {}).get("scores", {})
    for name, scores in references.items():
        name = REFERENCES.get(name, name)
        cells = (_number(scores.get(score, {}).get("mean"), digits) for score, (_, digits) in SCORES.items())
        table.add_row(name, *cells, "", "", "")
    console.print(table)
    for arm, result in results.items():
        if not result:
            console.print(f"{arm}: failed: {(directory.failure(arm, clip) or {}).get('reason')}")
    for arm, path in _videos(directory, clip, results).items():
        console.print(f"{arm}: {path}")
    if (together := directory.comparison(clip)).exists():
        console.print(f"side by side: {together}")


def _score(result: dict[str, Any], before: dict[str, Any] | None, score: str) -> str:
    """The score, below it the difference to the baseline."""
    digits = SCORES[score][1]
    value = result["scores"].get(score, {}).get("mean")
    base = before and before is not result and before["scores"].get(score, {}).get("mean")
    if value is None or not isinstance(base, float):
        return _number(value, digits)
    return f"{value:.{digits}f}\n{value - base:+.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _losses(result: dict[str, Any]) -> str:
    """First and last loss, below them the last one of predicting zero."""
    adaptation = result["adaptation"]
    if not adaptation["losses"]:
        return "-"
    zero = f"\nzero {adaptation['zero_losses'][-1]:.3f}" if adaptation["zero_losses"] else ""
    return f"{adaptation['losses'][0]:.3f} > {adaptation['losses'][-1]:.3f}{zero}"


def _cost(result: dict[str, Any]) -> tuple[str, str]:
    memory = result["cost"]["peak_memory_bytes"]
    return _number(result["cost"]["seconds"]["adapt"], 2), _number(memory and memory / 2**30, 2)


def _videos(directory: RunDirectory, clip: str, results: dict[str, dict[str, Any] | None]) -> dict[str, Path]:
    """The videos that were kept, by arm, the truth last."""
    found = {arm: directory.clip(arm, clip) / "video.mp4" for arm in results}
    contents = [result["keys"]["clip"] for result in results.values() if result]
    if contents:
        found["truth"] = directory.truth(clip, contents[0])
    return {arm: path for arm, path in found.items() if path.exists()}


def _write(
    directory: RunDirectory, clip: str, results: dict[str, dict[str, Any] | None], baseline: str, target: Path
) -> None:
    videos = _videos(directory, clip, results)
    made = next((result for result in results.values() if result), None)
    if made is None or "truth" not in videos or not any(arm in videos for arm in results):
        raise UserError(f"{directory.root}: no videos of clip {clip} were kept; run with keep=[video]")
    window = made["settings"]["protocol"]["window"]
    height, width = video_size(videos["truth"])
    columns = [
        (arm, read_window(path, frames=window["total_frames"], fps=window["fps"], height=height, width=width))
        for arm, path in videos.items()
    ]
    note = "untrained" if made["marks"] else ""
    write_video(target, side_by_side(columns, window["known_frames"], note), window["fps"])
