"""Which clips are taken: an order whose every beginning is spread evenly over classes, and within a class over groups.

Ranks are SHA-256 of (seed, names), so the order depends neither on the file system's nor on the archive's, and a sample
of 500 is the beginning of the sample of 2,000.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class Candidate:
    """A video that may become a clip."""

    id: str
    """Unique, and safe as a file name."""
    source: str
    """Its path within the source."""
    size: int
    """Bytes."""
    label: str = ""
    """The class."""
    group: str = ""
    number: int = 0
    """Its place in the archive."""


def in_order(candidates: Iterable[Candidate], seed: int) -> list[Candidate]:
    """All candidates; take as many from the front as are wanted.

    Classes take turns, in an order drawn once; within a class its groups do, and within a group the clips are shuffled.
    So n clips of c classes are n // c or one more of each, and where a class runs short the others make up for it.
    """

    def of_class(clips: Sequence[Candidate]) -> list[Candidate]:
        return _take_turns(clips, lambda clip: clip.group, of_group, seed)

    def of_group(clips: Sequence[Candidate]) -> list[Candidate]:
        return sorted(clips, key=lambda clip: _rank(seed, clip.label, clip.group, clip.id))

    return _take_turns(list(candidates), lambda clip: clip.label, of_class, seed)


def _take_turns(
    clips: Sequence[Candidate],
    part_of: Callable[[Candidate], str],
    order: Callable[[Sequence[Candidate]], list[Candidate]],
    seed: int,
) -> list[Candidate]:
    """One clip of each part, a second of each, and so on; within its part a clip's turn comes as `order` says."""
    parts: defaultdict[str, list[Candidate]] = defaultdict(list)
    for clip in clips:
        parts[part_of(clip)].append(clip)
    drawn = sorted(parts, key=lambda part: _rank(seed, parts[part][0].label, part))
    rounds = zip_longest(*(order(parts[part]) for part in drawn))
    return [clip for turn in rounds for clip in turn if clip is not None]


def _rank(seed: int, *names: Hashable) -> bytes:
    return hashlib.sha256("\0".join(map(str, (seed, *names))).encode("utf-8", "surrogateescape")).digest()
