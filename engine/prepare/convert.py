"""One video to one clip: cut, scale, store, and note what was done. Depends on the file and the settings alone.

Axes: F frames, H height, W width; the 3 is red, green, blue.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.decode import Limits, open_pictures, pictures, rounding, upright
from ..data.video import read_window
from ..errors import UserError
from ..files import sha256_file, sha256_tensor, write_json
from .output import clip_path, state_path
from .settings import Settings
from .storage import write_clip
from .workers import Job

LIMITS = Limits()


def convert(job: Job) -> dict[str, Any]:
    """Store a clip and then its state, which marks it done; return the state: facts, or why the video is rejected.

    A video that cannot be read is a state like any other. Raises OSError when the disk is full or cannot be written.
    """
    try:
        frames_F3HW, state = cut(job.video, job.settings)
    except UserError as error:
        state = {"rejected": str(error).removeprefix(f"{job.video}: ")}
    else:
        state |= _store(job, frames_F3HW)
    write_json(state_path(job.out, job.id), state)
    return state


def _store(job: Job, frames_F3HW: Tensor) -> dict[str, Any]:
    path = clip_path(job.out, job.id)
    write_clip(path, frames_F3HW, job.settings.fps)
    return {
        "bytes": path.stat().st_size,
        "frames_sha256": sha256_tensor(frames_F3HW),
        "source_sha256": sha256_file(job.video),
    }


def cut(video: Path, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
    """The clip's frames, uint8 [F, 3, H, W], and where they come from.

    The facts: source_start (seconds), source_size (upright, "WxH") and bars (black rows or columns at the top, bottom,
    left and right). Raises UserError when the video is too short, damaged or no video.
    """
    height, width = settings.height, settings.width
    start = 0.0
    if settings.start == "middle":
        start = max(0, count_frames(video, settings.fps) - settings.frames) // 2 / settings.fps
    source_height, source_width, pixel_aspect = _first_size(video)
    if settings.aspect == "pad":
        scale = min(height / source_height, width / (source_width * pixel_aspect))
        height = max(1, min(height, round(source_height * scale)))
        width = max(1, min(width, round(source_width * pixel_aspect * scale)))
    inner_F3HW = read_window(video, start=start, frames=settings.frames, fps=settings.fps, height=height, width=width)
    top, left = (settings.height - height) // 2, (settings.width - width) // 2
    bottom, right = settings.height - height - top, settings.width - width - left
    facts = {
        "source_start": start,
        "source_size": f"{source_width}x{source_height}",
        "bars": [top, bottom, left, right],
    }
    return torch.nn.functional.pad(inner_F3HW, (left, right, top, bottom)), facts


def count_frames(video: Path, fps: float) -> int:
    """How many frames `read_window` finds from the first picture on: by time stamps, never by the header.

    Raises UserError when the video is damaged: where its middle was cannot be known.
    """
    time, gap = 0.0, 1 / fps
    with open_pictures(video, LIMITS) as stream:
        source = pictures(video, stream, LIMITS)
        while True:
            try:
                next_time, _ = next(source)
            except StopIteration as end:
                if end.value:
                    raise UserError(f"{video}: damaged after {time:.2f} s ({end.value}); take its beginning") from end
                return max(0, math.ceil((time + gap - 3 * rounding(stream)) * fps))
            gap, time = next_time - time or gap, next_time


def _first_size(video: Path) -> tuple[int, int, float]:
    """Height and width of the first picture, upright, and its pixels' width over their height."""
    with open_pictures(video, LIMITS) as stream:
        for _, picture in pictures(video, stream, LIMITS):
            rgb_3HW, pixel_aspect = upright(video, stream, picture)
            return rgb_3HW.shape[1], rgb_3HW.shape[2], pixel_aspect
    raise UserError(f"{video}: not one picture can be decoded; fetch it again or leave it out")
