"""One clip: lossless storage, the frame's shape, the window's place, and why a video is rejected."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from vidtta.engine.data.decode import Limits, open_pictures, pictures
from vidtta.engine.data.video import fill, read_window
from vidtta.engine.errors import UserError
from vidtta.engine.prepare.convert import convert, count_frames, cut
from vidtta.engine.prepare.output import clip_path, read_state, state_path
from vidtta.engine.prepare.storage import write_clip
from vidtta.engine.prepare.workers import Job

from .prepare_sources import SMALL, write_video

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")


def settings(**changes):
    return dataclasses.replace(SMALL, **changes)


def test_stored_frames_read_back_bit_for_bit_at_exact_times(tmp_path):
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (45, 3, 24, 40), dtype=torch.uint8)  # noise: nothing that a codec could guess
    frames[0], frames[1] = 0, 255
    path = tmp_path / "a.mp4"
    write_clip(path, frames, 24.0)
    assert torch.equal(read_window(path, frames=45, fps=24, height=24, width=40), frames)
    with open_pictures(path, Limits()) as stream:
        times = [time for time, _ in pictures(path, stream, Limits())]
        assert stream.average_rate == 24
    assert times == [k / 24 for k in range(45)]
    first = path.read_bytes()
    write_clip(path, frames, 24.0)
    assert path.read_bytes() == first
    with pytest.raises(UserError, match="yields 45 frames"):
        read_window(path, frames=46, fps=24, height=24, width=40)


@pytest.mark.parametrize("fps", [1, 8, 23.976, 29.97, 30, 50, 60])
def test_any_rate_is_stored_exactly(fps, tmp_path):
    frames = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 8, 8).contiguous()
    write_clip(tmp_path / "a.mp4", frames, fps)
    assert torch.equal(read_window(tmp_path / "a.mp4", frames=40, fps=fps, height=8, width=8), frames)


def test_a_clip_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("vidtta.engine.prepare.storage.read_window", lambda *_, **__: torch.zeros(2, 3, 8, 8))
    with pytest.raises(AssertionError, match="reads back differently"):
        write_clip(tmp_path / "a.mp4", torch.ones(2, 3, 8, 8, dtype=torch.uint8), 24.0)
    assert list(tmp_path.iterdir()) == []


def test_crop_is_what_runs_do_to_any_clip(tmp_path):
    video = write_video(tmp_path / "a.avi", size=(48, 32))
    frames, facts = cut(video, SMALL)
    assert torch.equal(frames, read_window(video, frames=6, fps=24, height=24, width=32))
    assert facts == {"source_start": 0.0, "source_size": "32x48", "bars": [0, 0, 0, 0]}


@pytest.mark.parametrize(
    ("size", "bars", "inner"),
    [
        ((24, 32), [0, 0, 0, 0], (24, 32)),
        ((48, 32), [0, 0, 8, 8], (24, 16)),
        ((16, 64), [8, 8, 0, 0], (8, 32)),
        ((16, 48), [6, 7, 0, 0], (11, 32)),  # 10.67 rows
        ((16, 256), [11, 11, 0, 0], (2, 32)),
    ],
    ids=str,
)
def test_pad_shows_all_of_the_picture_between_black_bars(size, bars, inner, tmp_path):
    video = write_video(tmp_path / "a.avi", size=size)
    frames, facts = cut(video, settings(aspect="pad"))
    assert frames.shape == (6, 3, 24, 32)
    assert facts["bars"] == bars
    top, bottom, left, right = bars
    shown = frames[:, :, top : 24 - bottom, left : 32 - right]
    assert shown.shape[2:] == inner
    assert frames.long().sum() == shown.long().sum()  # the rest is black
    whole = read_window(video, frames=6, fps=24, height=size[0], width=size[1])
    assert torch.equal(shown[3], fill(whole[3], 1.0, *inner))


def test_the_middle_is_the_middle_of_what_decodes(tmp_path):
    video = write_video(tmp_path / "a.avi", pictures=26)  # 26 / 25 s: 25 frames at 24 a second
    assert count_frames(video, 24) == 25
    frames, facts = cut(video, settings(start="middle"))
    assert facts["source_start"] == 9 / 24  # (25 - 6) // 2 frames before it
    assert torch.equal(frames, read_window(video, frames=25, fps=24, height=24, width=32)[9:15])
    with pytest.raises(UserError, match="yields 25 frames at 24 fps from 0 s, and 30 are needed"):
        cut(video, settings(start="middle", frames=30))


@pytest.mark.parametrize("pictures", [1, 2, 24, 25, 26, 50])
@pytest.mark.parametrize("rate", [24, 25, 30])
def test_the_count_of_frames_is_what_can_be_read(pictures, rate, tmp_path):
    video = write_video(tmp_path / "a.avi", pictures, size=(16, 16), rate=rate)
    count = count_frames(video, 24)
    assert read_window(video, frames=count, fps=24, height=16, width=16).shape[0] == count
    with pytest.raises(UserError, match=f"yields {count} frames"):
        read_window(video, frames=count + 1, fps=24, height=16, width=16)


def run(tmp_path, video, **changes):
    state = convert(Job("v_A_g01_c01", video, tmp_path / "out", settings(**changes)))
    assert state == json.loads(state_path(tmp_path / "out", "v_A_g01_c01").read_text())
    return state


def test_a_clip_and_its_state(tmp_path):
    video = write_video(tmp_path / "a.avi")
    state = run(tmp_path, video)
    path = clip_path(tmp_path / "out", "v_A_g01_c01")
    frames = read_window(path, frames=6, fps=24, height=24, width=32)
    assert torch.equal(frames, cut(video, SMALL)[0])
    assert state == {
        "source_start": 0.0,
        "source_size": "32x24",
        "bars": [0, 0, 0, 0],
        "bytes": path.stat().st_size,
        "frames_sha256": hashlib.sha256(bytes(frames.flatten().tolist())).hexdigest(),
        "source_sha256": hashlib.sha256(video.read_bytes()).hexdigest(),
    }
    assert read_state(tmp_path / "out", "v_A_g01_c01") == state
    path.write_bytes(path.read_bytes()[:-1])
    assert read_state(tmp_path / "out", "v_A_g01_c01") is None
    path.unlink()
    assert read_state(tmp_path / "out", "v_A_g01_c01") is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "short",
            "too short: it yields 4 frames at 24 fps from 0 s, and 6 are needed; take a longer clip or an earlier start",
        ),
        ("empty", "the file is empty; fetch it again or leave it out"),
        ("text", "not a readable video (Invalid data found when processing input); fetch it again, or leave it out"),
        ("missing", "no such file; name a video file"),
        ("cut", "not one picture can be decoded; fetch it again or leave it out"),
    ],
)
def test_a_video_that_cannot_be_a_clip_is_rejected_for_a_reason_without_its_place(name, reason, tmp_path):
    video = tmp_path / "v.avi"
    if name in ("short", "cut"):
        content = write_video(video, pictures=4).read_bytes()
        video.write_bytes(content[: content.index(b"movi") + 4] if name == "cut" else content)
    elif name != "missing":
        video.write_bytes(b"no video" * 99 if name == "text" else b"")
    assert run(tmp_path, video) == {"rejected": reason}
    assert not (tmp_path / "out" / "clips").exists()
    assert read_state(tmp_path / "out", "v_A_g01_c01") == {"rejected": reason}


@needs_shared
def test_real_clips_at_a_variable_rate_and_under_a_lying_header(tmp_path):
    size = {"height": 48, "width": 64, "frames": 45, "conditioning_frames": 22}
    kayak = SHARED / "ucf101" / "Kayaking" / "v_Kayaking_g12_c03.avi"
    # Its header says 372 pictures. There are 371, but one is shown twice as long.
    assert (count_frames(kayak, 25), count_frames(kayak, 24)) == (372, 358)
    assert run(tmp_path, kayak, start="middle", **size)["source_start"] == 156 / 24
    baseball = SHARED / "natural" / "baseball.mp4"
    # Its header says 183 pictures at 27.89 a second. There are 167 at 29.97, which last 133.7 frames at 24.
    assert count_frames(baseball, 24) == 134
    assert run(tmp_path, baseball, aspect="pad", **size)["bars"] == [6, 6, 0, 0]
    frames = read_window(clip_path(tmp_path / "out", "v_A_g01_c01"), frames=45, fps=24, height=48, width=64)
    assert torch.equal(frames[:, :, 6:42], read_window(baseball, frames=45, fps=24, height=36, width=64))
