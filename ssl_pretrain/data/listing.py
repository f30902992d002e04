"""List image files below a folder, pack their paths into arrays, and cache them between runs."""

import contextlib
import hashlib
import heapq
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import PIL

from ssl_pretrain.data.file_types import (
    SkipCounter,
    SkippedFiles,
    entry_type,
    find_images_by_content,
    is_array,
    is_picture,
    read_head,
    without_arrays,
)

_CACHE_FORMAT = 4  # increase it when the content of the cache files changes
# A folder that changed more recently may change again within one tick of the file system's clock.
_SETTLED_NS = 2_000_000_000
_REPORT_SECONDS = 5


class Span(NamedTuple):
    """Position of a file inside a zip, from the archive's central directory."""

    offset: int  # position of the local header
    compressed_size: int  # bytes in the archive
    method: int  # compression method
    size: int  # bytes of the decompressed file
    crc: int  # CRC-32 of the decompressed file


@dataclass(frozen=True)
class Listing:
    """Paths of n images in a fixed order.

    The packed form sends a million paths to a loader worker in tens of milliseconds.
    """

    root: str  # the folder or the zip
    packed_paths: np.ndarray  # uint8, concatenated paths in the file system's encoding
    ends: np.ndarray  # int64 (n,), end of each path in `packed_paths`
    spans: np.ndarray  # int64 (n, 5), a `Span` per image of a zip; (0, 5) for a folder
    folder_in_zip: str = ""  # folder of the zip that the paths are relative to
    skipped: tuple[SkippedFiles, ...] = ()
    tables: tuple[str, ...] = ()  # members of the zip that may be lists or tables of labels

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, index: int) -> str:
        """Return the path of one image, relative to `root`/`folder_in_zip`."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.packed_paths[start : self.ends[index]].tobytes())

    def paths(self) -> list[str]:
        """Return all paths."""
        data, starts = self.packed_paths.tobytes(), [0, *self.ends.tolist()]
        return [os.fsdecode(data[start:end]) for start, end in itertools.pairwise(starts)]

    def take(self, indices: Sequence[int] | np.ndarray, folder_in_zip: str = "") -> Self:
        """Return a listing of the images at `indices`, in that order.

        If `folder_in_zip` is given, it contains all of them, and the new paths are relative to it.
        """
        paths, prefix_length = self.paths(), len(folder_in_zip) + 1 if folder_in_zip else 0
        subset = pack_paths(self.root, [paths[index][prefix_length:] for index in indices])
        return replace(
            self,
            packed_paths=subset.packed_paths,
            ends=subset.ends,
            spans=self.spans[indices] if len(self.spans) else self.spans,
            folder_in_zip=folder_in_zip or self.folder_in_zip,
        )


class Scan(NamedTuple):
    """A new listing, the folders that were scanned for it, and the stamps of these folders."""

    listing: Listing
    folders: list[str]
    stamps: list[int]


def pack_paths(root: str, paths: Iterable[str], spans: np.ndarray | None = None) -> Listing:
    """Make a listing of these paths, in this order."""
    encoded = [os.fsencode(path) for path in paths]
    packed = np.frombuffer(b"".join(encoded), np.uint8)
    ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
    if spans is None:
        spans = np.zeros((0, len(Span._fields)), np.int64)
    return Listing(root, packed, ends, spans)


def change_stamp(status: os.stat_result) -> list[int]:
    """Return the times and the size that change with the content of a folder or file.

    The modification time alone is not enough, because programs can set it.
    """
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size]


def list_folder(root: str | Path, cache_dir: Path) -> Listing:
    """List the images below a folder, at any depth. Links are followed.

    The listing is cached with the stamps of its folders, and renewed when one of them changes.

    Raises:
        ValueError: If a folder cannot be listed.
    """
    return load_or_scan(os.path.abspath(root), cache_dir, scan_folder)


def scan_folder(root: str) -> Scan:
    """List the images below a folder without the cache.

    Folders behind links come last, in the order of their names. Behind links, folders that are
    listed already or contain the root are skipped, because their images would be listed twice.
    """
    files: list[str] = []
    folders: list[str] = []
    stamps: list[int] = []
    skip_counter = SkipCounter()
    visited = _ancestors(root)
    pending = [("", False)]
    links: list[str] = []
    last_report = time.monotonic()
    while pending or links:
        folder, is_behind_link = pending.pop() if pending else (heapq.heappop(links), True)
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)  # before the scan, so that a change in between is noticed
            identity = (status.st_dev, status.st_ino)
            if is_behind_link and status.st_ino and identity in visited:
                skip_counter.add("links to folders that are listed already", folder)
                continue
            with os.scandir(path) as scan:
                entries = [(entry_type(entry), entry) for entry in scan]
        except OSError as error:
            raise ValueError(f"data.root: {path} cannot be listed: {error.strerror}") from None
        visited.add(identity)
        folders.append(folder)
        stamps += change_stamp(status)
        for kind, entry in entries:
            relative = os.path.join(folder, entry.name)
            if kind == "folder" and entry.is_symlink():
                heapq.heappush(links, relative)
            elif kind == "folder":
                pending.append((relative, is_behind_link))
            elif kind == "file":
                files.append(relative)
            else:
                skip_counter.add(kind, relative)
        if time.monotonic() - last_report > _REPORT_SECONDS:
            last_report = time.monotonic()
            print(f"listing {root}: {len(files):,} files so far", file=sys.stderr, flush=True)
    pictures = [path for path in files if is_picture(path)]
    arrays = [path for path in files if is_array(path)]
    others = [path for path in files if not is_picture(path) and not is_array(path)]
    pictures += find_images_by_content(
        others, lambda path: read_head(os.path.join(root, path)), skip_counter
    )
    images = sorted(without_arrays(pictures, arrays, skip_counter), key=os.fsencode)
    return Scan(
        replace(pack_paths(root, images), skipped=skip_counter.skipped_files()), folders, stamps
    )


def _ancestors(root: str) -> set[tuple[int, int]]:
    """Return the device and inode of each folder that contains the root."""
    identities = set()
    for ancestor in Path(os.path.realpath(root)).parents:
        with contextlib.suppress(OSError):
            status = ancestor.stat()
            identities.add((status.st_dev, status.st_ino))
    return identities


def load_or_scan(root: str, cache_dir: Path, scan: Callable[[str], Scan]) -> Listing:
    """Return the cached listing if its folders are unchanged, else scan them and cache the result.

    A damaged or read-only cache only costs time.
    """
    path = cache_dir / f"list-{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.npz"
    with contextlib.suppress(Exception):  # any cache that cannot be used is renewed
        return _load(path, root)
    listing, folders, stamps = scan(root)
    if len(listing) and time.time_ns() - max(stamps) > _SETTLED_NS:
        with contextlib.suppress(OSError):
            cache_dir.mkdir(parents=True, exist_ok=True)
            _save(path, listing, pack_paths(root, folders), stamps)
    return listing


def _load(path: Path, root: str) -> Listing:
    """Load a listing from the cache. Raises an exception of any type if it cannot be used."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    metadata = json.loads(arrays["more"].tobytes())
    version = (int(arrays["format"]), arrays["root"].tobytes(), metadata["pillow"])
    if version != (_CACHE_FORMAT, os.fsencode(root), PIL.__version__):
        raise ValueError("the listing has another format, or is for another folder")
    folders = Listing(root, arrays["folders"], arrays["folder_ends"], arrays["spans"]).paths()
    statuses = [os.stat(os.path.join(root, folder) if folder else root) for folder in folders]
    stamps = list(itertools.chain.from_iterable(map(change_stamp, statuses)))
    if stamps != arrays["stamps"].tolist():
        raise ValueError("a folder has changed")
    return Listing(
        root,
        arrays["packed"],
        arrays["ends"],
        arrays["spans"],
        skipped=tuple(SkippedFiles(*row) for row in metadata["left_out"]),
        tables=tuple(metadata["tables"]),
    )


def _save(path: Path, listing: Listing, folders: Listing, stamps: list[int]) -> None:
    metadata = {
        "left_out": [astuple(skipped) for skipped in listing.skipped],
        "tables": listing.tables,
        "pillow": PIL.__version__,
    }
    with open_atomically(path) as file:
        np.savez(
            file,
            format=np.int64(_CACHE_FORMAT),
            root=np.frombuffer(os.fsencode(listing.root), np.uint8),
            packed=listing.packed_paths,
            ends=listing.ends,
            spans=listing.spans,
            folders=folders.packed_paths,
            folder_ends=folders.ends,
            stamps=np.array(stamps, np.int64),
            # JSON escapes bytes that are not UTF-8.
            more=np.frombuffer(json.dumps(metadata).encode(), np.uint8),
        )


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that is renamed to `path` on success and removed after an error."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
