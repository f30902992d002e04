"""Read FFCV's file format, and refuse files that are cut short, unfinished or damaged.

    header      version, number of fields, page size, number of samples, where the allocation table is
    fields      one descriptor each; ours are `image` (JPEG or raw RGB) and `label`
    metadata    of each sample: mode, width, height, place of the image, label
    pages       the images' bytes, none of them across the edge of a page
    table       of each image: sample, place, length

Beside each file lies its manifest, `train.beton.json`: class names, counts, and the fingerprint of the source.
"""

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

VERSION = 2
JPEG, RAW = 0, 1
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
FIELDS = (("image", 2), ("label", 1))  # name, FFCV's number of the type
DATA_FIELDS_END = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
_ROWS = ("file", "place", "length", "mode", "height", "width", "label")  # of `Samples`
MAX_PIXELS = 178_956_970  # of one image, as in `images`: more is a decompression bomb
_MAX_CLASSES = 1_000_000
_COUNTS = (
    "num_samples",
    "kept",
    "encoded",
    "raw",
    "max_side",
    "quality",
    "first",
    "page_size",
    "crc32",
)
_TEXTS = ("written", "of_source", "fingerprint", "source")
_LISTS = ("bad", "classes")
_HASHES = ("table_sha256", "manifest_sha256")  # absent from the manifests of earlier versions
_SHARD = re.compile(r"(?P<part>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.beton")


@dataclass(frozen=True)
class Samples:
    """All images of one file, or of the shards that make one, by number; each array has n rows.

    paths: the files. stamps: of each file when it was opened, by which a replaced one is noticed. file: which of them. place, length:
    where in it. mode: JPEG or RAW. manifest: of the whole.
    """

    paths: list[str]
    stamps: list[tuple[int, int, int]]
    file: np.ndarray  # int32
    place: np.ndarray  # int64
    length: np.ndarray  # int64
    mode: np.ndarray  # uint8
    height: np.ndarray  # int32
    width: np.ndarray  # int32
    label: np.ndarray  # int64
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.place)

    def take(self, indices: np.ndarray) -> "Samples":
        return replace(self, **{name: getattr(self, name)[indices] for name in _ROWS})

    def name(self, index: int) -> str:
        """For messages."""
        return f"{self.paths[self.file[index]]}, image {index}"


def shards(path: Path) -> list[Path]:
    """The file itself, or every shard of the set that it names (train-00000-of-00016.beton stands for all 16).

    Raises:
        ValueError: shards are missing, and which.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    paths = [path.with_name(shard_name(match["part"], number, count)) for number in range(count)]
    missing = [found.name for found in paths if not found.exists()]
    if missing:
        raise ValueError(
            f"data.root: {len(missing)} of {count} shards are missing beside {path}: {_some(missing)}; write them, or wait"
        )
    return paths


def shard_name(part: str, number: int, count: int) -> str:
    return f"{part}-{number:05d}-of-{count:05d}.beton"


def find(folder: Path, part: str) -> Path | None:
    """`part`.beton of a folder, or the first of its shards; None if there is neither."""
    if (folder / f"{part}.beton").is_file():
        return folder / f"{part}.beton"
    return next(iter(sorted(folder.glob(f"{part}-?????-of-?????.beton"))), None)


def read(path: Path) -> Samples:
    """Read the tables of a file, or of all shards of a set.

    Raises:
        ValueError: absent, not a .beton, never finished, cut short, without images, or shards of different sources.
    """
    parts = [_read_one(found) for found in shards(path)]
    identities = {part.manifest.get("of_source") for part in parts}
    if len(identities) > 1:
        raise ValueError(
            f"data.root: {path} and its other shards come from different sources or settings; write all of them anew"
        )
    counts = [len(part) for part in parts]
    if not any(counts):
        raise ValueError(f"data.root: {path} holds no image; write it again")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ROWS[1:]}
    manifest = dict(parts[0].manifest)
    if len(parts) > 1:
        manifest["fingerprint"] = "+".join(str(part.manifest.get("fingerprint")) for part in parts)
        manifest |= {
            key: sum(part.manifest.get(key, 0) for part in parts)
            for key in ("kept", "encoded", "raw", "num_samples")
        }
        manifest["bad"] = [line for part in parts for line in part.manifest.get("bad", [])]
        if not manifest["bad"]:
            manifest["fingerprint"] = manifest.get("source")
    paths, stamps = [part.paths[0] for part in parts], [part.stamps[0] for part in parts]
    return Samples(
        paths,
        stamps,
        file=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
        manifest=manifest,
        **joined,
    )


def _read_one(path: Path) -> Samples:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ValueError(
            f"data.root: {path} does not exist; write it: python -m ssl_pretrain.data.beton write --help"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"data.root: {path} is not a regular file; give the .beton itself, or the folder that holds train.beton"
        )
    size = status.st_size
    header, fields, samples, allocations = _tables(path, size)
    n, table = len(samples), int(header["table"])
    manifest = manifest_of(path)
    _check_manifest(path, manifest, header, fields, samples, allocations)
    allocations = allocations[np.argsort(allocations["place"], kind="stable")]
    image = samples["image"]
    at = np.searchsorted(allocations["place"], image["place"])
    bad = (
        (at >= n) | (allocations["place"][np.minimum(at, max(n - 1, 0))] != image["place"])
        if n
        else np.zeros(0, bool)
    )
    if bad.any():
        raise ValueError(
            f"data.root: {path}: the allocation table does not know image {int(np.flatnonzero(bad)[0])}; the file is damaged"
        )
    length = allocations["length"][at]
    _check_places(path, image, length, table)
    _check_labels(path, samples["label"])
    sizes = {"height": image["height"].astype(np.int32), "width": image["width"].astype(np.int32)}
    arrays = {
        "place": image["place"].astype(np.int64),
        "length": length.astype(np.int64),
        "mode": image["mode"].copy(),
        **sizes,
    }
    return Samples(
        [str(path)],
        [stamp(status)],
        np.zeros(n, np.int32),
        label=samples["label"].copy(),
        manifest=manifest,
        **arrays,
    )


def _tables(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Header, fields, entries and allocations of a file of `size` bytes. Raises ValueError if it is no finished .beton of ours."""
    cut = f"data.root: {path} is cut short ({size:,} bytes); copy or write it again"
    if size < DATA_FIELDS_END:
        raise ValueError(
            cut
            if size
            else f"data.root: {path} is empty; its writing never began, or the disk was full"
        )
    header = np.fromfile(path, HEADER, 1)[0]
    if header["version"] != VERSION or not 1 <= header["num_fields"] <= 100:
        raise ValueError(f"data.root: {path} is not a .beton of format {VERSION}")
    if header["table"] == 0:
        raise ValueError(
            f"data.root: {path} was never finished: its writer was stopped; run the same write again, and it goes on"
        )
    fields = np.fromfile(path, FIELD, int(header["num_fields"]), offset=HEADER.itemsize)
    found = [
        (bytes(field["name"]).split(b"\0")[0].decode("ascii", "replace"), int(field["type"]))
        for field in fields
    ]
    if found != list(FIELDS):
        raise ValueError(
            f"data.root: {path} has the fields {found}, and not image and label; write it with ssl_pretrain.data.beton"
        )
    n, table = int(header["num_samples"]), int(header["table"])
    if DATA_FIELDS_END + n * SAMPLE.itemsize > size or table + n * ALLOCATION.itemsize > size:
        raise ValueError(cut)
    return (
        header,
        fields,
        np.fromfile(path, SAMPLE, n, offset=DATA_FIELDS_END),
        np.fromfile(path, ALLOCATION, n, offset=table),
    )


def _check_places(path: Path, image: np.ndarray, length: np.ndarray, table: int) -> None:
    """No decoder may be sent outside the file, or be given more pixels than the memory it writes to.

    Sums of 64-bit places and lengths can wrap, so each is compared with what the other leaves of the file.
    """
    pixels = image["height"].astype(np.int64) * image["width"]
    wrong = (image["place"] < DATA_FIELDS_END) | (image["place"] > table)
    wrong |= length > np.uint64(table) - np.minimum(image["place"], np.uint64(table))
    wrong |= (pixels == 0) | (image["mode"] > RAW) | (length == 0)
    wrong |= (image["mode"] == RAW) & (length != (3 * pixels).astype(length.dtype))
    if wrong.any():
        raise ValueError(
            f"data.root: {path}: the entry of image {int(np.flatnonzero(wrong)[0])} points outside the file; it is damaged"
        )
    if (large := pixels > MAX_PIXELS).any():
        index = int(np.flatnonzero(large)[0])
        raise ValueError(
            f"data.root: {path}: the entry of image {index} says {int(image['width'][index]):,} x {int(image['height'][index]):,} pixels, "
            f"more than the {MAX_PIXELS:,} that are decoded; it is damaged"
        )


def _check_labels(path: Path, label: np.ndarray) -> None:
    """Raise ValueError for a label that is no class: every class up to the largest label gets a name in memory."""
    wrong = (label < -1) | (label >= _MAX_CLASSES)
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"data.root: {path}: the label of image {index} is {int(label[index])}, and labels are -1 for none or a class below "
            f"{_MAX_CLASSES:,}; the file is damaged"
        )


def _check_manifest(
    path: Path,
    manifest: dict[str, Any],
    header: np.ndarray,
    fields: np.ndarray,
    samples: np.ndarray,
    allocations: np.ndarray,
) -> None:
    """Raise ValueError unless the manifest describes this very file. A file of FFCV's own writer has none."""
    if not manifest:
        return
    expected = manifest.get("table_sha256", "")
    if manifest["num_samples"] != len(samples) or expected not in (
        "",
        _sha256(header, fields, samples, allocations),
    ):
        raise ValueError(
            f"data.root: {path} and {manifest_path(path).name} do not belong together: a table was damaged, or a write was stopped "
            "between the two; run the same write again, or copy both again"
        )
    if (largest := int(samples["label"].max(initial=-1))) >= len(manifest["classes"]):
        raise ValueError(
            f"data.root: {path}: a label is {largest}, and its manifest has {len(manifest['classes'])} classes"
        )


def table_sha256(path: Path) -> str:
    """SHA-256 of everything in a file that is no image: header, fields, entries and allocations. Raises ValueError."""
    return _sha256(*_tables(path, path.stat().st_size))


def _sha256(*tables: np.ndarray) -> str:
    digest = hashlib.sha256()
    for table in tables:
        digest.update(np.ascontiguousarray(table).tobytes())
    return digest.hexdigest()


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Inode, size and time of a file, which differ between it and a file that replaces it."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def pages_begin(num_images: int, page_size: int) -> int:
    """Return the place of the first page, behind the entries of `num_images` images."""
    return -(-(DATA_FIELDS_END + num_images * SAMPLE.itemsize) // page_size) * page_size


def finish(data: BinaryIO, samples: np.ndarray, length: np.ndarray, page_size: int) -> None:
    """Make a .beton of a file that has the images: write the table of allocations, then fields and entries, the header last."""
    place = samples["image"]["place"]
    table = int(place[-1] + length[-1])
    allocations = np.zeros(len(samples), ALLOCATION)
    allocations["sample"], allocations["place"], allocations["length"] = (
        np.arange(len(samples)),
        place,
        length,
    )
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, kind) in zip(fields, FIELDS):
        field["type"], field["name"][: len(name)] = kind, np.frombuffer(name.encode(), np.uint8)
    data.truncate(table)
    header = np.array([(VERSION, len(FIELDS), page_size, len(samples), table)], HEADER)
    for at, content in (
        (table, allocations),
        (HEADER.itemsize, fields),
        (DATA_FIELDS_END, samples),
        (0, header),
    ):
        if at == 0:
            os.fsync(data.fileno())
        data.seek(at)
        data.write(content.tobytes())
        data.flush()
    os.fsync(data.fileno())


def manifest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest beside a file; empty for a file of FFCV's own writer, which has none. Raises ValueError where it is damaged."""
    try:
        manifest = json.loads(manifest_path(path).read_bytes())
    except FileNotFoundError:
        return {}
    except (
        OSError,
        ValueError,
        RecursionError,
    ):  # a folder, no text, no JSON, or lists in lists without end
        manifest = None
    if not _is_whole(manifest):
        raise ValueError(
            f"data.root: {manifest_path(path)} is damaged; copy it again, or run the same write again"
        )
    return manifest


def sealed(manifest: dict[str, Any]) -> bytes:
    """The text of a manifest, with a hash of all other keys, so that a flipped bit is found."""
    return json.dumps({**manifest, "manifest_sha256": _seal(manifest)}, indent=1).encode()


def _is_whole(manifest: Any) -> bool:
    """Return True if the manifest has every key with a value of its type, no other key, and the hash that it was written with."""
    if not isinstance(manifest, dict):
        return False
    kinds = {
        **dict.fromkeys(_COUNTS, int),
        **dict.fromkeys(_TEXTS, str),
        **dict.fromkeys(_LISTS, list),
    }
    if not all(
        isinstance(manifest.get(key), kind) and not isinstance(manifest[key], bool)
        for key, kind in kinds.items()
    ):
        return False
    if not all(isinstance(text, str) for key in _LISTS for text in manifest[key]):
        return False
    if set(manifest) == set(kinds):  # of an earlier version, without hashes
        return True
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return set(_HASHES) <= set(manifest) <= {*kinds, *_HASHES, "range"} and manifest[
        "manifest_sha256"
    ] == _seal(rest)


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def content(samples: Samples, index: int) -> bytes:
    """The stored bytes of one image, by any process. Raises OSError; EOFError where the file ends before the image does."""
    path = samples.paths[samples.file[index]]
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        if stamp(os.fstat(handle)) != samples.stamps[samples.file[index]]:
            raise OSError("the file was replaced")
        stored = os.pread(handle, int(samples.length[index]), int(samples.place[index]))
    finally:
        os.close(handle)
    if len(stored) != samples.length[index]:
        raise EOFError(
            f"{samples.name(index)}: the file ends before the image does; it was {samples.length[index]} bytes long when opened"
        )
    return stored


def check_present(samples: Samples) -> None:
    """Raise FileNotFoundError if a file is gone, ValueError if it is not the one that was opened."""
    for path, opened in zip(samples.paths, samples.stamps):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"data.root: {path} is gone; it was there when the run began"
            ) from None
        if stamp(status) != opened:
            raise ValueError(
                f"data.root: {path} was replaced or changed while it was being read; start the run again"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")
