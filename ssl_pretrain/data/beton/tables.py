"""The tables of FFCV's file format, version 2.

header        version, number of fields, page size, number of samples, offset of the allocations
fields        one descriptor per field: `image` (JPEG or raw RGB) and `label`
samples       one entry per image: mode, width, height, offset of its bytes, label
pages         the bytes of the images, each within one page
allocations   one entry per image: sample, offset, length

Offsets are in bytes from the start of the file.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssl_pretrain.data.images import MAX_PIXELS

VERSION = 2
JPEG, RAW = 0, 1  # modes in which an image is stored
HEADER_DTYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("allocations_offset", "<u8"),
    ],
    align=True,
)
FIELD_DTYPE = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
IMAGE_DTYPE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
SAMPLE_DTYPE = np.dtype([("image", IMAGE_DTYPE), ("label", "<i8")], align=True)
ALLOCATION_DTYPE = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("length", "<u8")])
FIELD_TYPES = (("image", 2), ("label", 1))  # names and FFCV's type numbers
SAMPLES_OFFSET = HEADER_DTYPE.itemsize + len(FIELD_TYPES) * FIELD_DTYPE.itemsize
_MAX_CLASSES = 1_000_000  # limits memory, because every class gets a name


@dataclass(frozen=True)
class Tables:
    """Everything in a file except the images."""

    path: Path
    header: np.ndarray
    fields: np.ndarray
    samples: np.ndarray
    allocations: np.ndarray

    @property
    def sha256(self) -> str:
        """Hash of all tables."""
        digest = hashlib.sha256()
        for table in (self.header, self.fields, self.samples, self.allocations):
            digest.update(np.ascontiguousarray(table).tobytes())
        return digest.hexdigest()

    def lengths(self) -> np.ndarray:
        """Return the number of bytes of each image, uint64 (n,).

        Raises:
            ValueError: If an image has no allocation.
        """
        offsets = self.samples["image"]["offset"]
        allocations = self.allocations[np.argsort(self.allocations["offset"], kind="stable")]
        rows = np.searchsorted(allocations["offset"], offsets)
        rows = np.minimum(rows, max(len(allocations) - 1, 0))
        self._raise_if_any(
            allocations["offset"][rows] != offsets,
            lambda image: f"the allocation table has no entry for image {image}",
        )
        return allocations["length"][rows]

    def check(self, lengths: np.ndarray) -> None:
        """Raise ValueError if an entry would make a decoder leave the file or overrun a buffer.

        The sum of a 64-bit offset and a length can overflow, so the length is compared with the
        number of bytes after the offset.
        """
        image = self.samples["image"]
        end = np.uint64(self.header["allocations_offset"])
        num_pixels = image["height"].astype(np.int64) * image["width"]
        is_wrong = (image["offset"] < SAMPLES_OFFSET) | (image["offset"] > end)
        is_wrong |= lengths > end - np.minimum(image["offset"], end)
        is_wrong |= (num_pixels == 0) | (image["mode"] > RAW) | (lengths == 0)
        is_wrong |= (image["mode"] == RAW) & (lengths != (3 * num_pixels).astype(lengths.dtype))
        self._raise_if_any(
            is_wrong, lambda index: f"the entry of image {index} points outside the file"
        )
        self._raise_if_any(
            num_pixels > MAX_PIXELS,
            lambda index: (
                f"the entry of image {index} says {int(image['width'][index]):,} x "
                f"{int(image['height'][index]):,} pixels, more than the limit of {MAX_PIXELS:,}"
            ),
        )
        labels = self.samples["label"]
        self._raise_if_any(
            (labels < -1) | (labels >= _MAX_CLASSES),
            lambda index: (
                f"the label of image {index} is {int(labels[index])}, but labels are -1 for none "
                f"or a class below {_MAX_CLASSES:,}"
            ),
        )

    def _raise_if_any(self, is_wrong: np.ndarray, describe: Callable[[int], str]) -> None:
        """Raise ValueError, and describe the first wrong image, if there is one."""
        if is_wrong.any():
            problem = describe(int(np.flatnonzero(is_wrong)[0]))
            raise ValueError(
                f"data.root: {self.path}: {problem}; the file is damaged; copy or write it again"
            )


def read_tables(path: Path) -> Tables:
    """Read the tables of a finished file.

    Raises:
        ValueError: If the file is truncated, unfinished, or not a .beton file of images and labels.
    """
    size = path.stat().st_size
    truncated_message = f"data.root: {path} is truncated to {size:,} bytes; copy or write it again"
    if not size:
        raise ValueError(
            f"data.root: {path} is empty, as its writer was stopped or the disk was full; "
            "write it again"
        )
    if size < SAMPLES_OFFSET:
        raise ValueError(truncated_message)
    header = np.fromfile(path, HEADER_DTYPE, 1)[0]
    if header["version"] != VERSION or not 1 <= header["num_fields"] <= 100:
        raise ValueError(
            f"data.root: {path} is not a .beton file of format {VERSION}; write it with "
            "python -m ssl_pretrain.data.beton write"
        )
    if header["allocations_offset"] == 0:
        raise ValueError(
            f"data.root: {path} is unfinished, as its writer was stopped; run the same write "
            "command again to finish it"
        )
    fields = np.fromfile(path, FIELD_DTYPE, int(header["num_fields"]), offset=HEADER_DTYPE.itemsize)
    field_types = [
        (bytes(field["name"]).split(b"\0")[0].decode("ascii", "replace"), int(field["type"]))
        for field in fields
    ]
    if field_types != list(FIELD_TYPES):
        raise ValueError(
            f"data.root: {path} has the fields {field_types} instead of image and label; write it "
            "with python -m ssl_pretrain.data.beton write"
        )
    n, offset = int(header["num_samples"]), int(header["allocations_offset"])
    samples_end = SAMPLES_OFFSET + n * SAMPLE_DTYPE.itemsize
    allocations_end = offset + n * ALLOCATION_DTYPE.itemsize
    if max(samples_end, allocations_end) > size:
        raise ValueError(truncated_message)
    samples = np.fromfile(path, SAMPLE_DTYPE, n, offset=SAMPLES_OFFSET)
    allocations = np.fromfile(path, ALLOCATION_DTYPE, n, offset=offset)
    return Tables(path, header, fields, samples, allocations)


def first_page_offset(num_images: int, page_size: int) -> int:
    """Return the offset of the first page, which comes after the entries of the images."""
    return -(-(SAMPLES_OFFSET + num_images * SAMPLE_DTYPE.itemsize) // page_size) * page_size


def write_tables(file: BinaryIO, samples: np.ndarray, lengths: np.ndarray, page_size: int) -> None:
    """Complete a .beton file by adding the tables to its images."""
    offsets = samples["image"]["offset"]
    end = int(offsets[-1] + lengths[-1])
    columns = [np.arange(len(samples)), offsets, lengths]
    allocations = np.rec.fromarrays(columns, dtype=ALLOCATION_DTYPE)
    fields = np.zeros(len(FIELD_TYPES), FIELD_DTYPE)
    for field, (name, kind) in zip(fields, FIELD_TYPES):
        field["type"], field["name"][: len(name)] = kind, np.frombuffer(name.encode(), np.uint8)
    header = np.array([(VERSION, len(FIELD_TYPES), page_size, len(samples), end)], HEADER_DTYPE)
    file.truncate(end)
    body = [(end, allocations), (HEADER_DTYPE.itemsize, fields), (SAMPLES_OFFSET, samples)]
    # The header is written last, so a file is recognized as unfinished after a crash.
    for tables in (body, [(0, header)]):
        for offset, table in tables:
            file.seek(offset)
            file.write(table.tobytes())
        file.flush()
        os.fsync(file.fileno())
