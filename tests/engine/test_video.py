"""Reading windows by time stamps, resizing, writing. The k-th picture of a test video is grey of value 20 + 4k."""

import hashlib
import math
import re
import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import av
import numpy as np
import pytest
import torch
from vidtta.engine.data.decode import Limits, pictures
from vidtta.engine.data.video import fill, read_window, side_by_side, to_model, to_uint8, write_video
from vidtta.engine.errors import UserError

torch.set_num_threads(1)
REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "recipes" / "clips"
SHARED = REPOSITORY.parent / "shared" / "data"


def make_video(path, ticks, tick, *, size=(32, 32), codec="libx264", options=None):
    """A video with picture k shown at ticks[k] * tick seconds."""
    with av.open(str(path), "w") as container:
        rate = round(1 / tick) if tick > Fraction(1, 100) else 25
        stream = cast(av.VideoStream, container.add_stream(codec, rate=rate, options=options))
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        stream.codec_context.time_base = tick
        for k, at in enumerate(ticks):
            picture = av.VideoFrame.from_ndarray(np.full((*size, 3), 20 + 4 * k, np.uint8), format="rgb24")
            picture.pts, picture.time_base = at, tick
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def shown(path, **window):
    """Which picture each frame of the window shows."""
    frames = read_window(path, **{"height": 32, "width": 32, **window})
    return [round((frame.float().mean().item() - 20) / 4) for frame in frames]


def refusal(path, **window):
    with pytest.raises(UserError) as error:
        read_window(path, **{"frames": 5, "fps": 24, "height": 32, "width": 32, **window})
    return str(error.value).replace(str(path), "FILE")


def test_25_to_24_frames_a_second_skips_one_picture_a_second(tmp_path):
    # Frame k shows picture floor(25 k / 24): all of the first second but picture 24.
    clip = make_video(tmp_path / "a.mp4", range(46), Fraction(1, 25))
    assert shown(clip, frames=45, fps=24) == [*range(24), *range(25, 46)]


def test_30_to_24_frames_a_second_skips_every_fifth_picture(tmp_path):
    clip = make_video(tmp_path / "a.mp4", range(20), Fraction(1, 30))
    assert shown(clip, frames=16, fps=24) == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18]


def test_twice_the_rate_shows_each_picture_twice(tmp_path):
    clip = make_video(tmp_path / "a.mp4", range(4), Fraction(1, 12))
    assert shown(clip, frames=8, fps=24) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_clip_that_ends_before_the_last_frame_is_too_short(tmp_path):
    # 45 pictures at 25 a second end at 1.8 s; frames 0 to 43 of 24 a second begin before that.
    clip = make_video(tmp_path / "a.mp4", range(45), Fraction(1, 25))
    assert refusal(clip, frames=45) == (
        "FILE: too short: it yields 44 frames at 24 fps from 0 s, and 45 are needed; take a longer clip or an earlier start"
    )
    assert "yields 20 frames at 24 fps from 1 s" in refusal(clip, frames=45, start=1.0)
    assert "yields 0 frames at 24 fps from 9 s" in refusal(clip, frames=45, start=9.0)


def test_variable_rate_follows_the_time_stamps(tmp_path):
    # Shown at 0, 0.1, 0.5, 0.55 and 1 s; the last lasts as long as the gap before it, 0.45 s.
    clip = make_video(tmp_path / "a.mp4", [0, 100, 500, 550, 1000], Fraction(1, 1000))
    assert shown(clip, frames=15, fps=10) == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4]
    assert "yields 15 frames at 10 fps" in refusal(clip, frames=16, fps=10)


def test_time_counts_from_the_first_picture(tmp_path):
    clip = make_video(tmp_path / "a.mkv", range(5000, 6000, 40), Fraction(1, 1000))
    assert shown(clip, frames=20, fps=25) == list(range(20))
    assert shown(clip, frames=10, fps=25, start=0.2) == list(range(5, 15))


@pytest.mark.parametrize("count", [44, 45, 48])
def test_time_stamps_rounded_to_milliseconds_neither_repeat_nor_add_a_frame(tmp_path, count):
    clip = make_video(tmp_path / "a.mkv", range(count), Fraction(1, 24))
    assert shown(clip, frames=count, fps=24) == list(range(count))
    assert f"yields {count} frames" in refusal(clip, frames=count + 1)


def test_titles_in_any_encoding(tmp_path):
    clip = tmp_path / "a.avi"
    with av.open(str(clip), "w") as container:
        container.metadata["title"] = "Titel"
        stream = cast(av.VideoStream, container.add_stream("mpeg4", rate=25))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    content = clip.read_bytes()
    assert b"Titel" in content
    clip.write_bytes(content.replace(b"Titel", b"\xd3\xd4\xff\xfe\xd3"))
    assert len(shown(clip, frames=3, fps=25)) == 3


def test_the_header_of_an_avi_is_not_believed(tmp_path):
    clip = make_video(tmp_path / "a.avi", range(40), Fraction(1, 25), codec="mpeg4", options={"bf": "2", "b": "4M"})
    content = bytearray(clip.read_bytes())
    for field, offset in ((b"avih", 24), (b"strh", 40)):  # the number of pictures, twice
        at = content.find(field) + offset
        assert struct.unpack("<I", content[at : at + 4]) == (40,)
        content[at : at + 4] = struct.pack("<I", 9000)
    clip.write_bytes(content)
    assert shown(clip, frames=40, fps=25) == list(range(40))
    assert "yields 40 frames" in refusal(clip, frames=41, fps=25)


def decoded(*stamps, corrupt=()):
    """What `pictures` makes of a decoder that hands out these time stamps: (times, pictures, damage)."""
    made = [
        SimpleNamespace(name=k, pts=stamp, width=32, height=32, is_corrupt=k in corrupt)
        for k, stamp in enumerate(stamps)
    ]
    stream = SimpleNamespace(
        container=SimpleNamespace(decode=lambda _: iter(made)), time_base=Fraction(1, 25), sample_aspect_ratio=None
    )
    times, names, source = [], [], pictures(Path("x.avi"), stream, Limits())
    while True:
        try:
            time, picture = next(source)
        except StopIteration as end:
            return times, names, end.value
        times.append(round(time * 25, 6))
        names.append(picture.name)


def test_jumbled_time_stamps_are_put_in_order_and_pictures_left_in_theirs():
    # As FFmpeg reads v_LongJump_g04_c03.avi of UCF-101: I B B P B B, the stamps of the second B and the P exchanged.
    assert decoded(1, 2, 4, 3, 5, 7, 6) == ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], "")
    # As far as H.264 can go, 16 places, over more pictures than are looked ahead.
    stamps = [k + 16 if k % 17 == 0 else k - 1 for k in range(51)]
    assert decoded(*stamps) == (list(range(51)), list(range(51)), "")


def test_time_stamps_that_run_backwards_or_are_missing():
    times, _, damage = decoded(*range(30), *range(30))
    assert times == list(range(len(times)))
    assert damage == "time stamps run backwards"
    with pytest.raises(UserError, match=r"x.avi: picture 3 has no time stamp; convert the file to MP4"):
        decoded(0, 1, None, 3)


def test_a_damaged_picture_ends_the_stream():
    assert decoded(0, 1, 2, 3, corrupt=[2]) == ([0, 1], [0, 1], "a damaged picture")


def test_one_picture_is_one_frame(tmp_path):
    clip = make_video(tmp_path / "a.mp4", [0], Fraction(1, 25))
    assert shown(clip, frames=1, fps=24) == [0]
    assert "yields 1 frames" in refusal(clip, frames=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.mp4", b"hello world\n" * 99, "not a readable video (Invalid data found when processing input)"),
        ("empty.mp4", b"", "the file is empty"),
        (
            "index.mp4",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\nother.mp4\n#EXT-X-ENDLIST\n",
            "not a readable video",
        ),
        ("list.mp4", b"ffconcat version 1.0\nfile other.mp4\n", "not a readable video"),
    ],
)
def test_files_that_are_no_video(tmp_path, name, content, message):
    make_video(tmp_path / "other.mp4", range(20), Fraction(1, 25))  # what the lists name: must not be opened
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(f"FILE: {message}")


def test_missing_files_folders_and_sound_alone(tmp_path):
    assert refusal(tmp_path / "none.mp4") == "FILE: no such file; name a video file"
    assert refusal(tmp_path) == "FILE: not a regular file; name a video file"
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    assert refusal(sound) == "FILE: no video stream that can be decoded (found audio aac); leave it out"


def test_a_truncated_file_gives_what_it_holds_and_no_more(tmp_path):
    torch.manual_seed(0)
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    write_video(whole, torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8), 24)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    window = {"frames": 10, "fps": 24, "height": 32, "width": 32}
    assert torch.equal(read_window(cut, **window), read_window(whole, **window))
    message = refusal(cut, frames=60)
    found = re.fullmatch(
        r"FILE: damaged after \d\.\d\d s \(.+\): it yields (\d+) frames at 24 fps from 0 s, and 60 are needed; "
        r"fetch it again or leave it out",
        message,
    )
    assert found, message
    assert 10 <= int(found[1]) <= 32
    cut.write_bytes(content[:400])  # in the middle of the index
    assert refusal(cut).startswith(("FILE: not a readable video", "FILE: no video stream"))


def test_limits(tmp_path):
    clip = make_video(tmp_path / "a.mp4", range(40), Fraction(1, 25))
    assert refusal(clip, limits=Limits(pixels=1000)) == (
        "FILE: pictures of 32x32; at most 1000 pixels are read: scale it down"
    )
    assert refusal(clip, start=1.0, limits=Limits(decoded=20)) == (
        "FILE: over 20 pictures before the window is full; cut the video"
    )
    strip = make_video(tmp_path / "b.mp4", range(2), Fraction(1, 25), size=(16, 512))
    assert "pictures of 512x16 are too elongated to fill a frame" in refusal(strip)


@pytest.mark.parametrize(
    ("matrix", "corner"), [((0, 1, -1, 0), (0, -1)), ((-1, 0, 0, -1), (-1, -1)), ((0, -1, 1, 0), (-1, 0))]
)
def test_pictures_are_turned_as_the_file_says(tmp_path, matrix, corner):
    """Clockwise by a quarter, a half and three quarters: the white corner, top left in the stream, goes round."""
    frames = torch.zeros(3, 3, 32, 64, dtype=torch.uint8)
    frames[:, :, :16, :16] = 255
    clip = tmp_path / "a.mp4"
    write_video(clip, frames, 24)
    content = bytearray(clip.read_bytes())
    a, b, c, d = (65536 * x for x in matrix)
    at = content.find(b"tkhd") + 44
    assert content[at : at + 36] == struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(content)
    height, width = (32, 64) if a else (64, 32)
    window = read_window(clip, frames=3, fps=24, height=height, width=width)
    assert window[0, 0].float().mean() == pytest.approx(255 / 8, abs=1)  # nothing cropped
    assert window[0, :, corner[0], corner[1]].tolist() == [255, 255, 255]
    content[at : at + 36] = struct.pack(">9i", 46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)
    clip.write_bytes(content)
    assert "turned by -45 degrees; only quarter turns are read" in refusal(clip)


def test_portrait_is_cropped_not_squashed(tmp_path):
    """96 x 48, three bands of 32 rows, into 32 x 32: scaled to 64 x 32, of which rows 16 to 47 stay."""
    bands = torch.tensor([[200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=torch.uint8)
    picture = bands.repeat_interleave(32, dim=0).T[:, :, None].expand(3, 96, 48)
    out = fill(picture, 1.0, 32, 32)
    assert out.shape == (3, 32, 32)
    assert [out[:, row, 7].argmax().item() for row in (0, 4, 6, 25, 27, 31)] == [0, 0, 1, 1, 2, 2]
    clip = tmp_path / "a.mp4"
    write_video(clip, picture.expand(3, 3, 96, 48), 24)
    read = read_window(clip, frames=3, fps=24, height=32, width=32)
    assert (read[1].float() - out.float()).abs().mean() < 3


def test_fill_keeps_equal_sizes_averages_when_shrinking_and_undoes_pixel_shape():
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (3, 31, 47), dtype=torch.uint8)
    assert torch.equal(fill(picture, 1.0, 31, 47), picture)
    assert torch.equal(fill(picture, 1.0, 31, 41), picture[:, :, 3:44])
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(36).expand(3, 72, 72)
    assert (fill(stripes, 1.0, 8, 8)[:, :, 1:-1].float() - 127.5).abs().max() <= 4  # without antialiasing: 0 or 255
    # Pixels twice as wide as high: 32 x 32 of them are a picture of 64 x 32.
    left_white = torch.zeros(3, 32, 32, dtype=torch.uint8)
    left_white[:, :, :8] = 255
    assert (fill(left_white, 2.0, 32, 64)[0, 0] > 127).sum() == 16


def test_to_model_and_back():
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(5, 3, 16, 16)
    pixels = to_model(grey)
    assert pixels.shape == (3, 5, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert torch.equal(to_uint8(pixels), grey)
    # 255 (x + 1) / 2 + 0.5, truncated: 0.5 rounds up, and so on outside [-1, 1].
    values = torch.tensor([-3.0, -1.0, 2 * 0.49 / 255 - 1, 2 * 0.51 / 255 - 1, 0.0, 1.0, 7.0])
    assert to_uint8(values.view(1, 1, 1, 7).expand(3, 1, 1, 7))[0, 0, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_written_videos_are_h264_for_browsers_true_in_colour_and_equal_each_time(tmp_path):
    shipped = SHIPPED / "basketball.mp4"
    frames = read_window(shipped, frames=6, fps=24, height=96, width=128)[:, :, :95, :127]
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, 24)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content == (tmp_path / "b.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    assert 0 < content.find(b"moov") < content.find(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 24)
        assert (stream.width, stream.height) == (128, 96)
    read = read_window(tmp_path / "a.mp4", frames=6, fps=24, height=96, width=128).float()
    difference = read[:, :, :95, :127] - frames.float()
    assert difference.abs().mean() < 5
    assert difference.mean(dim=(0, 2, 3)).abs().max() < 0.5  # no tint: the right matrix, range and rounding
    assert (read[:, :, 95] - read[:, :, 94]).abs().mean() < 5  # the row added repeats its neighbour
    assert (read[:, :, :, 127] - read[:, :, :, 126]).abs().mean() < 5


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.mp4"
    target.write_text("old")
    with pytest.raises(Exception, match=r".+"):
        write_video(target, torch.zeros(2, 4, 32, 32, dtype=torch.uint8), 24)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert target.read_text() == "old"


def test_side_by_side():
    torch.manual_seed(0)
    left, right = torch.randint(0, 256, (2, 4, 3, 32, 100), dtype=torch.uint8)
    video = side_by_side([("truth", left), ("LoRA, a name too long for its column", right)], seam=2)
    assert video.shape == (4, 3, 72, 202)
    assert torch.equal(video[:, :, 40:, :100], left)
    assert torch.equal(video[:, :, 40:, 102:], right)
    assert (video[:, :, :, 100:102] == 128).all()
    labels, marks = video[:, :, :22, :100], video[:, :, 22:40, :100]
    assert (labels == labels[:1]).all()
    assert labels.max() > 200
    assert torch.equal(marks[0], marks[1])
    assert torch.equal(marks[2], marks[3])
    assert not torch.equal(marks[1], marks[2])
    assert torch.equal(video[:, :, 22:40, 102:], marks)
    assert (video[:, :, :40, -3:] == 24).all()  # the long label ends inside its column
    unmarked = side_by_side([("truth", left)])
    assert torch.equal(unmarked[:, :, :22], labels)
    assert (unmarked[:, :, 22:40] == 24).all()


@pytest.mark.parametrize(
    ("name", "start", "mean", "digest"),
    [
        ("baseball", 0.0, 69.1, "1ab1a9c2fcbb0365"),
        ("basketball", 2.4, 115.3, "dd054508285c3020"),
    ],
)
def test_shipped_videos(name, start, mean, digest):
    path = SHIPPED / f"{name}.mp4"
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest)
    window = read_window(path, start=start, frames=45, fps=24, height=96, width=128)
    assert window.float().mean().item() == pytest.approx(mean, abs=0.5)
    assert (window[1:].float() - window[:-1].float()).abs().mean(dim=(1, 2, 3)).max() < 30  # no cut


needs_clips = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real clips are not at {SHARED}")


@needs_clips
def test_real_clips_give_a_window():
    """Every sixth of the 80: Xvid and MEncoder AVI, with and without B-frames, H.264, old metadata, odd sizes."""
    paths = sorted(path for path in SHARED.rglob("*") if path.suffix in (".avi", ".mp4"))
    assert len(paths) == 80
    for path in paths[::6]:
        window = read_window(path, frames=45, fps=24, height=96, width=128)
        assert window.shape == (45, 3, 96, 128)
        assert 10 < window.float().mean() < 240, path


@needs_clips
@pytest.mark.parametrize(
    "name", ["WritingOnBoard_g11_c02.avi", "BaseballPitch_g01_c01.avi", "JavelinThrow_g22_c01.avi", "man-surfing.mp4"]
)
def test_frame_counts_of_real_clips_agree_with_their_list(name):
    """The list counts whole frames at 24 a second; a last one that only begins before the end is one more here."""
    (row,) = [line for line in (SHARED / "README.md").read_text().splitlines() if f"{name} |" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    pictures, rate, *rest = cells[3 if cells[2] in ("test", "train") else 2 :]
    listed = int(rest[0] if name.endswith(".avi") else rest[1])
    seconds = int(pictures) / (Fraction(30000, 1001) if rate == "29.97" else Fraction(rate))
    assert math.floor(seconds * 24) == listed
    (path,) = SHARED.rglob(f"*{name}")
    assert f"yields {math.ceil(seconds * 24)} frames" in refusal(path, frames=500)
