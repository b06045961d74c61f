"""Look into .rar, .zip and .tar archives and unpack single members, through libarchive.

An archive is a stranger's file. Members are written under names of ours, never their own; links, names that lead out
and members above a size are refused; formats that read other files or start other programs are not switched on.
"""

import ctypes
import logging
import os
import re
import uuid
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError

FORMATS = ("rar", "rar5", "zip", "tar")
FILTERS = ("gzip", "bzip2", "xz", "lzma", "zstd")
LONGEST_TEXT = 8 * 2**20
BLOCK = 2**18


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive may claim and unpack to. A file of a few kilobytes can hold gigabytes of zeros."""

    member: int = 2 * 2**30
    """Bytes of one member."""

    total: int = 64 * 2**30
    """Bytes of all members together."""

    members: int = 1_000_000


@dataclass(frozen=True)
class Listing:
    """What an archive holds."""

    members: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Path and claimed bytes of the wanted members, by their number in the archive."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of those that will not be unpacked."""
    texts: dict[str, str] = field(default_factory=dict)
    """Contents of the wanted text files, by path."""


def list_archive(
    archive: Path, suffixes: tuple[str, ...], texts: re.Pattern[str], limits: ArchiveLimits | None = None
) -> Listing:
    """List the members with one of `suffixes` and read the texts whose file name `texts` matches, in one pass.

    Raises UserError when it is no archive, ends early, is encrypted or claims more than the limits allow.
    """
    limits = limits or ArchiveLimits()
    listing, claimed = Listing(), 0
    for member in _members(archive):
        claimed += member.size
        if claimed > limits.total or member.number >= limits.members:
            raise UserError(
                f"{archive}: claims over {limits.total:,} bytes or {limits.members:,} members; unpack it with another "
                "program and give the folder"
            )
        name = PurePosixPath(member.path).name
        if texts.fullmatch(name) and member.is_file:
            listing.texts[member.path] = _text(archive, member)
        if not name.lower().endswith(suffixes) or name.startswith("."):
            continue
        if reason := _refusal(archive, member, limits):
            listing.refused.append((member.path, reason))
        else:
            listing.members[member.number] = member.path, member.size
    return listing


def unpack(
    archive: Path, wanted: Collection[int], folder: Path, limits: ArchiveLimits | None = None
) -> Iterator[tuple[int, Path | str]]:
    """Yield (number, temporary file in `folder`) for the wanted members, or (number, why one cannot be unpacked).

    One at a time, in the archive's order; whoever takes a file deletes it.
    Raises UserError when the archive is damaged as a whole, encrypted or over the limit in total.
    """
    limits = limits or ArchiveLimits()
    left, total = set(wanted), 0
    for member in _members(archive) if left else ():
        if member.number not in left:
            continue
        left.discard(member.number)
        reason = _refusal(archive, member, limits)
        temporary = folder / f".tmp-{uuid.uuid4().hex[:12]}-unpacked{PurePosixPath(member.path).suffix}"
        try:
            with temporary.open("xb") as handle:
                for block in _bounded(member.blocks, limits.member) if not reason else ():
                    total += handle.write(block)
                    if total > limits.total:
                        raise UserError(f"{archive}: unpacks to over {limits.total:,} bytes; unpack it by other means")
        except _MemberError as error:
            reason = str(error)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if reason:
            temporary.unlink()
        yield member.number, reason or temporary
        if not left:
            return
    if left:
        raise UserError(f"{archive}: changed while it was read; run the command again")


@dataclass(frozen=True)
class _Member:
    """One entry of an archive. Its blocks can be read until the next entry is asked for."""

    number: int
    path: str
    size: int
    """As claimed; 0 where nothing is claimed."""
    is_file: bool
    is_encrypted: bool
    blocks: Iterator[bytes]


class _MemberError(Exception):
    """One member cannot be unpacked, the others may."""


def _refusal(archive: Path, member: _Member, limits: ArchiveLimits) -> str:
    """Why a member is not unpacked, or "". Raises UserError when it is encrypted: then all of them are."""
    if member.is_encrypted:
        raise UserError(f"{archive}: {member.path} is encrypted; unpack it with its password and give the folder")
    if not member.is_file:
        return "a link or a special file, not a video"
    if member.path[0] in "/\\" or re.match("[A-Za-z]:", member.path) or ".." in re.split(r"[/\\]", member.path):
        return "its path leads out of the archive"
    if member.size > limits.member:
        return f"{member.size:,} bytes; at most {limits.member:,} are unpacked"
    return ""


def _bounded(blocks: Iterator[bytes], most: int) -> Iterator[bytes]:
    """The blocks of one member. Sizes in headers may lie, so what comes is counted."""
    size = 0
    for block in blocks:
        size += len(block)
        if size > most:
            raise _MemberError(f"unpacks to over {most:,} bytes, more than it claims")
        yield block


def _text(archive: Path, member: _Member) -> str:
    try:
        return b"".join(_bounded(member.blocks, LONGEST_TEXT)).decode("utf-8", "replace")
    except _MemberError as error:
        raise UserError(f"{archive}: {member.path}: {error}; fetch the archive again") from error


def _members(archive: Path) -> Iterator[_Member]:
    """Yield what an archive holds, in its order."""
    ffi, read, ArchiveError = _libarchive()
    # libarchive-c does not wrap this one. Of an encrypted member libarchive may give the cipher and report no error.
    is_encrypted = ffi.ffi("entry_is_encrypted", [ctypes.c_void_p], ctypes.c_int)
    try:
        descriptor = os.open(archive, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{archive}: cannot be opened ({error.strerror}); give an archive or a folder") from error
    try:
        with read.new_archive_read(FORMATS[0], FILTERS[0]) as pointer:
            for kind, names in (("format", FORMATS[1:]), ("filter", FILTERS[1:])):
                for name in names:
                    with suppress(ValueError):  # an old libarchive without it
                        getattr(ffi, f"get_read_{kind}_function")(name)(pointer)
            ffi.read_open_fd(pointer, descriptor, BLOCK)
            for number, entry in enumerate(read.ArchiveRead(pointer)):
                path = entry.pathname or b""
                yield _Member(
                    number,
                    path if isinstance(path, str) else os.fsdecode(path),
                    entry.size or 0,
                    entry.isreg and not entry.islnk,
                    bool(is_encrypted(entry._entry_p)),
                    _blocks(archive, ffi, pointer),
                )
    except ArchiveError as error:
        raise _unreadable(archive, error) from error
    finally:
        os.close(descriptor)


def _blocks(archive: Path, ffi: Any, pointer: Any) -> Iterator[bytes]:
    """A member's content. Raises _MemberError for damage that libarchive can go on behind, else UserError."""
    buffer = ctypes.create_string_buffer(BLOCK)
    while True:
        try:
            count = ffi.read_data(pointer, buffer, BLOCK)
        except ffi.ArchiveError as error:
            if error.retcode != ffi.ARCHIVE_FAILED:
                raise _unreadable(archive, error) from error
            count = error.retcode
        if count < 0:  # a wrong checksum is but a warning to libarchive
            raise _MemberError(f"damaged in the archive ({(ffi.error_string(pointer) or b'').decode().strip()})")
        if not count:
            return
        yield buffer.raw[:count]


def _unreadable(archive: Path, error: Any) -> UserError:
    return UserError(
        f"{archive}: cannot be read as an archive to its end ({error.msg}); fetch it again, or unpack it with another "
        "program and give the folder"
    )


def _libarchive() -> tuple[Any, Any, type[Exception]]:
    try:
        from libarchive import ffi, read
        from libarchive.exception import ArchiveError
    except (ImportError, OSError, AttributeError, TypeError) as error:  # ctypes' ways to say that there is no library
        raise UserError(
            f"archives are read through libarchive, which does not load ({error}); run `apt-get install libarchive13` "
            "(or your system's like) and `pip install libarchive-c`, or unpack the archive and give the folder"
        ) from error
    logging.getLogger("libarchive").addHandler(logging.NullHandler())  # its warnings are told as reasons
    return ffi, read, ArchiveError
