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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.messages import report_progress
from ssl_pretrain.data.tar.index_files import build_index, index_beside, local_shard
from ssl_pretrain.data.tar.sample_encoding import encode_sample
from ssl_pretrain.data.tar.shard_index import load_index, save_index
from ssl_pretrain.system import durable_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FORMAT = 2  # increase it when the bytes of the shards change
_CAPTION_FORMAT = "captions 2"  # the same for the shards of a source with captions


@dataclass(frozen=True)
class ShardSize:
    """Limits of a shard. A limit of 0 does not apply."""

    num_images: int = 0
    num_bytes: int = 0  # length of the tar; a larger image has a shard of its own


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
    if source.num_texts:
        facts.append(_CAPTION_FORMAT)
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
                members = encode_sample(source, end)
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
def _lock_folder(folder: Path, split: str) -> Iterator[None]:
    """Hold the lock of one write.

    Raises:
        ValueError: If another process writes the same shards.
    """
    path = folder / f".{split}.lock"
    with ExitStack() as files:
        file = files.enter_context(path.open("ab"))
        while not _lock(file, path):
            file = files.enter_context(path.open("ab"))
        yield
        path.unlink(missing_ok=True)


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock a file, and return False if a write that just ended has removed it from its path."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        split = path.stem.removeprefix(".")
        raise ValueError(
            f"{path.parent}: another process is writing the {split} shards; wait until it ends, or "
            "stop it"
        ) from None
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
