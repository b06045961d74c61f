"""The list of clips: every video below a folder, or the rows of a manifest.

A manifest is a CSV file with a header: `path`, relative to the manifest, and if wanted `id`, `caption` and `start`
(seconds). Other columns are kept as they are. A row's own caption goes before captions.txt.
"""

import csv
import hashlib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..files import sha256_file, sha256_json
from .captions import caption_for, read_captions

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
EMBEDDED = "embedded:"
WORLD, WORLD_CLIPS = "world:", 64
SAFE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
LONGEST_ID = 120  # results add to it, and file systems end at 255 bytes


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which clips, and at which size. Relative paths are looked for in the working directory, then beside the recipe."""

    clips: str
    """A folder with videos at any depth, or a .csv manifest; "embedded:NAME" is a folder or manifest that comes with vidtta;
    "world:DOMAIN/SPLIT" are clips made by code (familiar or shifted; training, tuning or test), 64 unless `limit` says more."""

    captions: str = ""
    """captions.txt with `name: caption` lines; clips that it does not name, or all without it, are described by their names."""

    height: int = 480
    """Pixels, a multiple of 8; pictures are scaled to fill the frame and cropped around the centre."""

    width: int = 640
    """Pixels, a multiple of 8."""

    limit: int | None = None
    """Only the first so many clips of the list."""

    def __post_init__(self) -> None:
        if not self.clips:
            raise ValueError("clips is empty; give a folder of videos or a .csv manifest")
        for name, value in (("height", self.height), ("width", self.width)):
            if value <= 0 or value % 8:
                raise ValueError(
                    f"{name} is {value}; it must be a positive multiple of 8 (what the VAE divides sizes by)"
                )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1, or left out for all clips")


@dataclass(frozen=True)
class Clip:
    """One stretch of one video. The file need not be readable: that shows when it is read, and fails this clip alone."""

    id: str
    """Unique in its list and safe as a file name; depends on the clip's own name alone."""
    path: Path
    """The video file; of a clip made by code, only what to call it."""
    caption: str
    start: float = 0.0
    """Seconds from the first picture."""
    meta: dict[str, str] = field(default_factory=dict, hash=False)
    """The manifest's other columns."""
    world: tuple[str, str, int] | None = None
    """Domain, split and index of a clip made by code; None for a file."""


def list_clips(data: Data, base: Path) -> list[Clip]:
    """The clips that `data` names, in their fixed order; `base` is the recipe's folder.

    A folder is listed in the byte order of relative paths (hidden files left out), a manifest in its own.
    Raises UserError for a list that is missing, empty or wrong, naming the file and the line.
    """
    if data.clips.startswith(WORLD):
        return _from_world(data)
    source = _locate("clips", data.clips, base)
    captions = read_captions(_locate("captions", data.captions, base)) if data.captions else {}
    if source.is_dir():
        clips = _from_folder(source, captions)
    elif source.suffix.lower() == ".csv":
        clips = _from_manifest(source, captions)
    else:
        raise UserError(f"data.clips is the file {source}; give a folder of videos or a .csv manifest")
    if captions and not {clip.caption for clip in clips} & set(captions.values()):
        raise UserError(f"data.captions: {data.captions} names no clip of {source}; name clips as {clips[0].id!r}")
    return clips[: data.limit]


def clip_hash(clip: Clip) -> str:
    """SHA-256 over the file's bytes and the start, in hexadecimal. Raises UserError when the file cannot be read."""
    if clip.world:
        from ..demo.world import VERSION

        return sha256_json({"world": clip.world, "version": VERSION})
    try:
        return sha256_json({"file": sha256_file(clip.path), "start": float(clip.start)})
    except OSError as error:
        raise UserError(f"{clip.path}: cannot be read ({error.strerror}); fetch it again or leave it out") from error


def _locate(name: str, value: str, base: Path) -> Path:
    """The absolute path that a setting means."""
    if value.startswith(EMBEDDED):
        recipes = Path(__file__).resolve().parents[2] / "recipes"
        found = Path(os.path.normpath(recipes / value.removeprefix(EMBEDDED)))
        if not found.is_relative_to(recipes) or not found.exists():
            raise UserError(f"data.{name} is {value!r}, which vidtta does not hold; it holds {EMBEDDED}clips/clips.csv")
        return found
    places = [Path.cwd() / value, base.absolute() / value]
    for place in places:
        if place.exists():
            return place
    looked = " nor ".join(dict.fromkeys(map(str, places)))
    raise UserError(f"data.{name} is {value!r}, but there is no {looked}; give a path that exists")


def _from_world(data: Data) -> list[Clip]:
    """Clips of the small world, each described by the sentence that its scene gives."""
    from ..demo.world import DOMAINS, SPLITS, build_scene, captions, clip_numbers

    domain, _, split = data.clips.removeprefix(WORLD).partition("/")
    if domain not in DOMAINS or split not in SPLITS:
        raise UserError(
            f"data.clips is {data.clips!r}; a world is {WORLD}DOMAIN/SPLIT with a domain of {', '.join(DOMAINS)} and a split of "
            f"{', '.join(SPLITS)}"
        )
    if data.captions:
        raise UserError(f"data.captions is {data.captions!r}, but {data.clips} describes its own clips; leave it out")
    indices = range(data.limit or WORLD_CLIPS)
    sentences = captions(build_scene(DOMAINS[domain], clip_numbers(domain, split, indices)))
    return [
        Clip(f"{domain}-{split}-{k:06d}", Path(f"{data.clips}/{k}"), sentence, world=(domain, split, k))
        for k, sentence in zip(indices, sentences, strict=True)
    ]


def _from_folder(folder: Path, captions: dict[str, str]) -> list[Clip]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable") from error

    found: list[PurePosixPath] = []
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(parent)
        videos = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        for path in (here / name for name in folders + videos):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UserError(f"{path}: a link that leaves {folder}; copy the video there, or list it in a manifest")
        found += [PurePosixPath((here / name).relative_to(folder)) for name in videos]
    if not found:
        raise UserError(f"data.clips: no video lies below {folder}; known suffixes are {', '.join(SUFFIXES)}")
    clips: dict[str, Clip] = {}
    for relative in sorted(found, key=os.fsencode):
        clip_id = _id_from_path(relative)
        if clip_id in clips:
            raise UserError(
                f"{folder / relative}: both it and {clips[clip_id].path} get the id {clip_id!r}; rename one"
            )
        clips[clip_id] = Clip(clip_id, folder / relative, caption_for(clip_id, relative, captions))
    return list(clips.values())


def _from_manifest(manifest: Path, captions: dict[str, str]) -> list[Clip]:
    clips: dict[str, Clip] = {}
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            columns = reader.fieldnames or []
            if "path" not in columns or len(set(columns)) < len(columns):
                raise UserError(
                    f"{manifest}, line 1: the columns are {', '.join(columns) or 'missing'}; "
                    "name each once in the first line, `path` among them"
                )
            for row in reader:
                where = f"{manifest}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: not {len(columns)} fields as in the first line; quote commas in text")
                clip = _from_row(where, manifest.parent, row, captions)
                if clip.id in clips:
                    raise UserError(
                        f"{where}: a second clip with the id {clip.id!r}; give each row its own in a column id"
                    )
                clips[clip.id] = clip
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{manifest}: not a manifest that can be read ({error}); give a UTF-8 CSV file") from error
    if not clips:
        raise UserError(f"{manifest}: no clip is listed; add a row below the column names")
    return list(clips.values())


def _from_row(where: str, folder: Path, row: dict[str, str], captions: dict[str, str]) -> Clip:
    written, clip_id, caption, start = (row.get(name, "").strip() for name in ("path", "id", "caption", "start"))
    meta = {name: value for name, value in row.items() if name not in ("path", "id", "caption", "start")}
    path = folder / written  # an absolute path stays itself: whoever writes one means it
    if not written:
        raise UserError(f"{where}: path is empty; give a video file")
    if not Path(written).is_absolute() and not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: path {written!r} leaves {folder}; move the video there or write its absolute path")
    if clip_id and (not SAFE_ID.fullmatch(clip_id) or len(clip_id) > LONGEST_ID):
        raise UserError(
            f"{where}: id is {clip_id!r}; at most {LONGEST_ID} of letters, digits, '.', '_' and '-' are allowed, no '.' first"
        )
    try:
        seconds = float(start or 0)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{where}: start is {start!r}; it must be a number of seconds, 0 or more")
    clip_id = clip_id or _id_from_path(PurePosixPath(written.lstrip("/")))
    return Clip(clip_id, path, caption or caption_for(clip_id, Path(written), captions), seconds, meta)


def _id_from_path(relative: PurePosixPath) -> str:
    """Biking/v_Biking_g01_c04.avi becomes Biking-v_Biking_g01_c04.

    Where characters had to be replaced or cut, part of the path's hash keeps different names apart.
    """
    plain = "-".join(relative.with_suffix("").parts)
    clip_id = re.sub(r"[^A-Za-z0-9._-]", "_", plain).lstrip(".")
    if clip_id == plain and len(clip_id) <= LONGEST_ID:
        return clip_id
    digest = hashlib.sha256(os.fsencode(relative)).hexdigest()[:8]
    return f"{clip_id[: LONGEST_ID - 9]}-{digest}"
