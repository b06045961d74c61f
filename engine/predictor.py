"""How much a clip will gain from a method, foreseen from what is known of it: its features, and a predictor that is plain numbers.

A predictor is a file of JSON (`vidtta adaptive --out`), never a pickle, so reading one runs no code: calibrated ridge coefficients, the
names of the features they belong to, and what it was fitted on. `load_predictor` refuses a file that is not whole, is of another schema, or
holds what is no finite number. engine/adaptive.py fits one, engine/gate.py asks it inside a run.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .files import sha256_json, write_json

SCHEMA = 2
NUMBERS = ("flow", "edges", "colour_variance", "similarity", "first_loss")
FLOW_HEIGHT = 120
"""Pixels: flow is found on pictures made no higher than this, which takes a sixteenth of the time at 480."""
MAX_BYTES = 2**24


def frame_features(known_F3HW: np.ndarray) -> dict[str, float]:
    """Of a clip's known frames, uint8 [F, 3, H, W] with F at least 2.

    flow: mean length of Farneback's optical flow, pixels of the full picture a frame; edges: share of Canny's edge pixels (100, 200);
    colour_variance: mean over channels, of values in [0, 1]; similarity: mean correlation of neighbouring frames in grey.
    """
    import torch

    from .metrics.optical_flow import farneback
    from .opencv import import_cv2

    cv2 = import_cv2("features of a clip")
    grey = np.stack([cv2.cvtColor(frame.transpose(1, 2, 0), cv2.COLOR_RGB2GRAY) for frame in known_F3HW])
    height, width = grey.shape[1:]
    shrunk = max(1.0, height / FLOW_HEIGHT)
    small = np.stack(
        [
            cv2.resize(
                frame.transpose(1, 2, 0), (round(width / shrunk), round(height / shrunk)), interpolation=cv2.INTER_AREA
            )
            for frame in known_F3HW
        ]
    )
    video = torch.from_numpy(small).permute(3, 0, 1, 2).float() / 127.5 - 1
    flat = grey.reshape(len(grey), -1).astype(float)
    flat = flat - flat.mean(1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1)
    pairs = (flat[1:] * flat[:-1]).sum(1) / np.maximum(norms[1:] * norms[:-1], 1e-12)
    return {
        "flow": shrunk * farneback(video).norm(dim=1).mean().item(),
        "edges": float(np.mean([(cv2.Canny(frame, 100, 200) > 0).mean() for frame in grey])),
        "colour_variance": float((known_F3HW / 255.0).var(axis=(0, 2, 3)).mean()),
        "similarity": float(pairs.mean()),
    }


def group_name(meta: Mapping[str, str], clip_id: str) -> str:
    """Clips of one name are not independent: cut from one video, as UCF-101's groups; a clip without a group is one by itself."""
    return f"{meta.get('class', '')}/{meta['group']}" if meta.get("group") else clip_id


def fitted_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of an arm's settings a predictor belongs to: all but the seed and the device, whose draws and rounding it averages over."""
    protocol = {name: value for name, value in settings["protocol"].items() if name not in ("seed", "device")}
    return {name: settings[name] for name in ("method", "adaptation")} | {"protocol": protocol}


@dataclass(frozen=True)
class Predictor:
    """Calibrated ridge regression, plain numbers. means, scales: of NUMBERS; weights: of NUMBERS, then classes."""

    means: list[float]
    scales: list[float]
    classes: list[str]
    weights: list[float]
    intercept: float
    slope: float
    offset: float

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Benefit of clips with these features, [n]; a class that was not seen counts as none."""
        raw = design(rows, self.means, self.scales, self.classes) @ np.asarray(self.weights) + self.intercept
        return self.offset + self.slope * raw


def design(
    rows: Sequence[Mapping[str, Any]], means: Sequence[float], scales: Sequence[float], classes: Sequence[str]
) -> np.ndarray:
    """Standardised numbers and one column a class, [n, NUMBERS + classes]."""
    numbers = np.array([[row[name] for name in NUMBERS] for row in rows], dtype=float)
    one_hot = np.array([[float(row["class"] == name) for name in classes] for row in rows]).reshape(
        len(rows), len(classes)
    )
    return np.concatenate([(numbers - np.asarray(means)) / np.asarray(scales), one_hot], axis=1)


@dataclass(frozen=True)
class Fitted:
    """A predictor and where it comes from. arm: its name in the run it was fitted on; settings: that arm's, see `fitted_settings`;
    videos: hashes of the clips it saw; groups: theirs."""

    predictor: Predictor
    arm: str
    settings: dict[str, Any]
    videos: list[str]
    groups: list[str]


def save_predictor(path: Path, fitted: Fitted) -> None:
    """Write as JSON, with its schema and a hash over everything."""
    value = {"schema": SCHEMA, "numbers": list(NUMBERS), **vars(fitted), "predictor": vars(fitted.predictor)}
    write_json(path, value | {"sha256": sha256_json(value)})


def load_predictor(path: Path) -> tuple[Fitted, str]:
    """What a file holds, and its hash. Raises UserError in one sentence for a file that is not what `save_predictor` writes."""
    again = "write it again with `vidtta adaptive RUN --arm ARM --out FILE`"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, too many for a predictor; {again}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {again}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON, so it is no predictor; {again}") from error
    if not isinstance(value, dict) or "schema" not in value:
        raise UserError(f"{path}: is no predictor; {again}")
    if value["schema"] != SCHEMA or value.get("numbers") != list(NUMBERS):
        raise UserError(
            f"{path}: has schema {value['schema']!r} and the features {value.get('numbers')!r}, where schema {SCHEMA} with "
            f"{list(NUMBERS)} is read; {again}"
        )
    claimed = value.pop("sha256", None)
    if claimed != sha256_json(value):
        raise UserError(f"{path}: does not have the hash it was written with, so something changed it; {again}")
    try:
        fitted = Fitted(
            _checked(value["predictor"]),
            str(value["arm"]),
            dict(value["settings"]),
            [*map(str, value["videos"])],
            [*map(str, value["groups"])],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no whole predictor ({type(error).__name__}: {error}); {again}") from error
    return fitted, claimed


def _checked(values: Mapping[str, Any]) -> Predictor:
    """The predictor of a mapping; raises where a key is missing or unknown, a length does not fit or a number is not finite."""
    if unknown := set(values) ^ {field.name for field in fields(Predictor)}:
        raise ValueError(f"keys {sorted(unknown)}")
    predictor = Predictor(
        means=[*map(float, values["means"])],
        scales=[*map(float, values["scales"])],
        classes=[*map(str, values["classes"])],
        weights=[*map(float, values["weights"])],
        intercept=float(values["intercept"]),
        slope=float(values["slope"]),
        offset=float(values["offset"]),
    )
    if len(predictor.means) != len(NUMBERS) or len(predictor.scales) != len(NUMBERS):
        raise ValueError(f"{len(predictor.means)} means and {len(predictor.scales)} scales of {len(NUMBERS)} features")
    if len(predictor.weights) != len(NUMBERS) + len(predictor.classes):
        raise ValueError(f"{len(predictor.weights)} weights")
    numbers = [*predictor.means, *predictor.weights, predictor.intercept, predictor.slope, predictor.offset]
    if not all(map(math.isfinite, numbers)) or not all(0 < scale < math.inf for scale in predictor.scales):
        raise ValueError("a number is not finite, or a scale not positive")
    return predictor
