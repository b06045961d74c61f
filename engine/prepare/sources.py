"""What there is to choose from, and how to get at it: a folder of videos, or an archive of UCF-101.

Whatever cannot be a clip is listed with its reason, never left out in silence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..data.clips import SUFFIXES, Clip, Data, list_clips
from ..errors import UserError
from .archive import list_archive, unpack
from .sampling import Candidate
from .settings import Kind
from .ucf101 import CLIP_NAME, LIST_NAME, SPLITS_ZIP, Splits, class_names, read_splits, split_texts


@dataclass(frozen=True)
class Reject:
    """A video that did not become a clip, and why."""

    source: str
    reason: str
    id: str = ""
    label: str = ""


Files = Callable[[Sequence[Candidate], Path], Iterator[tuple[Candidate, Path | str]]]


@dataclass(frozen=True)
class Source:
    """Videos to choose from."""

    candidates: list[Candidate]
    refused: list[Reject]
    files: Files
    """files(wanted, folder) yields each wanted candidate with its file, or with the reason why there is none.

    Files that lie in `folder` are temporary: whoever takes one deletes it.
    """
    splits: Splits = field(default_factory=dict)


def open_source(kind: Kind, path: Path, splits: Path | None = None) -> Source:
    """List a folder, or an archive of UCF-101; `splits` is the folder or zip of its official lists.

    Without `splits` they are looked for in the source and beside it. Raises UserError when there is nothing to choose
    from or a list cannot be read, naming the path.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give the videos' folder{' or archive' * (kind == 'ucf101')}")
    if kind == "folder":
        if not path.is_dir():
            raise UserError(f"{path}: not a folder; give a folder of videos")
        return _folder_of_any(path)
    found = _folder_of_ucf101(path, splits) if path.is_dir() else _archive_of_ucf101(path, splits)
    if not found.candidates:
        raise UserError(f"{path}: holds no video named v_CLASS_g01_c01.avi; give UCF-101's archive or folder")
    return found


def _folder_of_any(folder: Path) -> Source:
    candidates = [Candidate(clip.id, *_path_and_size(clip.path, folder)) for clip in _videos(folder)]
    return Source(candidates, [], _files_of(folder))


def _folder_of_ucf101(folder: Path, splits: Path | None) -> Source:
    candidates, refused = _candidates([(*_path_and_size(clip.path, folder), 0) for clip in _videos(folder)])
    return Source(candidates, refused, _files_of(folder), _find_splits(folder, splits))


def _archive_of_ucf101(archive: Path, splits: Path | None) -> Source:
    listing = list_archive(archive, SUFFIXES, LIST_NAME)
    candidates, refused = _candidates([(path, size, number) for number, (path, size) in listing.members.items()])
    refused += [Reject(path, reason) for path, reason in listing.refused]

    def files(wanted: Sequence[Candidate], folder: Path) -> Iterator[tuple[Candidate, Path | str]]:
        by_number = {clip.number: clip for clip in wanted}
        for number, file in unpack(archive, by_number, folder):
            yield by_number[number], file

    inside = read_splits(sorted(listing.texts.items())) if splits is None else {}
    return Source(candidates, refused, files, inside or _find_splits(archive, splits))


def _videos(folder: Path) -> list[Clip]:
    try:
        return list_clips(Data(clips=str(folder.absolute())), Path())
    except UserError as error:
        raise UserError(str(error).removeprefix("data.clips: ")) from error


def _path_and_size(path: Path, folder: Path) -> tuple[str, int]:
    return path.relative_to(folder.absolute()).as_posix(), path.stat().st_size if path.is_file() else 0


def _files_of(root: Path) -> Files:
    def files(wanted: Sequence[Candidate], folder: Path) -> Iterator[tuple[Candidate, Path | str]]:
        for clip in wanted:
            yield clip, root / clip.source

    return files


def _candidates(found: list[tuple[str, int, int]]) -> tuple[list[Candidate], list[Reject]]:
    """The candidates among (path, size, number), and the others. Of two with one name the first path is taken."""
    classes = class_names()
    candidates: dict[str, Candidate] = {}
    refused = []
    for path, size, number in sorted(found):
        stem = PurePosixPath(path).stem
        name = CLIP_NAME.fullmatch(stem)
        if name is None:
            refused.append(Reject(path, "not named as UCF-101 names its clips (v_CLASS_g01_c01.avi)"))
        elif stem.lower() in candidates:
            refused.append(Reject(path, f"a second clip of this name, beside {candidates[stem.lower()].source}", stem))
        else:
            label = classes.get(name[1].lower(), name[1])
            candidates[stem.lower()] = Candidate(stem, path, size, label, name[2], number)
    return list(candidates.values()), refused


def _find_splits(source: Path, given: Path | None) -> Splits:
    """The official lists: where they were said to be, or in the source's folder, or beside the source."""
    for place in [given] if given else [source, source.absolute().parent]:
        texts = split_texts(place) if place.is_dir() else []
        packed = place if given and place.is_file() else place / SPLITS_ZIP
        if not texts and packed.is_file():
            texts = sorted(list_archive(packed, (), LIST_NAME).texts.items())
        if texts:
            return read_splits(texts)
    if given:
        raise UserError(f"splits: {given} holds no trainlist01.txt and the like; give the folder or zip of the lists")
    return {}
