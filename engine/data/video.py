"""Video in and out: windows of frames at an exact rate and size, MP4 files for browsers, columns to compare.

Axes: F frames, H height, W width; the 3 is red, green, blue.
"""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UserError
from ..files import atomic_path
from ..opencv import import_cv2
from .decode import Limits, open_pictures, pictures, rounding, upright

LIMITS = Limits()


def read_window(
    path: Path, *, start: float = 0.0, frames: int, fps: float, height: int, width: int, limits: Limits = LIMITS
) -> Tensor:
    """Read `frames` frames at `fps` from `start` seconds on; uint8 [frames, 3, height, width].

    Frame k is the last picture whose time, counted from the first picture's, is at most start + k / fps. Only the
    pictures' own time stamps count: headers claim rates and counts that streams do not keep. A picture late by no more
    than its time stamp's rounding is on time. The last picture lasts as long as the gap before it, and no longer.
    Pictures are turned upright and scaled by `fill`. Beside the result one RGB picture is in memory, and a few that
    the decoder has just made; decoding stops soon after the last frame needed.
    Raises UserError when the file is missing, no video, too short, damaged before the window is full or over a limit.
    """
    from av.video.reformatter import VideoReformatter

    assert min(frames, fps) > 0 <= start, (frames, fps, start)
    scaler = VideoReformatter()
    window_F3HW = torch.empty(frames, 3, height, width, dtype=torch.uint8)
    filled, damage = 0, ""
    time, gap, shown = 0.0, 1 / fps, None  # a lone picture counts for one frame
    with open_pictures(path, limits) as stream:
        source = pictures(path, stream, limits)
        while filled < frames:
            try:
                next_time, next_shown = next(source)
                until = next_time - rounding(stream)
            except StopIteration as end:
                damage, next_time, next_shown = end.value, time, None
                until = time + gap - 3 * rounding(stream)  # a time and a difference of two, each of them rounded
            due = min(frames, math.ceil((until - start) * fps))  # frames 0 to due - 1 come before `until`
            if due > filled and shown is not None:
                window_F3HW[filled:due] = fill(*upright(path, stream, shown, scaler), height, width)
                filled = due
            if next_shown is None:
                break
            gap = next_time - time or gap
            time, shown = next_time, next_shown
    if filled < frames:
        found = f"it yields {filled} frames at {fps:g} fps from {start:g} s, and {frames} are needed"
        if damage:
            raise UserError(f"{path}: damaged after {time:.2f} s ({damage}): {found}; fetch it again or leave it out")
        raise UserError(f"{path}: too short: {found}; take a longer clip or an earlier start")
    return window_F3HW


def fill(picture_3HW: Tensor, pixel_aspect: float, height: int, width: int) -> Tensor:
    """Scale a uint8 picture to fill height x width and crop its centre; uint8 [3, height, width].

    What is round in the scene stays round: both axes are scaled alike, up to `pixel_aspect`, the source's pixel width
    over height, which is undone. Bilinear, antialiased where it shrinks; the identity where the sizes agree.
    """
    _, source_height, source_width = picture_3HW.shape
    square_width = source_width * pixel_aspect
    scale = max(height / source_height, width / square_width)
    inner = max(height, round(source_height * scale)), max(width, round(square_width * scale))
    if inner != (source_height, source_width):
        scaled = functional.interpolate(picture_3HW[None].float(), inner, mode="bilinear", antialias=True)[0]
        picture_3HW = scaled.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    return picture_3HW[:, top : top + height, left : left + width]


def to_model(frames_F3HW: Tensor) -> Tensor:
    """uint8 [F, 3, H, W] to the model's float32 [3, F, H, W] in [-1, 1]."""
    return frames_F3HW.transpose(0, 1).float().div_(255).sub_(0.5).div_(0.5)


def to_uint8(pixels_3FHW: Tensor) -> Tensor:
    """Pixels in [-1, 1], [3, F, H, W], to uint8 [F, 3, H, W], rounded as the official code rounds what it writes."""
    unit = pixels_3FHW.detach().float().clamp(-1, 1).add_(1).div_(2)
    return unit.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8).transpose(0, 1).contiguous()


def write_video(path: Path, frames_F3HW: Tensor, fps: float) -> None:
    """Write uint8 [F, 3, H, W] as an MP4 that browsers play: H.264, yuv420p, crf 18, index in front; whole or absent.

    An odd height or width, which yuv420p cannot hold, is made even by repeating the last row or column.
    One thread and no date: the same frames give the same bytes.
    """
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

    assert frames_F3HW.dtype == torch.uint8, frames_F3HW.dtype
    height, width = frames_F3HW.shape[2:]
    muxer = {"movflags": "+faststart", "fflags": "+bitexact"}
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4", options=muxer) as container:
        # Macroblock trees look at a half-size frame; on frames of 16 rows some encodings, one in hundreds, then had other bits.
        options = {"crf": "18", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000), options=options)
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        codec = stream.codec_context
        codec.thread_count = 1
        # Players guess the matrix of an untagged file from its height.
        codec.colorspace, codec.color_range = Colorspace.SMPTE170M, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.SMPTE170M, ColorTrc.SMPTE170M
        scaler = VideoReformatter()  # one for all frames: setting it up takes longer than using it
        for frame_3HW in frames_F3HW:
            rgb_HW3 = frame_3HW.permute(1, 2, 0).cpu().numpy()
            even_HW3 = np.pad(rgb_HW3, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            picture = scaler.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(even_HW3), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.SMPTE170M,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def side_by_side(columns: list[tuple[str, Tensor]], seam: int | None = None, note: str = "") -> Tensor:
    """Put videos of one size beside each other, labels above, lines between; uint8 [F, 3, H + 40, all W + 2 a line].

    columns: (label, uint8 [F, 3, H, W]). Frames before `seam`, the first generated frame, are marked "given" under the
    label and the others "continued"; without a seam nothing is marked. `note` follows "continued". What is too long for its column is cut.
    """
    shape = columns[0][1].shape
    assert all(video.shape == shape for _, video in columns), [video.shape for _, video in columns]
    continued = f"continued, {note}" if note else "continued"
    marks = ["" if seam is None else "given" if k < seam else continued for k in range(shape[0])]
    line_F3H2 = torch.full((shape[0], 3, shape[2] + 40, 2), 128, dtype=torch.uint8)
    parts = []
    for label, video_F3HW in columns:
        bars = {mark: _bar(label, mark, shape[3]) for mark in set(marks)}
        bar_F3HW = torch.stack([bars[mark] for mark in marks])
        parts += [line_F3H2, torch.cat((bar_F3HW, video_F3HW.cpu()), dim=2)]
    return torch.cat(parts[1:], dim=3)


def _bar(label: str, mark: str, width: int) -> Tensor:
    """The label over the mark on a dark strip; uint8 [3, 40, width]."""
    cv2 = import_cv2("a label")
    bar_HW3 = np.full((40, width, 3), 24, dtype=np.uint8)
    colour = (255, 190, 90) if mark.startswith("continued") else (150, 210, 150)
    for text, size, baseline, ink in ((label, 0.5, 16, (255, 255, 255)), (mark, 0.4, 33, colour)):
        while text and cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0] > width - 8:
            text = text[:-1]
        cv2.putText(bar_HW3, text, (4, baseline), cv2.FONT_HERSHEY_SIMPLEX, size, ink, 1, cv2.LINE_AA)
    return torch.from_numpy(bar_HW3).permute(2, 0, 1)
