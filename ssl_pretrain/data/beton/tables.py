"""The tables of FFCV's file format, version 2.

header        version, number of fields, page size, number of samples, place of the allocations
fields        one descriptor each; ours are `image` (JPEG or raw RGB) and `label`
samples       one entry per image: mode, width, height, place of its bytes, label
pages         the bytes of the images, none of them across the edge of a page
allocations   one entry per image: sample, place, length
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssl_pretrain.data.images import MAX_PIXELS

VERSION = 2
JPEG, RAW = 0, 1  # modes
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("place", "<u8"), ("length", "<u8")])
FIELDS = (("image", 2), ("label", 1))  # name, and FFCV's number of the type
SAMPLES_BEGIN = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
_MAX_CLASSES = 1_000_000


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
        order = np.argsort(self.allocations["place"], kind="stable")
        places, lengths = self.allocations["place"][order], self.allocations["length"][order]
        rows = np.searchsorted(places, self.samples["image"]["place"])
        rows = np.minimum(rows, max(len(places) - 1, 0))
        unknown = places[rows] != self.samples["image"]["place"]
        if unknown.any():
            raise ValueError(
                f"data.root: {self.path}: the allocation table has no entry for image "
                f"{_first(unknown)}; the file is damaged"
            )
        return lengths[rows]

    def check(self, lengths: np.ndarray) -> None:
        """Raise ValueError if an entry could send a decoder outside the file or its buffers.

        Sums of 64-bit places and lengths can wrap. Each is compared with what the other leaves.
        """
        image = self.samples["image"]
        end = np.uint64(self.header["table"])
        pixels = image["height"].astype(np.int64) * image["width"]
        wrong = (image["place"] < SAMPLES_BEGIN) | (image["place"] > end)
        wrong |= lengths > end - np.minimum(image["place"], end)
        wrong |= (pixels == 0) | (image["mode"] > RAW) | (lengths == 0)
        wrong |= (image["mode"] == RAW) & (lengths != (3 * pixels).astype(lengths.dtype))
        if wrong.any():
            raise ValueError(
                f"data.root: {self.path}: the entry of image {_first(wrong)} points outside the "
                "file; it is damaged"
            )
        large = pixels > MAX_PIXELS
        if large.any():
            index = _first(large)
            width, height = int(image["width"][index]), int(image["height"][index])
            raise ValueError(
                f"data.root: {self.path}: the entry of image {index} says {width:,} x {height:,} "
                f"pixels, more than the {MAX_PIXELS:,} that are decoded; it is damaged"
            )
        labels = self.samples["label"]
        no_class = (labels < -1) | (labels >= _MAX_CLASSES)  # each class gets a name in memory
        if no_class.any():
            index = _first(no_class)
            raise ValueError(
                f"data.root: {self.path}: the label of image {index} is {int(labels[index])}, and "
                f"labels are -1 for none or a class below {_MAX_CLASSES:,}; the file is damaged"
            )


def _first(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask)[0])


def read_tables(path: Path) -> Tables:
    """Read the tables of a finished file.

    Raises:
        ValueError: If the file is cut short, unfinished, or not a .beton with our fields.
    """
    size = path.stat().st_size
    truncated = f"data.root: {path} is cut short ({size:,} bytes); copy or write it again"
    if not size:
        raise ValueError(f"data.root: {path} is empty; it was never written, or the disk was full")
    if size < SAMPLES_BEGIN:
        raise ValueError(truncated)
    header = np.fromfile(path, HEADER, 1)[0]
    if header["version"] != VERSION or not 1 <= header["num_fields"] <= 100:
        raise ValueError(f"data.root: {path} is not a .beton of format {VERSION}")
    if header["table"] == 0:
        raise ValueError(
            f"data.root: {path} was never finished: its writer was stopped; run the same write "
            "again to finish it"
        )
    fields = np.fromfile(path, FIELD, int(header["num_fields"]), offset=HEADER.itemsize)
    types = [
        (bytes(field["name"]).split(b"\0")[0].decode("ascii", "replace"), int(field["type"]))
        for field in fields
    ]
    if types != list(FIELDS):
        raise ValueError(
            f"data.root: {path} has the fields {types}, and not image and label; write it with "
            "ssl_pretrain.data.beton"
        )
    n, table = int(header["num_samples"]), int(header["table"])
    if SAMPLES_BEGIN + n * SAMPLE.itemsize > size or table + n * ALLOCATION.itemsize > size:
        raise ValueError(truncated)
    samples = np.fromfile(path, SAMPLE, n, offset=SAMPLES_BEGIN)
    return Tables(path, header, fields, samples, np.fromfile(path, ALLOCATION, n, offset=table))


def pages_begin(num_images: int, page_size: int) -> int:
    """Return the place of the first page, behind the entries of the images."""
    return -(-(SAMPLES_BEGIN + num_images * SAMPLE.itemsize) // page_size) * page_size


def write_tables(data: BinaryIO, samples: np.ndarray, lengths: np.ndarray, page_size: int) -> None:
    """Make a .beton of a file that has the images.

    The header is written last, so that a file cut short by a crash is recognized as unfinished.
    """
    places = samples["image"]["place"]
    end = int(places[-1] + lengths[-1])
    allocations = np.zeros(len(samples), ALLOCATION)
    allocations["sample"] = np.arange(len(samples))
    allocations["place"] = places
    allocations["length"] = lengths
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, kind) in zip(fields, FIELDS):
        field["type"], field["name"][: len(name)] = kind, np.frombuffer(name.encode(), np.uint8)
    header = np.array([(VERSION, len(FIELDS), page_size, len(samples), end)], HEADER)
    data.truncate(end)
    for place, table in ((end, allocations), (HEADER.itemsize, fields), (SAMPLES_BEGIN, samples)):
        data.seek(place)
        data.write(table.tobytes())
    data.flush()
    os.fsync(data.fileno())
    data.seek(0)
    data.write(header.tobytes())
    data.flush()
    os.fsync(data.fileno())
