"""Read .beton files, and refuse those that are truncated, unfinished or damaged.

A split is one file, or a set of shards that are read as one.
"""

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from ssl_pretrain.data.beton.beton_manifest import (
    Manifest,
    manifest_path,
    merge_manifests,
    read_manifest,
)
from ssl_pretrain.data.beton.tables import Tables, read_tables
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_search import split_of
from ssl_pretrain.system.platform_support import read_at

# Columns of `Samples` that each file contains. Only `file_index` depends on the other shards.
_COLUMNS = ("offset", "length", "mode", "height", "width", "label")
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<num_shards>\d{5})\.beton")
_MAX_NAMES = 3  # number of missing shards that an error lists

Stamp = tuple[int, int, int]  # inode, size and modification time, which change with the file


@dataclass(frozen=True)
class Samples:
    """Table of the n images in a file, or in all shards of a set."""

    paths: list[str]  # one per file
    stamps: list[Stamp]  # one per file, taken when the file was opened
    manifest: Manifest | None  # merged over the files; None if FFCV's own writer wrote them
    file_index: np.ndarray  # int32 (n,), index into `paths`
    offset: np.ndarray  # int64 (n,), position of the first byte in the file
    length: np.ndarray  # int64 (n,), number of bytes
    mode: np.ndarray  # uint8 (n,), `JPEG` or `RAW`
    height: np.ndarray  # int32 (n,)
    width: np.ndarray  # int32 (n,)
    label: np.ndarray  # int64 (n,)

    def __len__(self) -> int:
        return len(self.offset)

    def take(self, indices: np.ndarray) -> Self:
        """Return the table of the images at `indices`, in that order."""
        columns = {name: getattr(self, name)[indices] for name in ("file_index", *_COLUMNS)}
        return replace(self, **columns)

    def name(self, index: int) -> str:
        """Return the file and the number of an image, for messages."""
        return f"{self.paths[self.file_index[index]]}, image {index}"

    def read_bytes(self, index: int) -> bytes:
        """Return the stored bytes of one image.

        Raises:
            OSError: If the file cannot be read, was replaced, or ends before the image does.
        """
        file_index, length = self.file_index[index], int(self.length[index])
        with open(self.paths[file_index], "rb", buffering=0) as file:
            if _stamp(os.fstat(file.fileno())) != self.stamps[file_index]:
                raise OSError("the file was replaced")
            content = read_at(file.fileno(), length, int(self.offset[index]))
        if len(content) != length:
            raise OSError("the file was truncated after it was opened, so the image is incomplete")
        return content

    def prefetch(self, first: int, count: int) -> None:
        """Ask the system to read consecutive images into memory, without waiting for it.

        If they continue in the next shard, only the images in the first shard are read.
        """
        if not hasattr(os, "posix_fadvise"):  # macOS has no such call
            return
        file_index, last = self.file_index[first], first + count - 1
        while self.file_index[last] != file_index:
            last -= 1
        start, end = int(self.offset[first]), int(self.offset[last] + self.length[last])
        with suppress(OSError), open(self.paths[file_index], "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def check_present(self) -> None:
        """Raise FileNotFoundError if a file is missing, and ValueError if it was replaced."""
        for path, stamp in zip(self.paths, self.stamps):
            try:
                status = os.stat(path)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"data.root: {path} no longer exists, but existed when the run began"
                ) from None
            if _stamp(status) != stamp:
                raise ValueError(
                    f"data.root: {path} was replaced or changed while it was being read; "
                    "start the run again"
                )


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


def read(path: Path) -> Samples:
    """Read the tables of a file, or of all shards of the set that it belongs to.

    Raises:
        ValueError: If a file is missing, not a .beton, unfinished, truncated or without images, or
            the shards come from different sources.
    """
    files = [_read_file(shard) for shard in _all_shards(path)]
    manifests = [file.manifest for file in files]
    if len({manifest and manifest.shard_set_id for manifest in manifests}) > 1:
        raise ValueError(
            f"data.root: {path} and its other shards come from different sources or settings; "
            "write all of them again"
        )
    if not any(map(len, files)):
        raise ValueError(f"data.root: {path} contains no image; write it again")
    return Samples(
        [file.paths[0] for file in files],
        [file.stamps[0] for file in files],
        merge_manifests(manifests),
        file_index=np.repeat(np.arange(len(files), dtype=np.int32), list(map(len, files))),
        **{name: np.concatenate([getattr(file, name) for file in files]) for name in _COLUMNS},
    )


def _read_file(path: Path) -> Samples:
    """Read the tables of one file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ValueError(
            f"data.root: {path} does not exist; write it: "
            "python -m ssl_pretrain.data.beton write --help"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"data.root: {path} is not a regular file; give the .beton itself, or the folder that "
            "contains train.beton"
        )
    tables, manifest = read_tables(path), read_manifest(path)
    if manifest is not None:
        _check_manifest(manifest, tables)
    lengths = tables.lengths()
    tables.check(lengths)
    image = tables.samples["image"]
    return Samples(
        [str(path)],
        [_stamp(status)],
        manifest,
        file_index=np.zeros(len(image), np.int32),
        offset=image["offset"].astype(np.int64),
        length=lengths.astype(np.int64),
        mode=image["mode"].copy(),
        height=image["height"].astype(np.int32),
        width=image["width"].astype(np.int32),
        label=tables.samples["label"].copy(),
    )


def _check_manifest(manifest: Manifest, tables: Tables) -> None:
    """Raise ValueError unless the manifest describes this file."""
    is_same_file = manifest.table_sha256 in ("", tables.sha256)
    if manifest.num_samples != len(tables.samples) or not is_same_file:
        raise ValueError(
            f"data.root: {tables.path} and {manifest_path(tables.path).name} do not belong "
            "together: a table was damaged, or writing was stopped between the two files; write "
            "them again, or copy both again"
        )
    largest = int(tables.samples["label"].max(initial=-1))
    if largest >= len(manifest.classes):
        raise ValueError(
            f"data.root: {tables.path} contains the label {largest}, but its manifest has only "
            f"{len(manifest.classes)} classes; copy both again, or write them again"
        )


def shard_name(stem: str, number: int, num_shards: int) -> str:
    """Return the file name of one shard, such as train-00000-of-00016.beton."""
    return f"{stem}-{number:05d}-of-{num_shards:05d}.beton"


def _all_shards(path: Path) -> list[Path]:
    """Return the file itself, or every shard of the set that it belongs to."""
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    num_shards = int(match["num_shards"])
    names = [shard_name(match["stem"], number, num_shards) for number in range(num_shards)]
    paths = [path.with_name(name) for name in names]
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing:
        raise ValueError(
            f"data.root: the set of {path} lacks {len(missing)} of its {num_shards} shards: "
            f"{abbreviate(missing, _MAX_NAMES)}; write them, or wait until they are written"
        )
    return paths


def find_beton(folder: Path, split: str) -> Path | None:
    """Return the .beton of a split in a folder, or the first of its shards, if there is one.

    The file is named after the split, in any spelling that `split_of` knows.
    """
    stems = sorted({path.name.split(".")[0].split("-0")[0] for path in folder.glob("*.beton")})
    split_name = split_of(split)
    synonyms = [stem for stem in stems if split_name and split_of(stem) == split_name]
    for stem in (split, *synonyms):
        if (folder / f"{stem}.beton").is_file():
            return folder / f"{stem}.beton"
        if shards := sorted(folder.glob(f"{stem}-?????-of-?????.beton")):
            return shards[0]
    return None
