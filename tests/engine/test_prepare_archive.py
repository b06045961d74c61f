"""Archives: what is listed, what is unpacked, and what is refused."""

import io
import logging
import os
import re
import sys
import tarfile

import pytest
from vidtta.engine.errors import UserError
from vidtta.engine.prepare.archive import ArchiveLimits, Listing, list_archive, unpack
from vidtta.engine.prepare.ucf101 import LIST_NAME

from .prepare_sources import rar, write_archive

SUFFIXES = [".rar", ".zip", ".tar", ".tar.gz", ".tar.xz"]
CONTENT = {
    "UCF-101/A/v_A_g01_c01.avi": os.urandom(300_000),
    "UCF-101/B/v_B_g01_c01.avi": os.urandom(299_999),
    "UCF-101/C/v_C_g01_c01.avi": b"",
}


def listed(archive, **limits) -> Listing:
    return list_archive(archive, (".avi",), LIST_NAME, ArchiveLimits(**limits))


def unpacked(archive, wanted, folder, **limits):
    """Content, or the reason why there is none, by number; the files are deleted."""
    found = {}
    for number, file in unpack(archive, wanted, folder, ArchiveLimits(**limits)):
        assert [path.name for path in folder.iterdir()] == ([] if isinstance(file, str) else [file.name])
        found[number] = file if isinstance(file, str) else file.read_bytes()
        if not isinstance(file, str):
            file.unlink()
    assert list(folder.iterdir()) == []
    return found


def refusal(action, archive):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value).replace(str(archive), "ARCHIVE")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "unpacked"
    path.mkdir()
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_members_come_out_as_they_went_in(suffix, tmp_path, folder):
    lists = ("x/trainlist01.txt", b"A/v_A_g01_c01.avi 1\r\n")
    members = [("readme.txt", b"x"), lists, *CONTENT.items(), ("UCF-101/A/.v_A_g01_c02.avi", b"hidden")]
    archive = write_archive(tmp_path / f"a{suffix}", members)
    found = listed(archive)
    assert found.members == {n: (path, len(content)) for n, (path, content) in enumerate(CONTENT.items(), start=2)}
    assert found.texts == {lists[0]: lists[1].decode()}
    assert found.refused == []
    assert unpacked(archive, {2, 3, 4}, folder) == dict(enumerate(CONTENT.values(), start=2))
    assert list(unpacked(archive, [3], folder)) == [3]
    assert unpacked(archive, [], folder) == {}


@pytest.mark.parametrize("suffix", [".rar", ".zip", ".tar"])
@pytest.mark.parametrize(
    "name", ["../x.avi", "a/../../x.avi", "/tmp/x.avi", "C:\\x.avi", "a\\..\\..\\x.avi", "\\\\host\\x.avi"]
)
def test_a_path_that_leads_out_is_refused_and_nothing_is_written(suffix, name, tmp_path, folder):
    archive = write_archive(tmp_path / f"a{suffix}", [("a/ok.avi", b"1"), (name, b"2")])
    found = listed(archive)
    assert list(found.members) == [0]
    assert [reason for _, reason in found.refused] == ["its path leads out of the archive"]
    assert unpacked(archive, {0, 1}, folder) == {0: b"1", 1: "its path leads out of the archive"}


def test_links_and_devices_are_refused(tmp_path, folder):
    archive = tmp_path / "a.tar"
    kinds = {"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("v.avi")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
        for name, kind in kinds.items():
            member = tarfile.TarInfo(f"{name}.avi")
            member.type, member.linkname = kind, "/etc/passwd" if name == "soft" else "v.avi"
            tar.addfile(member)
    found = listed(archive)
    reason = "a link or a special file, not a video"
    assert found.refused == [(f"{name}.avi", reason) for name in kinds]
    assert unpacked(archive, range(5), folder) == {0: b"abc", 1: reason, 2: reason, 3: reason, 4: reason}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_too_large_is_not_unpacked(suffix, tmp_path, folder):
    archive = write_archive(tmp_path / f"a{suffix}", [("a.avi", bytes(5000)), ("b.avi", bytes(5001))])
    reason = "5,001 bytes; at most 5,000 are unpacked"
    assert listed(archive, member=5000).refused == [("b.avi", reason)]
    assert unpacked(archive, {0, 1}, folder, member=5000) == {0: bytes(5000), 1: reason}
    message = "claims over 10,000 bytes or 1,000,000 members; unpack it with another program and give the folder"
    assert refusal(lambda: listed(archive, total=10_000), archive) == f"ARCHIVE: {message}"
    assert listed(archive, total=10_001, members=2).refused == []
    assert "or 1 members" in refusal(lambda: listed(archive, members=1), archive)


def test_a_member_larger_than_it_claims_ends_at_the_limit(tmp_path, folder):
    archive = write_archive(tmp_path / "a.zip", [("a.avi", bytes(10**6)), ("b.avi", b"b")])
    lying = archive.read_bytes().replace((10**6).to_bytes(4, "little"), (10**3).to_bytes(4, "little"))
    archive.write_bytes(lying)
    assert listed(archive).members[0] == ("a.avi", 1000)
    found = unpacked(archive, {0, 1}, folder, member=5000)
    assert found[0] == "unpacks to over 5,000 bytes, more than it claims" and found[1] == b"b"
    message = "ARCHIVE: unpacks to over 5,000 bytes; unpack it by other means"
    assert refusal(lambda: unpacked(archive, {0}, folder, total=5000), archive) == message


def test_encrypted_archives_are_refused(tmp_path, folder):
    archive = tmp_path / "a.rar"
    archive.write_bytes(rar([("a.avi", b"cipher")], encrypted=True))  # libarchive would hand the cipher out
    message = "ARCHIVE: a.avi is encrypted; unpack it with its password and give the folder"
    assert refusal(lambda: listed(archive), archive) == message
    assert refusal(lambda: unpacked(archive, {0}, folder), archive) == message
    archive = write_archive(tmp_path / "a.zip", [("a.avi", b"cipher")])
    content = bytearray(archive.read_bytes())
    content[6] |= 1  # the general purpose flags, in the member's header and in the directory
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    assert refusal(lambda: listed(archive), archive) == message


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("end", [0.02, 0.3, 0.7])
def test_an_archive_that_ends_early_is_refused(suffix, end, tmp_path, folder):
    archive = write_archive(tmp_path / f"a{suffix}", list(CONTENT.items()))
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(end * len(whole))])
    for action in (lambda: listed(archive), lambda: unpacked(archive, {0, 1, 2}, folder)):
        message = refusal(action, archive)
        assert re.fullmatch(
            r"ARCHIVE: cannot be read as an archive to its end \(.+\); fetch it again, or unpack it with another program "
            "and give the folder",
            message,
        )
    assert list(folder.iterdir()) == []


def test_one_damaged_member_of_a_zip_leaves_the_others(tmp_path, folder, caplog):
    archive = write_archive(tmp_path / "a.zip", list(CONTENT.items()))
    content = bytearray(archive.read_bytes())
    content[1000] ^= 1
    archive.write_bytes(content)
    with caplog.at_level(logging.CRITICAL, logger="libarchive"):
        found = unpacked(archive, {0, 1}, folder)
    first, second = found[0], found[1]
    assert isinstance(first, str) and first.startswith("damaged in the archive (ZIP bad CRC")
    assert second == CONTENT["UCF-101/B/v_B_g01_c01.avi"]


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"#mtree\n./a.avi type=file contents=/etc/passwd\n"], ids=["empty", "text", "mtree"]
)
def test_other_files_are_no_archives(content, tmp_path):
    archive = tmp_path / "a.rar"
    archive.write_bytes(content)
    assert "(Unrecognized archive format)" in refusal(lambda: listed(archive), archive)


def test_an_archive_that_lost_members_since_it_was_listed(tmp_path, folder):
    archive = write_archive(tmp_path / "a.tar", list(CONTENT.items()))
    assert refusal(lambda: unpacked(archive, {7}, folder), archive) == (
        "ARCHIVE: changed while it was read; run the command again"
    )


@pytest.mark.parametrize("gone", ["libarchive", "library"])
def test_without_libarchive_the_cure_is_named(gone, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "libarchive"]:
        monkeypatch.delitem(sys.modules, name)
    if gone == "libarchive":
        monkeypatch.setitem(sys.modules, "libarchive", None)
    else:
        monkeypatch.setenv("LIBARCHIVE", str(tmp_path / "libarchive.so"))
    archive = write_archive(tmp_path / "a.tar", [])
    message = refusal(lambda: listed(archive), archive)
    assert message.startswith("archives are read through libarchive, which does not load (")
    assert message.endswith(
        "); run `apt-get install libarchive13` (or your system's like) and `pip install libarchive-c`, or unpack the "
        "archive and give the folder"
    )
