"""What a clip shows, in words: read from captions.txt, or made from the clip's name.

captions.txt, UTF-8, one caption a line, blank lines skipped; a tab or ": " ends the name:

    v_Biking_g01_c04: A man rides a bicycle past a row of parked cars.
    Archery: A person shoots an arrow at a target.

The name is a clip's id, its file name with or without suffix, the folder it lies in, or its UCF-101 class
(v_CLASS_g01_c01.avi).
"""

import re
from pathlib import Path, PurePath

from ..errors import UserError

UCF_NAME = re.compile(r"v_([A-Za-z]+)_g\d+_c\d+")
WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def read_captions(path: Path) -> dict[str, str]:
    """Captions by name. Raises UserError naming the line that is not `name: caption` or repeats a name."""
    captions: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: captions cannot be read ({error}); give a UTF-8 text file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, caption = (part.strip() for part in line.partition("\t" if "\t" in line else ": "))
        if not name or not caption:
            raise UserError(f"{path}, line {number}: {line.strip()!r} is not a name, a tab or ': ', and a caption")
        if name in captions:
            raise UserError(f"{path}, line {number}: a second caption for {name!r}; keep one of them")
        captions[name] = caption
    return captions


def caption_for(clip_id: str, path: PurePath, captions: dict[str, str]) -> str:
    """The caption under the clip's most particular name in `captions`; without one, a sentence made from its file name.

    v_ApplyEyeMakeup_g01_c01.avi becomes "A person is doing: apply eye makeup.", man-surfing.mp4 "Man surfing."
    """
    ucf = UCF_NAME.fullmatch(path.stem)
    for name in (clip_id, path.name, path.stem, path.parent.name, ucf[1] if ucf else ""):
        if name in captions:
            return captions[name]
    if ucf:
        return f"A person is doing: {WORD_START.sub(' ', ucf[1]).lower()}."
    words = " ".join(re.split(r"[\W_]+", WORD_START.sub(" ", path.stem))).strip()
    return f"{words[:1].upper()}{words[1:]}." if words else ""
