"""Decode a video file into upright RGB pictures, each with the time at which it is shown."""

import heapq
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

# FFmpeg also takes play lists and plain text for video; a clip may neither open other files nor be drawn from letters.
FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,ogg,flv,asf"
REORDER = 16  # H.264 and HEVC move a picture by at most this many places between coding and display
SQUARE = 0.01  # pixel shapes within 1 % of square are square: old encoders rounded to 4096:4083
ELONGATED = 16  # a picture this many times longer than wide would be scaled to gigapixels before the crop


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What reading one clip may cost. A file of a few kilobytes can claim gigapixels or days."""

    pixels: int = 4096 * 2304
    """Pixels in a picture."""

    decoded: int = 20_000
    """Pictures decoded before the window is full."""


@contextmanager
def open_pictures(path: Path, limits: Limits) -> Iterator[Any]:
    """Open a file's picture track as a PyAV stream. Raises UserError for whatever stands against it."""
    import av
    from av.error import FFmpegError
    from av.stream import Disposition

    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}; name a video file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; fetch it again or leave it out")
    try:
        # Titles in old files are in any encoding, and nothing here reads them.
        container = av.open(str(path), options={"format_whitelist": FORMATS}, metadata_errors="replace")
    except (FFmpegError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({_reason(error)}); fetch it again, or leave it out") from error
    with container:
        # A sound file's cover picture counts as a video stream, too.
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            kinds = ", ".join(f"{s.type} {s.codec_context.name}" for s in container.streams if s.codec_context)
            raise UserError(f"{path}: no video stream that can be decoded (found {kinds or 'nothing'}); leave it out")
        _check_size(path, streams[0], streams[0].codec_context, limits)
        yield streams[0]


def pictures(path: Path, stream: Any, limits: Limits) -> Generator[tuple[float, Any], None, str]:
    """Yield (seconds since the first picture, PyAV frame) in display order; return why decoding broke off, or "".

    Decoders hand out pictures in display order, but AVI knows only the coding order, so the time stamps of files with
    B-frames jump back and forth there. As a set they are right: the smallest one not yet used belongs to the next
    picture. Looks REORDER pictures ahead for it.
    """
    from av.error import FFmpegError

    queue: deque[Any] = deque()
    stamps: list[int] = []
    decoded, first, last, damage = 0, None, None, ""
    decoder = stream.container.decode(stream)
    while True:
        try:
            picture = next(decoder, None) if not damage else None
        except (FFmpegError, OSError) as error:
            picture, damage = None, _reason(error)
        if picture is not None and picture.is_corrupt:
            picture, damage = None, "a damaged picture"
        if picture is not None:
            decoded += 1
            if decoded > limits.decoded:
                raise UserError(f"{path}: over {limits.decoded} pictures before the window is full; cut the video")
            if picture.pts is None:
                raise UserError(f"{path}: picture {decoded} has no time stamp; convert the file to MP4")
            _check_size(path, stream, picture, limits)
            queue.append(picture)
            heapq.heappush(stamps, picture.pts)
            if len(queue) <= REORDER:
                continue
        if not queue:
            return damage
        stamp = heapq.heappop(stamps)
        if last is not None and stamp < last:
            return "time stamps run backwards"
        first, last = stamp if first is None else first, stamp
        yield float((stamp - first) * stream.time_base), queue.popleft()


def rounding(stream: Any) -> float:
    """Seconds by which a time stamp may be off: half a tick of the stream's clock, at least 2 microseconds.

    Clocks coarser than 1 ms, as AVI's, count whole pictures and are exact.
    """
    tick = float(stream.time_base)
    return max(2e-6, tick / 2 if tick <= 1e-3 else 0.0)


def upright(path: Path, stream: Any, picture: Any, scaler: Any = None) -> tuple[Tensor, float]:
    """A PyAV frame as uint8 [3, H, W], turned as the file says, and its pixels' width over their height.

    scaler: PyAV's VideoReformatter, one for all pictures of a file, as setting one up takes longer than using it.
    """
    from av.video.reformatter import Interpolation, VideoReformatter

    # FFmpeg's quick conversion darkens by about one level in 255; this one has no bias, and equal bits on any CPU.
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
    rgb = (scaler or VideoReformatter()).reformat(picture, format="rgb24", interpolation=exact)
    rgb_3HW = torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1)
    quarters, rest = divmod(picture.rotation, 90)
    if rest:
        raise UserError(f"{path}: turned by {picture.rotation} degrees; only quarter turns are read: convert the file")
    aspect = _pixel_aspect(stream)
    return torch.rot90(rgb_3HW, quarters, dims=(1, 2)), 1 / aspect if quarters % 2 else aspect


def _pixel_aspect(stream: Any) -> float:
    aspect = float(stream.sample_aspect_ratio or 1)
    return 1.0 if abs(aspect - 1) < SQUARE else aspect


def _check_size(path: Path, stream: Any, picture: Any, limits: Limits) -> None:
    """Raise UserError unless a frame or codec context is of a size that can be read."""
    width, height = picture.width, picture.height
    if not 0 < width * height <= limits.pixels:
        raise UserError(f"{path}: pictures of {width}x{height}; at most {limits.pixels} pixels are read: scale it down")
    if not 1 / ELONGATED <= width * _pixel_aspect(stream) / height <= ELONGATED:
        raise UserError(f"{path}: pictures of {width}x{height} are too elongated to fill a frame; crop or leave it out")


def _reason(error: Exception) -> str:
    """FFmpeg's own words for an error."""
    return str(getattr(error, "strerror", None) or error)
