"""captions.txt: written once with a sentence a class (or a clip), then the user's to edit, and checked at every load."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..data.captions import caption_for, read_captions
from ..errors import UserError
from ..files import write_text
from .sampling import Candidate
from .settings import Kind
from .ucf101 import CAPTIONS

LONGEST = 200


def load_captions(path: Path, kind: Kind, candidates: Sequence[Candidate]) -> dict[str, str]:
    """Captions by class or clip; the file is made where there is none.

    Raises UserError naming the line that is too long or holds other characters than ASCII's printable ones (the text
    encoder knows little else), or the class without a line.
    """
    if not path.exists():
        write_text(path, CAPTIONS.read_text(encoding="utf-8") if kind == "ucf101" else _from_names(candidates))
    captions = read_captions(path)
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.replace("\t", " ").isascii() or not line.replace("\t", " ").isprintable():
            raise UserError(f"{where}: {line!r} holds other characters than ASCII's printable ones; replace them")
        if len(line.partition("\t" if "\t" in line else ": ")[2].strip()) > LONGEST:
            raise UserError(f"{where}: a caption of over {LONGEST} characters; shorten it")
    for label in sorted({clip.label for clip in candidates} - {""}):
        if label not in captions:
            raise UserError(f"{path}: no caption for the class {label}; add a line `{label}: what its clips show`")
    return captions


def caption_of(clip: Candidate, captions: dict[str, str]) -> str:
    """The clip's own line before its class's."""
    return caption_for(clip.id, PurePosixPath(clip.label, f"{clip.id}.avi"), captions)


def _from_names(candidates: Sequence[Candidate]) -> str:
    lines = []
    for clip in candidates:
        words = unicodedata.normalize("NFKD", caption_for(clip.id, PurePosixPath(clip.source), {}))
        ascii_words = "".join(c for c in words if c.isascii() and c.isprintable()).strip()[:LONGEST]
        lines.append(f"{clip.id}: {ascii_words if any(map(str.isalnum, ascii_words)) else 'A video.'}\n")
    return "".join(lines)
