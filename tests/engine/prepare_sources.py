"""Small videos named as UCF-101's, in folders and archives of every kind, for the tests of `vidtta prepare`."""

import io
import struct
import tarfile
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from vidtta.engine.errors import UserError
from vidtta.engine.prepare.run import prepare
from vidtta.engine.prepare.settings import Kind, Settings

SMALL = Settings(count=None, height=24, width=32, frames=6, conditioning_frames=3)

CLIPS = {
    "v_Archery_g01_c01": 10,
    "v_Archery_g01_c02": 3,  # too short
    "v_Archery_g02_c01": 10,
    "v_Biking_g01_c01": 10,
    "v_Biking_g03_c02": -1,  # no video
    "v_HandStandPushups_g05_c01": 12,
}


def write_video(path: Path, pictures: int = 10, size: tuple[int, int] = (24, 32), rate: int = 25) -> Path:
    """An AVI whose content depends on its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(zlib.crc32(path.stem.encode()))
    with av.open(str(path), "w", format="avi") as container:
        stream = cast(av.VideoStream, container.add_stream("mpeg4", rate=Fraction(rate), options={"b": "1M"}))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count = 1
        for _ in range(pictures):
            pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_ucf101(folder: Path, clips: dict[str, int]) -> Path:
    """A tree CLASS/v_CLASS_gNN_cNN.avi; `clips` gives the number of pictures by name, -1 for a file that is no video."""
    for name, pictures in clips.items():
        path = folder / name.split("_")[1] / f"{name}.avi"
        if pictures < 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not a video" * 100)
        else:
            write_video(path, pictures)
    return folder


def make_source(folder: Path) -> Path:
    """CLIPS in folders by class, with lists, a stray video and a readme."""
    folder = write_ucf101(folder, CLIPS)
    (folder / "HandStandPushups").rename(folder / "HandstandPushups")
    (folder / "lists").mkdir()
    lines = [f"{name.split('_')[1]}/{name}.avi" for name in CLIPS]
    (folder / "lists" / "testlist01.txt").write_text("\r\n".join(lines[:2]))
    (folder / "lists" / "trainlist01.txt").write_text("\r\n".join(f"{line} 1" for line in lines[2:]))
    write_video(folder / "holiday.avi")
    (folder / "readme.txt").write_text("none of ours")
    return folder


def run(source: Path, out: Path, settings: Settings = SMALL, **options: Any) -> tuple[int, dict[str, bytes]]:
    """The exit status, and the folder's files."""
    status = prepare("ucf101", source, out, settings, **{"workers": 1, **options})
    return status, tree(out)


def refusal(source: Path, out: Path, settings: Settings = SMALL, kind: Kind = "ucf101", **options: Any) -> str:
    """The message of the UserError that a command ends in."""
    with pytest.raises(UserError) as caught:
        prepare(kind, source, out, settings, workers=1, **options)
    return str(caught.value)


def contents(folder: Path, root: str = "UCF-101") -> list[tuple[str, bytes]]:
    """The files of a tree as members of an archive."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(f"{root}/{path.relative_to(folder)}", path.read_bytes()) for path in files]


def write_archive(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A .rar, .zip, .tar, .tar.gz or .tar.xz, by the path's suffix."""
    if path.suffix == ".rar":
        path.write_bytes(rar(members))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as archive:  # pyright: ignore
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def rar(members: list[tuple[str, bytes]], encrypted: bool = False) -> bytes:
    """A RAR 4 archive, its members stored: marker, archive header, a header and content each, end."""
    blocks = [b"Rar!\x1a\x07\x00", _block(0x73, 0, bytes(6))]
    for name, content in members:
        size, host_is_unix, version, stored, mode = len(content), 3, 29, 0x30, 0o100644
        about = struct.pack(
            "<IIBIIBBHI", size, size, host_is_unix, zlib.crc32(content), 0, version, stored, len(name), mode
        )
        flags = 0x8000 | (0x04 if encrypted else 0)  # content follows
        blocks += [_block(0x74, flags, about + name.encode()), content]
    return b"".join([*blocks, _block(0x7B, 0x4000, b"")])


def _block(kind: int, flags: int, body: bytes) -> bytes:
    """A RAR 4 block; its checksum is half of a CRC-32."""
    head = struct.pack("<BHH", kind, flags, 7 + len(body)) + body
    return struct.pack("<H", zlib.crc32(head) & 0xFFFF) + head


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
