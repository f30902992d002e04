"""Read .beton files, and refuse those that are cut short, unfinished or damaged."""

import os
import stat
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
from ssl_pretrain.data.beton.shard_files import all_shards
from ssl_pretrain.data.beton.tables import Tables, read_tables

_PER_IMAGE = ("place", "length", "mode", "height", "width", "label")  # arrays of `Samples`

Stamp = tuple[int, int, int]  # inode, size and time, which reveal that a file was replaced


@dataclass(frozen=True)
class Samples:
    """The n images of one file, or of all shards of a set, by number."""

    paths: list[str]  # the files
    stamps: list[Stamp]  # one per file, when it was opened
    manifest: Manifest | None  # merged over the files; None for files of FFCV
    file: np.ndarray  # int32 (n,), index into `paths`
    place: np.ndarray  # int64 (n,), first byte in the file
    length: np.ndarray  # int64 (n,), number of bytes
    mode: np.ndarray  # uint8 (n,), `JPEG` or `RAW`
    height: np.ndarray  # int32 (n,)
    width: np.ndarray  # int32 (n,)
    label: np.ndarray  # int64 (n,)

    def __len__(self) -> int:
        return len(self.place)

    def take(self, indices: np.ndarray) -> Self:
        """Return some of the images, in this order."""
        rows = {name: getattr(self, name)[indices] for name in ("file", *_PER_IMAGE)}
        return replace(self, **rows)

    def name(self, index: int) -> str:
        """Return the file and the number of an image, for messages."""
        return f"{self.paths[self.file[index]]}, image {index}"


def read(path: Path) -> Samples:
    """Read the tables of a file, or of all shards of a set.

    Raises:
        ValueError: If a file is absent, not a .beton, unfinished, cut short or without images, or
            the shards come from different sources.
    """
    shards = [_read_file(shard) for shard in all_shards(path)]
    manifests = [shard.manifest for shard in shards]
    if len({manifest and manifest.settings_id for manifest in manifests}) > 1:
        raise ValueError(
            f"data.root: {path} and its other shards come from different sources or settings; "
            "write all of them anew"
        )
    counts = [len(shard) for shard in shards]
    if not any(counts):
        raise ValueError(f"data.root: {path} holds no image; write it again")
    return Samples(
        [shard.paths[0] for shard in shards],
        [shard.stamps[0] for shard in shards],
        merge_manifests(manifests),
        file=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        **{name: np.concatenate([getattr(shard, name) for shard in shards]) for name in _PER_IMAGE},
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
            "holds train.beton"
        )
    tables = read_tables(path)
    manifest = read_manifest(path)
    if manifest is not None:
        _check_manifest(manifest, tables)
    lengths = tables.lengths()
    tables.check(lengths)
    image = tables.samples["image"]
    return Samples(
        [str(path)],
        [_stamp(status)],
        manifest,
        file=np.zeros(len(image), np.int32),
        place=image["place"].astype(np.int64),
        length=lengths.astype(np.int64),
        mode=image["mode"].copy(),
        height=image["height"].astype(np.int32),
        width=image["width"].astype(np.int32),
        label=tables.samples["label"].copy(),
    )


def _check_manifest(manifest: Manifest, tables: Tables) -> None:
    """Raise ValueError unless the manifest describes this very file."""
    is_same_file = manifest.table_sha256 in ("", tables.sha256)
    if manifest.num_samples != len(tables.samples) or not is_same_file:
        raise ValueError(
            f"data.root: {tables.path} and {manifest_path(tables.path).name} do not belong "
            "together: a table was damaged, or a write was stopped between the two; run the same "
            "write again, or copy both again"
        )
    largest = int(tables.samples["label"].max(initial=-1))
    if largest >= len(manifest.classes):
        raise ValueError(
            f"data.root: {tables.path}: a label is {largest}, and its manifest has "
            f"{len(manifest.classes)} classes"
        )


def read_image(samples: Samples, index: int) -> bytes:
    """Return the stored bytes of one image.

    Raises:
        OSError: If the file cannot be read, was replaced, or ends before the image does.
    """
    file = samples.file[index]
    handle = os.open(samples.paths[file], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        if _stamp(os.fstat(handle)) != samples.stamps[file]:
            raise OSError("the file was replaced")
        stored = os.pread(handle, int(samples.length[index]), int(samples.place[index]))
    finally:
        os.close(handle)
    if len(stored) != samples.length[index]:
        raise OSError(
            "the file ends before the image does; "
            f"it was {samples.length[index]} bytes long when opened"
        )
    return stored


def check_present(samples: Samples) -> None:
    """Raise FileNotFoundError if a file is missing, and ValueError if it was replaced."""
    for path, stamp in zip(samples.paths, samples.stamps):
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
