"""STL-10 in the binary files of its authors. Its unlabeled images are for training, too.

The values of an image are three planes, and each plane is stored column by column.
"""

import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.formats.array_choice import NO_LABELS
from ssl_pretrain.data.formats.array_source import ArraySource
from ssl_pretrain.data.formats.named_splits import choose_split
from ssl_pretrain.data.formats.numpy_files import read_npz
from ssl_pretrain.data.formats.published_archives import read_members, stamp_file
from ssl_pretrain.data.formats.stored_array import StoredArray, write_npy_header
from ssl_pretrain.data.formats.unpacking import copy_exactly, unpack_once
from ssl_pretrain.data.pixels import PixelFormat
from ssl_pretrain.data.python_source import index_labels

_SHAPE = (3, 96, 96)
_IMAGE_BYTES = 3 * 96 * 96
_CLASSES = (
    *("airplane", "bird", "car", "cat", "deer"),
    *("dog", "horse", "monkey", "ship", "truck"),
)


def open_stl10(path: Path, config: DataConfig, cache_dir: Path, split: str) -> ArraySource:
    """Open a split of the archive of STL-10, or of its unpacked folder.

    Raises:
        NoSuchSplit: If there are no test images.
        ValueError: If a file is absent or truncated.
    """
    notes = []
    if path.is_dir():
        arrays = {
            member.removesuffix(".bin"): _stored(path / member, num_bytes)
            for member, _, num_bytes in read_members(path, "stl10")
            if member.endswith(".bin")
        }
    else:
        write = partial(_write_npz, path)
        copy = unpack_once(stamp_file(path, "stl10"), "stl10", ".npz", cache_dir, write)
        arrays = {
            name: replace(array, name=f"{path}[{name}.bin]")
            for name, array in read_npz(copy).items()
        }
        notes = [f"the images of {path} are read from their unpacked copy {copy}"]
    available = {name: name for name in ("train", "test") if f"{name}_X" in arrays}
    chosen = choose_split(available, split, config, str(path))
    images = [arrays[f"{chosen}_X"]]
    labels = np.full(images[0].shape[0], -1)
    if f"{chosen}_y" in arrays and config.label_column != NO_LABELS:
        labels = arrays[f"{chosen}_y"].load().astype(np.int64) - 1
        if len(labels) != images[0].shape[0]:
            raise ValueError(
                f"data.root: {path} has {len(labels):,} labels for {images[0].shape[0]:,} images "
                f"in {chosen}_X.bin; copy it again"
            )
    if chosen == "train" and "unlabeled_X" in arrays:
        images.append(arrays["unlabeled_X"])
        labels = np.concatenate([labels, np.full(images[1].shape[0], -1)])
    has_labels = bool((labels >= 0).any())
    indices, classes = index_labels(
        str(path), labels, len(labels), _CLASSES if has_labels else None
    )
    source = ArraySource(
        [array.unpacked(cache_dir) for array in images],
        indices,
        classes,
        PixelFormat(config.channels),
        axes="CWH",
    )
    source.notes = notes
    return source


def _stored(path: Path, num_bytes: int) -> StoredArray:
    """Describe the images or labels of a file, which has no header.

    Raises:
        ValueError: If the file ends inside an image.
    """
    shape, dtype = _shape(path.name, num_bytes, str(path)), np.dtype(np.uint8)
    return StoredArray(str(path), str(path), shape, dtype)


def _shape(member: str, num_bytes: int, path: str) -> tuple[int, ...]:
    if not member.endswith("_X.bin"):
        return (num_bytes,)
    if num_bytes % _IMAGE_BYTES:
        raise ValueError(
            f"data.root: {path} has {num_bytes:,} bytes, not a multiple of the {_IMAGE_BYTES:,} of "
            "an image; it is truncated, so copy it again"
        )
    return (num_bytes // _IMAGE_BYTES, *_SHAPE)


def _write_npz(path: Path, file: IO[bytes]) -> None:
    """Write the files of the archive as an uncompressed .npz, one block at a time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as npz:
        for member, stream, num_bytes in read_members(path, "stl10"):
            if not member.endswith(".bin"):
                continue
            name = member.removesuffix(".bin")
            with npz.open(f"{name}.npy", "w", force_zip64=True) as target:
                shape = _shape(member, num_bytes, f"{path}[{member}]")
                write_npy_header(target, shape, np.dtype(np.uint8))
                copy_exactly(stream, target, num_bytes, f"{path}[{member}]")
