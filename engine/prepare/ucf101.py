"""UCF-101's names, captions and official splits.

A clip is v_CLASS_gNN_cNN.avi: the NN-th group of a class comes from one video (or a few of one place), so its clips look
alike. The folder HandstandPushups holds v_HandStandPushups_*: classes are compared without regard to case.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from ..data.captions import read_captions
from ..errors import UserError

CLIP_NAME = re.compile(r"v_([A-Za-z]+)_(g\d+)_c\d+")
LIST_NAME = re.compile(r"(train|test)list0([1-3])\.txt")
LIST_LINE = re.compile(r"(?:[^/\s]+/)?(v_[A-Za-z]+_g\d+_c\d+)\.avi(?: \d+)?")
SPLITS_ZIP = "UCF101TrainTestSplits-RecognitionTask.zip"
CAPTIONS = Path(__file__).with_name("ucf101_captions.txt")

Splits = dict[str, dict[int, str]]
"""Clip's name in small letters -> number of the split -> train or test."""


def class_names() -> dict[str, str]:
    """The 101 classes as the official index writes them, by their names in small letters."""
    return {name.lower(): name for name in read_captions(CAPTIONS)}


def read_splits(texts: Iterable[tuple[str, str]]) -> Splits:
    """The official lists, given as (path, content). Raises UserError naming the line that is not one of theirs."""
    splits: Splits = {}
    for path, text in texts:
        kind = LIST_NAME.fullmatch(path.rsplit("/", 1)[-1])
        assert kind, path
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            clip = LIST_LINE.fullmatch(line.strip())
            if clip is None:
                raise UserError(
                    f"{path}, line {number}: {line.strip()[:80]!r} is not CLASS/v_CLASS_g01_c01.avi; fetch the list again"
                )
            splits.setdefault(clip[1].lower(), {})[int(kind[2])] = kind[1]
    return splits


def split_texts(folder: Path) -> list[tuple[str, str]]:
    """(path, content) of the official lists that lie in a folder, its ucfTrainTestlist or its lists."""
    for place in (folder, folder / "ucfTrainTestlist", folder / "lists"):
        paths = sorted(path for path in place.glob("*.txt") if LIST_NAME.fullmatch(path.name))
        if paths:
            return [(str(path), path.read_text(encoding="utf-8", errors="replace")) for path in paths]
    return []
