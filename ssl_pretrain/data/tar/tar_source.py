"""Source of the images in tar shards, on this machine or in an object store."""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import numpy as np

from ssl_pretrain.data.image_source import EncodedSource
from ssl_pretrain.data.images import (
    MAX_BYTES,
    ImageHeader,
    UnreadableImage,
    decode,
    read_header,
)
from ssl_pretrain.data.pixels import RGB, PixelFormat
from ssl_pretrain.data.tar import remote_store
from ssl_pretrain.data.tar.remote_errors import printable_url
from ssl_pretrain.data.tar.remote_store import is_remote
from ssl_pretrain.data.tar.sample_texts import parse_captions
from ssl_pretrain.data.tar.shard_cache import ShardCache
from ssl_pretrain.data.tar.shard_index import Shard, ShardIndex
from ssl_pretrain.system.platform_support import BINARY, read_at

_INDEX_COLUMNS = ("offset", "length")
_CAPTION_COLUMNS = ("caption_offset", "caption_length")


class TarShards(EncodedSource):
    """Images in tar shards, read at random by the positions in their indexes.

    Args:
        full_path: Path or pattern of the shards, for messages.
        shards: The shards.
        indexes: Index of each shard.
        labels: Label of each image, int64 (n,).
        classes: Names of the classes.
        cache: Local copies of remote shards.
        pixel_format: Number of channels and range of the images.
    """

    supports_range = True

    def __init__(
        self,
        full_path: str,
        shards: Sequence[Shard],
        indexes: Sequence[ShardIndex],
        labels: np.ndarray,
        classes: list[str],
        cache: ShardCache,
        pixel_format: PixelFormat = RGB,
    ):
        super().__init__(full_path, labels, classes, pixel_format)
        self.shards, self.cache = list(shards), cache
        counts = np.array([len(index) for index in indexes])
        self.shard_number = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self.offset, self.length = (
            np.concatenate([getattr(index, name) for index in indexes]) for name in _INDEX_COLUMNS
        )
        self.caption_offset, self.caption_length = _join_captions(indexes)
        self.num_texts = int(len(self.caption_offset) > 0)
        self.packed_keys = np.concatenate([index.packed_keys for index in indexes])
        key_bytes = [index.key_ends[-1] if len(index) else 0 for index in indexes]
        starts = np.concatenate([[0], np.cumsum(key_bytes, dtype=np.int64)[:-1]])
        self.key_ends = np.concatenate([index.key_ends for index in indexes])
        self.key_ends = self.key_ends + np.repeat(starts, counts)

    def read(self, index: int) -> np.ndarray:
        """Return the pixels of one image, uint8 (height, width, num_channels).

        Raises:
            UnreadableImage: If the image is damaged. The message names the shard and the sample.
            UnreachableSource: If the shard has changed, or an object store cannot be read.
        """
        try:
            return decode(self.read_bytes(index), self.name(index), self.pixel_format)
        except UnreadableImage:
            shard = self._shard(index)
            if is_remote(shard.path):
                remote_store.check_unchanged(shard)
            raise

    def header(self, index: int) -> ImageHeader:
        """Return the format, size and range of values of one image."""
        return read_header(self.read_bytes(index), self.name(index), self.num_channels)

    def key(self, index: int) -> str:
        """Return the key of a sample, which is the path of its members up to the first dot."""
        start = int(self.key_ends[index - 1]) if index else 0
        key = self.packed_keys[start : self.key_ends[index]].tobytes()
        return key.decode("utf-8", "surrogateescape")

    def name(self, index: int) -> str:
        """Return the shard and the key of a sample, for messages."""
        return f"{printable_url(self._shard(index).path)}, sample {self.key(index)}"

    def texts(self, index: int) -> list[list[str]]:
        """Return the captions of one image in a list, or nothing if the images have none.

        Raises:
            UnreadableImage: If the caption cannot be read. The message names the sample.
            UnreachableSource: If the shard has changed, or an object store cannot be read.
        """
        if not self.num_texts:
            return []
        length = int(self.caption_length[index])
        if not length:
            return [[]]
        try:
            content = self._read_member(index, int(self.caption_offset[index]), length)
        except OSError as error:
            raise UnreadableImage(f"{self.name(index)}: {error.strerror or error}") from error
        return [parse_captions(content.decode("utf-8", "replace"))]

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the images at `indices`, in that order."""
        subset = super().take(indices)
        caption_columns = _CAPTION_COLUMNS if len(self.caption_offset) else ()
        for name in ("shard_number", *_INDEX_COLUMNS, *caption_columns):
            setattr(subset, name, getattr(self, name)[indices])
        keys = [self.key(index).encode("utf-8", "surrogateescape") for index in indices.tolist()]
        subset.packed_keys = np.frombuffer(b"".join(keys), np.uint8)
        subset.key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        return subset

    def prefetch(self, first: int, count: int) -> None:
        """Ask for consecutive images ahead, without waiting.

        The system reads them into memory. A remote shard is copied to the cache. If the images
        continue in the next shard, only those in the first one are read.
        """
        shard = self._shard(first)
        if is_remote(shard.path):
            self.cache.find_copy(shard)
            return
        if not hasattr(os, "posix_fadvise"):  # macOS has no such call
            return
        numbers = self.shard_number[first : first + count]
        last = first + int(np.argmax(numbers != numbers[0])) - 1
        if numbers[-1] == numbers[0]:
            last = first + len(numbers) - 1
        start, end = int(self.offset[first]), int(self.offset[last] + self.length[last])
        with suppress(OSError), open(shard.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def check_present(self) -> None:
        """Raise FileNotFoundError if a local shard is missing, and ValueError if it was replaced.

        A remote shard is compared with its index when an image of it is unreadable.
        """
        for shard in self.shards:
            if is_remote(shard.path):
                return
            try:
                status = os.stat(shard.path)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"data.root: {shard.path} no longer exists, but existed when the run began"
                ) from None
            if not _is_of(status, shard):
                raise ValueError(
                    f"data.root: {shard.path} was replaced or changed while it was being read; "
                    "start the run again"
                )

    def _shard(self, index: int) -> Shard:
        return self.shards[self.shard_number[index]]

    def _stored_bytes(self, index: int) -> bytes:
        return self._read_member(index, int(self.offset[index]), int(self.length[index]))

    def _read_member(self, index: int, offset: int, length: int) -> bytes:
        """Return the bytes of a member of the sample's shard."""
        shard = self._shard(index)
        if length > MAX_BYTES:
            raise OSError(errno.EFBIG, f"{length:,} bytes are too many for an image")
        if not is_remote(shard.path):
            return _read_local(shard.path, shard, offset, length)
        copy = self.cache.find_copy(shard)
        if copy is not None:
            try:
                return _read_local(str(copy), None, offset, length)
            except OSError:  # another run needed the space
                self.cache.forget_copy(shard)
        return remote_store.read_range(shard, offset, length)

    def _identity(self) -> bytes:
        # Neither the location nor the offsets, so that a run can move to copies of the shards.
        columns = (self.packed_keys, self.key_ends, self.length)
        return b"tar" + b"".join(column.tobytes() for column in columns)


def _join_captions(indexes: Sequence[ShardIndex]) -> list[np.ndarray]:
    """Return the position and the bytes of each caption, or empty arrays if there are none."""
    if not any(len(index.caption_offset) for index in indexes):
        return [np.zeros(0, np.int64)] * 2
    return [
        np.concatenate(
            [
                getattr(index, name)
                if len(getattr(index, name))
                else np.zeros(len(index), np.int64)
                for index in indexes
            ]
        )
        for name in _CAPTION_COLUMNS
    ]


def _is_of(status: os.stat_result, shard: Shard) -> bool:
    return (status.st_size, str(status.st_mtime_ns)) == (shard.size, shard.version)


def _read_local(path: str, shard: Shard | None, offset: int, length: int) -> bytes:
    """Return a range of a file's bytes. Raise OSError if it is not the indexed shard."""
    descriptor = os.open(path, os.O_RDONLY | BINARY)
    try:
        if shard is not None and not _is_of(os.fstat(descriptor), shard):
            raise OSError("the shard was replaced or changed")
        content = read_at(descriptor, length, offset)
    finally:
        os.close(descriptor)
    if len(content) != length:
        raise OSError("the shard was truncated after it was indexed, so the image is incomplete")
    return content
