"""Which clips of a list a search chooses by, and which confirm its choice: `search.confirm: split` halves the list by groups.

Every second group, in the order of the list, is left to confirm: clips cut from one video stay together, and in a list sorted by class
both halves have all classes. A clip without a group is one by itself.
"""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from .data.clips import WORLD, Clip, list_clips
from .errors import UserError
from .files import write_text
from .predictor import group_name

if TYPE_CHECKING:
    from .recipe import Recipe

SPLIT = "split"


def split_by_group(clips: list[Clip]) -> tuple[list[Clip], list[Clip]]:
    """The clips to choose by and those to confirm by, each in the order of the list."""
    groups = {name: k for k, name in enumerate(dict.fromkeys(group_name(clip.meta, clip.id) for clip in clips))}
    halves: tuple[list[Clip], list[Clip]] = ([], [])
    for clip in clips:
        halves[groups[group_name(clip.meta, clip.id)] % 2].append(clip)
    return halves


def clips_of(recipe: "Recipe") -> list[Clip]:
    """The clips that a run of the recipe works on: all of `data`, or the half that a search chooses by."""
    clips = list_clips(recipe.data, Path.cwd())
    return _halves(recipe, clips)[0] if recipe.search and recipe.search.confirm == SPLIT else clips


def confirming_clips(recipe: "Recipe") -> list[Clip]:
    """The other half, at most `search.confirm_limit` of it."""
    assert recipe.search is not None
    return _halves(recipe, list_clips(recipe.data, Path.cwd()))[1][: recipe.search.confirm_limit]


def _halves(recipe: "Recipe", clips: list[Clip]) -> tuple[list[Clip], list[Clip]]:
    if recipe.data.clips.startswith(WORLD):
        raise UserError(
            f"search.confirm: {SPLIT} halves lists of files, and {recipe.data.clips} has none; name other clips"
        )
    halves = split_by_group(clips)
    if not halves[1]:
        raise UserError(
            f"search.confirm: {SPLIT} needs clips of two groups, and data.clips has one; name other clips, or leave it empty"
        )
    return halves


def write_manifest(path: Path, clips: list[Clip]) -> None:
    """Write clips that lie in files as a manifest which lists the same clips wherever it lies."""
    columns = ["path", "id", "caption", "start", *dict.fromkeys(name for clip in clips for name in clip.meta)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for clip in clips:
        row = {"path": clip.path.absolute(), "id": clip.id, "caption": clip.caption, "start": clip.start}
        writer.writerow(clip.meta | row)
    write_text(path, text.getvalue())
