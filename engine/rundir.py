"""A run on disk, and the keys that decide whether two results belong together.

    recipe.yaml environment.json choices.json
    shared/captions/ latents/ references/ truth/             what the arms share, named by content
    arms/<arm>/clips/<clip>/result.json                      written last and atomically: its presence means done
                            curves.json                      what diagnostics measured while adapting
                            failure.json                     why there is no result; a later run tries again
                            damaged-<hash>.json              a result that could not be read, kept aside and made again
                            video.mp4 latents.safetensors adapter.safetensors   as the recipe's `keep` says
    comparisons/<clip>.mp4 summary.csv                       derived: can be made again from the rest
    tasks/ logs/                                             who is at work (`vidtta status`), what batch jobs printed

One directory a clip and no file that two tasks write differently, so any number of tasks may share a run directory.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.clips import Clip
from .errors import UserError
from .files import sha256_json, write_json

CHECKSUM = "checksum"
"""The key in a result's file of the SHA-256 of all the others."""


@dataclass(frozen=True)
class RunDirectory:
    root: Path

    @property
    def shared(self) -> Path:
        return self.root / "shared"

    def clip(self, arm: str, clip_id: str) -> Path:
        return self.root / "arms" / arm / "clips" / clip_id

    def reference(self, clip_id: str) -> Path:
        return self.shared / "references" / f"{clip_id}.json"

    def truth(self, clip_id: str, content: str) -> Path:
        """The real clip as a video, for looking at beside the arms'. content: the result's key of the clip."""
        return self.shared / "truth" / f"{clip_id}-{content[:16]}.mp4"

    def comparison(self, clip_id: str) -> Path:
        return self.root / "comparisons" / f"{clip_id}.mp4"

    def result(self, arm: str, clip_id: str) -> dict[str, Any] | None:
        """A finished result; None if there is none or its file is damaged (it is then made again).

        Damaged is what is no JSON object, and what does not match the checksum that it was written with; one without passes.
        """
        value = read_json(self.clip(arm, clip_id) / "result.json") or {}
        if CHECKSUM in value and value.pop(CHECKSUM) != sha256_json(value):
            return None
        return value or None

    def set_aside_damaged(self, arm: str, clip_id: str) -> Path | None:
        """Rename a result that can be read and is none; returns where it now lies. Raises OSError where it cannot be read."""
        path = self.clip(arm, clip_id) / "result.json"
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if self.result(arm, clip_id) is not None:  # made by another task in this moment
            return None
        aside = path.with_name(f"damaged-{hashlib.sha256(content).hexdigest()[:12]}.json")
        path.replace(aside)
        return aside

    def count_results(self) -> int:
        return sum(1 for _ in self.root.glob("arms/*/clips/*/result.json"))

    def failure(self, arm: str, clip_id: str) -> dict[str, Any] | None:
        return read_json(self.clip(arm, clip_id) / "failure.json")

    def write_result(self, arm: str, clip_id: str, result: dict[str, Any]) -> None:
        folder = self.clip(arm, clip_id)
        plain = json.loads(json.dumps(result))
        write_json(folder / "result.json", plain | {CHECKSUM: sha256_json(plain)})
        (folder / "failure.json").unlink(missing_ok=True)

    def remove_result(self, arm: str, clip_id: str) -> None:
        (self.clip(arm, clip_id) / "result.json").unlink(missing_ok=True)

    def write_failure(self, arm: str, clip_id: str, failure: dict[str, Any]) -> None:
        write_json(self.clip(arm, clip_id) / "failure.json", failure)


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def clip_settings(clip: Clip) -> dict[str, Any]:
    """What a list of clips says of one and shapes its results; the video itself counts by its hash, in the result's keys."""
    return {"caption": clip.caption, "start": clip.start}


def check_same_settings(
    directory: RunDirectory, arm: str, clip: Clip, settings: dict[str, Any], content: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """A finished result, None where there is none; raises UserError if it was made under other settings.

    content: what it must say of the clips themselves (`clip`, `adapted_on`), where they could be read.
    """
    result = directory.result(arm, clip.id)
    if result is None:
        return None
    where = None
    if result.get("keys", {}).get("settings") != sha256_json(settings):
        where = first_difference(result.get("settings", {}), settings)
    elif (before := {name: result.get(name) for name in clip_settings(clip)}) != clip_settings(clip):
        where = first_difference(before, clip_settings(clip))
    elif content and (before := {"clip": result["keys"]["clip"], "adapted_on": result["adapted_on"]}) != content:
        where = first_difference(before, content)
    if where:
        raise UserError(
            f"{directory.root}: the result of clip {clip.id} in arm {arm} was made under other settings ({where}); "
            "choose another output_dir, or remove that arm's folder to make it again"
        )
    return result


def check_paired(baseline: dict[str, Any], result: dict[str, Any]) -> None:
    """Raise ValueError unless a result differs from the baseline's of the same clip in its method, and in that alone.

    Compares what was really used, by hash (`made_from`), not what the recipe says. A video that is the baseline's to the bit
    although weights changed was sampled without them, or rounding swallowed the change.
    """
    ours, theirs = (
        {"protocol": r.get("keys", {}).get("protocol"), "made_from": r.get("made_from", {})} for r in (result, baseline)
    )
    if ours != theirs:
        raise ValueError(
            f"this result cannot be compared with that of arm {baseline['arm']} ({first_difference(theirs, ours)}); if that "
            "one is wrong, remove it, and both are made again"
        )
    left_alone = not result.get("gate", {"adapted": True})["adapted"]
    if left_alone and result["generated"] != baseline["generated"] and result["paths"] == baseline["paths"]:
        raise ValueError(
            f"the gate left this clip unadapted, but its video is not that of arm {baseline['arm']} to the bit"
        )
    if result["adaptation"]["change"]["changed"] and result["generated"] == baseline["generated"]:
        raise ValueError(
            f"adapting changed weights, but the video is that of arm {baseline['arm']} to the bit: the change is too small "
            "for the network's dtype (raise lr), or it was not in force while sampling"
        )


def first_difference(before: Any, now: Any, path: str = "") -> str:
    """Name the first place where two JSON values differ, as `path: was A, now B`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            if before.get(key) != now.get(key):
                return first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    return f"{path or 'settings'}: was {json.dumps(before)}, now {json.dumps(now)}"
