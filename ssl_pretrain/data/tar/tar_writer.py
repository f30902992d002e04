"""Write the images of a source to tar shards in WebDataset's layout, each with its index.

A write can be interrupted at any time. The same call continues it after the last whole shard, and
the shards have the same bytes as without the interruption. A shard gets its name when it is whole.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ssl_pretrain.data import bands
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.beton.tables import RAW
from ssl_pretrain.data.file_types import is_image
from ssl_pretrain.data.formats.array_source import ArraySource
from ssl_pretrain.data.image_source import EncodedSource, ImageFiles, Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.messages import report_progress
from ssl_pretrain.data.tar.index_files import build_index, index_beside, local_shard
from ssl_pretrain.data.tar.shard_index import load_index, save_index
from ssl_pretrain.system import durable_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FORMAT = 1  # increase it when the bytes of the shards change
_KEY_DIGITS = 9
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}  # of Pillow's formats, else the name


@dataclass(frozen=True)
class ShardSize:
    """Limits of a shard. A limit of 0 does not apply."""

    num_images: int = 0
    num_bytes: int = 0  # of the tar; a larger image has a shard of its own


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard."""

    path: Path
    num_images: int
    unreadable: list[str]  # one line per image that is left out


def write_shards(
    source: Source, folder: Path, split: str, shard_size: ShardSize
) -> Iterator[WrittenShard]:
    """Write the images of a source, or continue an interrupted write. Yield each finished shard.

    Args:
        source: The images.
        folder: Folder of the shards, which are called `SPLIT-000000.tar` and so on.
        split: Name of the split.
        shard_size: Limits of a shard.

    Raises:
        ValueError: If the folder has other shards of this split or other classes, another process
            writes them, or no image can be read.
    """
    facts = [source.fingerprint, split, shard_size.num_images, shard_size.num_bytes, _FORMAT]
    write_id = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_folder(folder, split):
        _refuse_other_shards(folder, split, write_id)
        _write_classes(source.classes, folder)
        first, number, num_images = 0, 0, 0
        progress = iter(report_progress(range(len(source)), len(source), "wrote"))
        while first < len(source):
            path = folder / f"{split}-{number:06d}.tar"
            writer = _finished_writer(path, write_id)
            if writer is None:
                writer = _write_shard(source, path, first, shard_size, write_id)
            for _ in range(writer["end"] - first):
                next(progress, None)
            num_images += writer["num_images"]
            yield WrittenShard(path, writer["num_images"], writer["unreadable"])
            first, number = writer["end"], number + 1
        if not num_images:
            raise ValueError(
                f"no image of {source.full_path} can be read, so the shards are empty; give "
                "another source"
            )


def _finished_writer(path: Path, write_id: str) -> dict[str, Any] | None:
    """Return the facts about a shard that the same write has finished, else None."""
    with suppress(OSError, ValueError):
        index = load_index(index_beside(path))
        if index.writer.get("write_id") == write_id and index.is_of(local_shard(path)):
            return index.writer
    return None


def _write_shard(
    source: Source, path: Path, first: int, shard_size: ShardSize, write_id: str
) -> dict[str, Any]:
    """Write one shard from the image `first` on, and its index. Return the facts about it."""
    unfinished = path.with_name(f"{path.name}.writing")
    unreadable: list[str] = []
    num_images, end = 0, first
    with unfinished.open("wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
        while end < len(source):
            try:
                members = _encode_sample(source, end)
            except UnreadableImage as error:
                unreadable.append(str(error))
                end += 1
                continue
            if num_images and _is_full(shard_size, num_images, file.tell(), members):
                break
            for name, content in members:
                header = tarfile.TarInfo(name)  # its date and owner are 0
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
            num_images, end = num_images + 1, end + 1
            if num_images == shard_size.num_images:
                break
    durable_files.sync(unfinished)
    writer = {
        "write_id": write_id,
        "end": end,
        "num_images": num_images,
        "unreadable": unreadable,
    }
    # The index comes first. A reader that finds a shard without it would only make it again, but
    # the next write would repeat the shard.
    save_index(build_index(local_shard(unfinished), writer), index_beside(path))
    os.replace(unfinished, path)
    durable_files.sync_folder(path.parent)
    return writer


def _is_full(
    shard_size: ShardSize, num_images: int, num_bytes: int, members: list[tuple[str, bytes]]
) -> bool:
    """Return True if a shard of so many images and bytes has no room for another sample."""
    if shard_size.num_images and num_images >= shard_size.num_images:
        return True
    blocks = sum(2 + len(content) // tarfile.BLOCKSIZE for _, content in members)
    more_bytes = blocks * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
    return bool(shard_size.num_bytes) and num_bytes + more_bytes > shard_size.num_bytes


def _encode_sample(source: Source, index: int) -> list[tuple[str, bytes]]:
    """Return the names and contents of the members of a sample.

    Raises:
        UnreadableImage: If the image cannot be read.
    """
    suffix, content = _encode_image(source, index)
    key, label = f"{index:0{_KEY_DIGITS}d}", source.label(index)
    members = [(f"{key}{suffix}", content)]
    facts: dict[str, Any] = {}
    if label >= 0:
        members.append((f"{key}.cls", str(label).encode()))
        facts = {"label": label, "class": source.classes[label]}
    if isinstance(source, ImageFiles):
        facts["file"] = source.files.path(index)
    if facts:
        members.append((f"{key}.json", json.dumps(facts).encode()))
    return members


def _encode_image(source: Source, index: int) -> tuple[str, bytes]:
    """Return the suffix and the bytes of an image.

    Files keep their bytes. Values without a file format become a PNG if they have 8 bits and 1 or 3
    channels, and else a .npy.
    """
    is_raw = isinstance(source, Beton) and source.samples.mode[index] == RAW
    if isinstance(source, EncodedSource) and not is_raw:
        content = source.read_bytes(index)
        if isinstance(source, ImageFiles):
            suffix = os.path.splitext(source.files.path(index))[1].lower()
            if is_image(f"image{suffix}"):
                return suffix, content
        return _suffix_of(content, source.name(index)), content
    file = io.BytesIO()
    values = source.values(index) if isinstance(source, ArraySource) else source.read(index)
    if values.dtype in (np.uint8, np.bool_) and values.shape[2] in (1, 3):
        Image.fromarray(source.read(index)).save(file, "PNG")
        return ".png", file.getvalue()
    np.save(file, np.ascontiguousarray(values), allow_pickle=False)
    return ".npy", file.getvalue()


def _suffix_of(content: bytes, name: str) -> str:
    if bands.is_npy(content):
        return ".npy"
    if content.startswith(bands.TIFF_SIGNATURES):
        return ".tif"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image_format = image.format or ""
    except Exception as error:  # decoders raise almost anything for damaged files
        raise UnreadableImage(f"{name}: {type(error).__name__}: {error}") from error
    return _SUFFIXES.get(image_format, f".{image_format.lower()}")


def _refuse_other_shards(folder: Path, split: str, write_id: str) -> None:
    """Raise ValueError if the folder has shards that this write would not make."""
    for path in sorted(folder.glob(f"{split}-*.tar")):
        if _finished_writer(path, write_id) is None:
            raise ValueError(
                f"{path} is a shard of another write; delete the {split} shards of {folder}, or "
                "give another folder"
            )


def _write_classes(classes: list[str], folder: Path) -> None:
    """Write the names of the classes, which both splits share."""
    path = folder / "classes.json"
    text = json.dumps(classes, indent=1) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{path} has other classes than this source; give another folder, or delete it and "
            "its shards"
        )
    if classes and not path.exists():
        durable_files.replace(path, text)


@contextmanager
def _lock_folder(folder: Path, split: str) -> Iterator[BinaryIO]:
    """Hold the lock of one write.

    Raises:
        ValueError: If another process writes the same shards.
    """
    path = folder / f".{split}.lock"
    with path.open("ab") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{folder}: another process is writing the {split} shards; wait until it ends, or "
                "stop it"
            ) from None
        yield file
        path.unlink(missing_ok=True)
