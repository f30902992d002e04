"""Read images and tables from a zip without unpacking it."""

import contextlib
import errno
import os
import re
import stat
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from ssl_pretrain.data.file_types import (
    HIDDEN,
    SIGNATURE_BYTES,
    TABLE_SUFFIXES,
    SkipCounter,
    find_images_by_content,
    is_array,
    is_image,
    is_skipped,
    without_arrays,
)
from ssl_pretrain.data.images import MAX_BYTES
from ssl_pretrain.data.listing import Listing, Scan, Span, change_stamp, load_or_scan, pack_paths
from ssl_pretrain.system.platform_support import read_at

_MAX_TABLE_BYTES = 1 << 28  # largest table of labels, because tables are read whole
_MAX_TABLES = 1000  # largest number of tables in a listing
_MAX_COMPRESSION_RATIO = 200  # for images of more than _MAX_UNCHECKED_BYTES
_MAX_UNCHECKED_BYTES = 1 << 28  # decompressed bytes that are accepted at any ratio
_LOCAL_HEADER_BYTES = 30  # length of a member's header before its name
# zipfile raises RuntimeError for an encrypted member or an unknown compression method.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError)

Members = dict[str, zipfile.ZipInfo]


def list_zip(path: str | Path, cache_dir: Path) -> Listing:
    """List the images in a zip with their positions. The list is cached until the file changes.

    Raises:
        ValueError: If the file is not a zip, or an image in it is encrypted, compressed by another
            method than deflate, or of an impossible size.
    """
    return load_or_scan(os.path.abspath(path), cache_dir, scan_zip)


def scan_zip(root: str) -> Scan:
    """List the images in a zip without the cache."""
    status = os.stat(root)
    skip_counter = SkipCounter()
    try:
        with zipfile.ZipFile(root) as archive:
            images, others = _group_members(archive, skip_counter)

            def read_head(path: str) -> bytes:
                try:
                    with archive.open(others[path]) as file:
                        return file.read(SIGNATURE_BYTES)
                except (OSError, *_ZIP_ERRORS):
                    return b""

            paths = find_images_by_content(others, read_head, skip_counter)
            images |= {path: others[path] for path in paths}
    except (OSError, *_ZIP_ERRORS) as error:
        raise ValueError(f"data.root: {root} cannot be read as a zip: {error}") from None
    arrays = [path for path in images if is_array(path)]
    pictures = [path for path in images if not is_array(path)]
    paths = sorted(without_arrays(pictures, arrays, skip_counter), key=os.fsencode)
    spans = [_span(root, path, images[path]) for path in paths]
    tables = [path for path in sorted(others) if path.lower().endswith(TABLE_SUFFIXES)]
    listing = replace(
        pack_paths(root, paths, np.array(spans, np.int64).reshape(-1, len(Span._fields))),
        skipped=skip_counter.skipped_files(),
        tables=tuple(tables[:_MAX_TABLES]),
    )
    return Scan(listing, [""], change_stamp(status))


def _group_members(archive: zipfile.ZipFile, skip_counter: SkipCounter) -> tuple[Members, Members]:
    """Return the images and the other files, each by its path after unpacking.

    Members that are not read are counted in `skip_counter`.
    """
    images: Members = {}
    others: Members = {}
    for member in archive.infolist():
        name = _member_name(member)
        levels = [level for level in name.split("/") if level not in ("", ".")]
        path = "/".join(levels)
        if not levels or name.endswith("/"):
            continue
        if any(is_skipped(level) for level in levels if level != ".."):
            skip_counter.add(HIDDEN, path)
        elif name.startswith("/") or re.match("[A-Za-z]:/", name):
            skip_counter.add("members with absolute paths", name)
        elif ".." in levels:
            skip_counter.add("members outside the archive", name)
        elif stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            skip_counter.add("links, pipes or devices", path)
        else:
            members = images if is_image(path) else others
            if path in members:
                skip_counter.add("earlier members of the same name", path)
            members[path] = member
    return images, others


def _span(root: str, path: str, member: zipfile.ZipInfo) -> Span:
    """Return the position of an image. Raise ValueError if it cannot be read in place."""
    span = Span(
        member.header_offset,
        member.compress_size,
        member.compress_type,
        member.file_size,
        member.CRC,
    )
    if member.flag_bits & 1 or span.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"data.root: {root} contains {path}, which is encrypted or compressed by an "
            "unsupported method; pack the images again with `zip -r -0`"
        )
    if max(span.offset, span.compressed_size, span.size) >= 2**63:
        raise ValueError(
            f"data.root: {root} is damaged, because {path} has an impossible size; copy it again"
        )
    return span


def _member_name(member: zipfile.ZipInfo) -> str:
    """Return the member's path with slashes.

    Windows may write backslashes, and macOS writes UTF-8 without setting the flag for it.
    """
    name = member.filename
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def read_table(path: str | Path, name: str) -> bytes:
    """Return the bytes of a table in a zip.

    Args:
        path: Path of the zip.
        name: Path of the table in the zip, with slashes.

    Raises:
        OSError: If the table is damaged or too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {_member_name(info).removeprefix("./"): info for info in archive.infolist()}
            size = members[name].file_size
            if size > _MAX_TABLE_BYTES:
                raise OSError(errno.EFBIG, f"{size:,} bytes are too many for a table of labels")
            return archive.read(members[name])
    except _ZIP_ERRORS as error:
        raise OSError(errno.EIO, str(error)) from None


def read_span(descriptor: int, span: Span) -> bytes:
    """Return the decompressed bytes of an image in a zip.

    Args:
        descriptor: File descriptor of the zip.
        span: Position of the image.

    Raises:
        OSError: If the zip is damaged, or the image would grow implausibly (a zip bomb).
    """
    # The lengths of the name and the extra field may differ from those in the zip's directory.
    header = read_at(descriptor, _LOCAL_HEADER_BYTES, span.offset)
    name_bytes = int.from_bytes(header[26:28], "little")
    extra_bytes = int.from_bytes(header[28:30], "little")
    start = span.offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    compressed = read_at(descriptor, min(span.compressed_size, MAX_BYTES), start)
    if header[:4] != b"PK\3\4" or len(compressed) != span.compressed_size:
        raise OSError("the zip is damaged or was replaced")
    plausible_size = max(_MAX_UNCHECKED_BYTES, _MAX_COMPRESSION_RATIO * span.compressed_size)
    if span.size > min(MAX_BYTES, plausible_size):
        raise OSError(
            f"decompressing the image would turn {span.compressed_size:,} into {span.size:,} "
            "bytes, which no image needs (a zip bomb?)"
        )
    content = _inflate(compressed, span.size) if span.method else compressed
    if len(content) != span.size:
        difference = "more" if len(content) > span.size else "fewer"
        raise OSError(
            f"the image has {difference} than the {span.size:,} bytes that the zip states"
        )
    if zlib.crc32(content) != span.crc:
        raise OSError("the checksum of the image differs from the zip's; the zip is damaged")
    return content


def _inflate(compressed: bytes, size: int) -> bytes:
    """Decompress at most `size` + 1 bytes, enough to notice that the content is too long."""
    try:
        return zlib.decompressobj(-15).decompress(compressed, size + 1)
    except zlib.error as error:
        raise OSError(str(error)) from error
