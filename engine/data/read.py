"""A clip's frames, whether they lie in a video file or are made by code."""

from torch import Tensor

from .clips import Clip
from .video import read_window


def read_clip(clip: Clip, *, frames: int, fps: float, height: int, width: int) -> Tensor:
    """The first `frames` frames of a clip at `fps`, uint8 [frames, 3, height, width]; raises UserError as `read_window` does."""
    if clip.world is None:
        return read_window(clip.path, start=clip.start, frames=frames, fps=fps, height=height, width=width)
    from ..demo.world import DOMAINS, build_scene, clip_numbers, frames_of

    domain, split, index = clip.world
    return frames_of(build_scene(DOMAINS[domain], clip_numbers(domain, split, [index])), frames, fps, height, width)[0]
