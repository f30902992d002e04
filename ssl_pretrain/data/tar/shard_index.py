"""The index of a tar shard: the position and the label of each image, in one binary file.

A file has a magic line, the SHA-256 of what follows, the length of a JSON, the JSON, and one array
per column. The JSON has the size and the version of the shard, so a reader notices another shard.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.data.file_types import SkippedFiles
from ssl_pretrain.data.listing import open_atomically

_MAGIC = b"ssl_pretrain: index of a tar shard, format 2\n"
_HASH_BYTES = 32
_LENGTH_BYTES = 8
_COLUMNS = {
    "packed_keys": "<u1",
    "key_ends": "<i8",
    "offset": "<i8",
    "length": "<i8",
    "label": "<i4",
    "caption_offset": "<i8",
    "caption_length": "<i8",
}


@dataclass(frozen=True)
class Shard:
    """A tar shard, and what tells it from another one of the same name."""

    path: str  # an absolute path, or a URL
    size: int  # bytes
    version: str  # modification time in nanoseconds, or an object store's ETag


@dataclass(frozen=True)
class ShardIndex:
    """The n samples of a shard that have an image, in the order of the tar."""

    size: int  # bytes of the shard
    version: str  # see `Shard`
    packed_keys: np.ndarray  # uint8, concatenated keys in UTF-8
    key_ends: np.ndarray  # int64 (n,), end of each key in `packed_keys`
    offset: np.ndarray  # int64 (n,), position of the image in the shard
    length: np.ndarray  # int64 (n,), bytes of the image
    label: np.ndarray  # int32 (n,), index into `label_names`, or -1
    # Position and bytes of the caption, int64 (n,). A sample without a caption has the length 0.
    # Both arrays are empty if no sample has one.
    caption_offset: np.ndarray
    caption_length: np.ndarray
    label_names: tuple[str, ...] = ()  # distinct labels of the shard, as text
    skipped: tuple[SkippedFiles, ...] = ()
    writer: dict[str, Any] = field(default_factory=dict)  # facts that `shards write` needs again

    def __len__(self) -> int:
        return len(self.offset)

    def is_of(self, shard: Shard) -> bool:
        """Return True if this is the index of the shard in its present version."""
        return (self.size, self.version) == (shard.size, shard.version)


def save_index(index: ShardIndex, path: Path) -> None:
    """Write an index atomically.

    Raises:
        OSError: If the file cannot be written.
    """
    columns = {name: getattr(index, name).astype(dtype) for name, dtype in _COLUMNS.items()}
    metadata = {
        "size": index.size,
        "version": index.version,
        "label_names": index.label_names,
        "skipped": [asdict(skipped) for skipped in index.skipped],
        "writer": index.writer,
        "lengths": {name: len(column) for name, column in columns.items()},
    }
    encoded = json.dumps(metadata, sort_keys=True).encode()
    body = [len(encoded).to_bytes(_LENGTH_BYTES, "little"), encoded]
    body += [column.tobytes() for column in columns.values()]
    digest = hashlib.sha256()
    for block in body:
        digest.update(block)
    with open_atomically(path) as file:
        file.writelines([_MAGIC, digest.digest(), *body])
    path.chmod(0o644)  # a temporary file is private, but others read the same shards


def load_index(path: Path) -> ShardIndex:
    """Read an index.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged or has another format.
    """
    content = path.read_bytes()
    start = len(_MAGIC) + _HASH_BYTES
    body = memoryview(content)[start:]
    if not content.startswith(_MAGIC):
        raise ValueError("it has another format")
    if hashlib.sha256(body).digest() != content[len(_MAGIC) : start]:
        raise ValueError("it is damaged")
    position = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
    metadata = json.loads(bytes(body[_LENGTH_BYTES:position]))
    columns = {}
    for name, dtype in _COLUMNS.items():
        length = metadata["lengths"][name]
        columns[name] = np.frombuffer(body, dtype, length, position)
        position += columns[name].nbytes
    return ShardIndex(
        metadata["size"],
        metadata["version"],
        **columns,
        label_names=tuple(metadata["label_names"]),
        skipped=tuple(SkippedFiles(**skipped) for skipped in metadata["skipped"]),
        writer=metadata["writer"],
    )
