"""Find the members of a tar by reading its headers, at any position and without unpacking it."""

import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK_BYTES = tarfile.BLOCKSIZE
ReadAt = Callable[[int, int], bytes]  # (offset, number of bytes) -> bytes
_MAX_EXTENSION_BYTES = 1 << 20  # largest extended header, which holds a long name
_MAX_PADDING_BYTES = 1 << 20  # zeros after the end mark; tar pads to 10,240 bytes
_COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class Member(NamedTuple):
    """A member of a tar."""

    name: str
    header_offset: int
    offset: int  # position of the content
    length: int  # bytes of the content
    is_regular: bool  # False for folders, links, pipes and devices


class WindowReader:
    """Reads a file through a window, so that neighboring headers need one read.

    Args:
        read_at: Function that reads from the file.
        size: Bytes of the file.
        window_bytes: Smallest number of bytes per read.
    """

    def __init__(self, read_at: ReadAt, size: int, window_bytes: int):
        self.size = size
        self._read_at, self._window_bytes = read_at, window_bytes
        self._start, self._window = 0, b""

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return bytes of the file. There are fewer than `num_bytes` only at its end."""
        end = min(offset + num_bytes, self.size)
        if offset < self._start or end > self._start + len(self._window):
            length = min(max(end - offset, self._window_bytes), self.size - offset)
            self._window, self._start = self._read_at(offset, max(0, length)), offset
        return self._window[offset - self._start : end - self._start]


def iterate_members(reader: WindowReader, shard: str) -> Iterator[Member]:
    """Yield the members of a tar in their order, with GNU's and PAX's long names.

    Args:
        reader: Reader of the tar.
        shard: Name of the tar, for messages.

    Raises:
        ValueError: If the tar is truncated, damaged, compressed or contains a sparse file.
    """
    _check_beginning(reader, shard)
    offset = 0
    shared: dict[str, str] = {}  # PAX records of all members
    own: dict[str, str] = {}  # PAX records of the next member
    while True:
        block = reader.read(offset, BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            raise _truncated(shard, reader.size, "before its end mark")
        if not any(block):
            _check_end(reader, offset, shard)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise ValueError(
                f"data.root: {shard} is damaged, because the header at offset {offset:,} is "
                "invalid; copy or write the shard again"
            ) from None
        records = shared | own
        size = int(records.get("size", header.size))
        name = records.get("path", header.name)
        has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        end = offset + BLOCK_BYTES + (size if has_content else 0)
        if end > reader.size:
            raise _truncated(
                shard, reader.size, f"inside {name}, which begins at offset {offset:,}"
            )
        is_extension = header.type in (
            *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
            *(tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE),
        )
        if is_extension:
            end = offset + BLOCK_BYTES + header.size
            content = reader.read(offset + BLOCK_BYTES, min(header.size, _MAX_EXTENSION_BYTES))
            if header.type == tarfile.GNUTYPE_LONGNAME:
                own["path"] = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type == tarfile.XGLTYPE:
                shared |= _parse_records(content, shard, offset)
            elif header.type != tarfile.GNUTYPE_LONGLINK:
                own |= _parse_records(content, shard, offset)
        else:
            is_sparse = header.type == tarfile.GNUTYPE_SPARSE
            if is_sparse or any(key.startswith("GNU.sparse") for key in records):
                raise ValueError(
                    f"data.root: {shard} stores {name} as a sparse file, which is not read; write "
                    "the shard again without tar's option --sparse"
                )
            yield Member(name, offset, offset + BLOCK_BYTES, size, header.isreg())
            own = {}
        offset = -(-end // BLOCK_BYTES) * BLOCK_BYTES


def _check_beginning(reader: WindowReader, shard: str) -> None:
    """Raise ValueError for an empty or compressed file."""
    if not reader.size:
        raise ValueError(
            f"data.root: {shard} has 0 bytes, as its writer was stopped or the disk was full; copy "
            "or write the shard again"
        )
    beginning = reader.read(0, BLOCK_BYTES)
    for signature, (name, command) in _COMPRESSIONS.items():
        if beginning.startswith(signature):
            raise compressed_error(shard, name, command)


def compressed_error(shard: str, name: str, command: str) -> ValueError:
    """Return the error for a compressed tar.

    Args:
        shard: Name of the tar.
        name: Name of the compression.
        command: Command that decompresses the tar.
    """
    return ValueError(
        f"data.root: {shard} is compressed by {name}, so its images cannot be read in any order; "
        f"decompress it once with `{command}`, which costs little space because images are "
        "compressed already"
    )


def _check_end(reader: WindowReader, offset: int, shard: str) -> None:
    """Raise ValueError if members follow the end mark, as in concatenated tars."""
    num_bytes = reader.size - offset
    if num_bytes > _MAX_PADDING_BYTES or any(reader.read(offset, num_bytes)):
        raise ValueError(
            f"data.root: {shard} continues after its end mark at offset {offset:,}, as "
            "concatenated tars do; join them with `tar --concatenate`, or keep them as separate "
            "shards"
        )


def _truncated(shard: str, offset: int, where: str) -> ValueError:
    return ValueError(
        f"data.root: {shard} is truncated, because it ends at offset {offset:,} {where}; copy or "
        "write the shard again"
    )


def _parse_records(content: bytes, shard: str, offset: int) -> dict[str, str]:
    """Return the records of a PAX header, each `LENGTH KEY=VALUE` and a line end."""
    records = {}
    while content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        try:
            record = content[len(length) + 1 : int(length)]
            content = content[int(length) :] if int(length) > 0 else b""
            key, value = record.rstrip(b"\n").split(b"=", 1)
        except ValueError:
            raise ValueError(
                f"data.root: {shard} is damaged, because the PAX header at offset {offset:,} is "
                "invalid; copy or write the shard again"
            ) from None
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return records
