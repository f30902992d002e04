"""Lists of image files: found below a folder, packed into two arrays, and cached between runs."""

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
    images_by_content,
    is_image,
    read_head,
)

_CACHE_FORMAT = 3  # raise it when the content of the cache files changes
# A folder changed more recently may change again within one tick of its file system's clock.
_SETTLED_NS = 2_000_000_000
_REPORT_SECONDS = 5


class Span(NamedTuple):
    """Position of a file inside a zip, as stated in the archive's directory."""

    offset: int  # position of the local header
    stored: int  # bytes in the archive
    method: int  # compression method
    size: int  # bytes of the decompressed file
    crc: int  # CRC-32 of the decompressed file


@dataclass(frozen=True)
class Listing:
    """Paths of n images in a fixed order.

    The packed form sends a million paths to a loader worker in tens of milliseconds.
    """

    root: str  # the folder or the zip
    packed: np.ndarray  # uint8, concatenated paths in the file system's encoding
    ends: np.ndarray  # int64 (n,), end of each path in `packed`
    spans: np.ndarray  # int64 (n, 5), a `Span` per image of a zip; (0, 5) for a folder
    within: str = ""  # folder of the zip that the paths are relative to
    skipped: tuple[SkippedFiles, ...] = ()
    tables: tuple[str, ...] = ()  # members of the zip that may be lists or tables of labels

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, index: int) -> str:
        """Return the path of one image, relative to `root`/`within`."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.packed[start : self.ends[index]].tobytes())

    def paths(self) -> list[str]:
        """Return all paths."""
        data, starts = self.packed.tobytes(), [0, *self.ends.tolist()]
        return [os.fsdecode(data[start:end]) for start, end in itertools.pairwise(starts)]

    def take(self, indices: Sequence[int] | np.ndarray, within: str = "") -> Self:
        """Return a listing of some images, all of them below `within`, relative to it."""
        paths, prefix_length = self.paths(), len(within) + 1 if within else 0
        subset = pack(self.root, [paths[index][prefix_length:] for index in indices])
        return replace(
            self,
            packed=subset.packed,
            ends=subset.ends,
            spans=self.spans[indices] if len(self.spans) else self.spans,
            within=within or self.within,
        )


class Scan(NamedTuple):
    """A new listing, the folders it came from, and the stamps of these folders."""

    listing: Listing
    folders: list[str]
    stamps: list[int]


def pack(root: str, paths: Iterable[str], spans: np.ndarray | None = None) -> Listing:
    """Make a listing of these paths, in this order."""
    encoded = [os.fsencode(path) for path in paths]
    packed = np.frombuffer(b"".join(encoded), np.uint8)
    ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
    if spans is None:
        spans = np.zeros((0, len(Span._fields)), np.int64)
    return Listing(root, packed, ends, spans)


def stamp(status: os.stat_result) -> list[int]:
    """Return the times and the size that change with the content of a folder or file.

    The time of the status change is among them, as programs can set the modification time.
    """
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size]


def list_folder(root: str | Path, cache: Path) -> Listing:
    """List the images below a folder, at any depth. Links are followed.

    The listing is cached with the time of each folder's last change, and renewed when one differs.

    Raises:
        ValueError: If a folder cannot be listed.
    """
    return load_or_scan(os.path.abspath(root), cache, scan_folder)


def scan_folder(root: str) -> Scan:
    """List the images below a folder without the cache.

    Folders behind links come last, in the order of their names. Folders that were listed already
    or contain the root are skipped, as their images would be listed twice.
    """
    files: list[str] = []
    folders: list[str] = []
    stamps: list[int] = []
    skips = SkipCounter()
    visited = _ancestors(root)
    waiting = [("", False)]
    links: list[str] = []
    last_report = time.monotonic()
    while waiting or links:
        folder, is_behind_link = waiting.pop() if waiting else (heapq.heappop(links), True)
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)  # before the content, so that a change between makes it stale
            identity = (status.st_dev, status.st_ino)
            if is_behind_link and status.st_ino and identity in visited:
                skips.add("links to folders that are listed already", folder)
                continue
            with os.scandir(path) as scan:
                entries = [(entry_type(entry), entry) for entry in scan]
        except OSError as error:
            raise ValueError(f"data.root: {path} cannot be listed: {error.strerror}") from None
        visited.add(identity)
        folders.append(folder)
        stamps += stamp(status)
        for kind, entry in entries:
            relative = os.path.join(folder, entry.name)
            if kind == "folder" and entry.is_symlink():
                heapq.heappush(links, relative)
            elif kind == "folder":
                waiting.append((relative, is_behind_link))
            elif kind == "file":
                files.append(relative)
            else:
                skips.add(kind, relative)
        if time.monotonic() - last_report > _REPORT_SECONDS:
            last_report = time.monotonic()
            print(f"listing {root}: {len(files):,} files so far", file=sys.stderr, flush=True)
    images = [path for path in files if is_image(path)]
    others = [path for path in files if not is_image(path)]
    images += images_by_content(others, lambda path: read_head(os.path.join(root, path)), skips)
    images.sort(key=os.fsencode)
    return Scan(replace(pack(root, images), skipped=skips.result()), folders, stamps)


def _ancestors(root: str) -> set[tuple[int, int]]:
    """Return the device and inode of each folder that contains the root."""
    identities = set()
    for ancestor in Path(os.path.realpath(root)).parents:
        with contextlib.suppress(OSError):
            status = ancestor.stat()
            identities.add((status.st_dev, status.st_ino))
    return identities


def load_or_scan(root: str, cache: Path, scan: Callable[[str], Scan]) -> Listing:
    """Return the cached listing if nothing has changed since, else scan and cache it.

    A damaged or read-only cache only costs time.
    """
    path = cache / f"list-{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.npz"
    with contextlib.suppress(Exception):  # absent, damaged, another format, or a missing folder
        return _load(path, root)
    listing, folders, stamps = scan(root)
    if len(listing) and time.time_ns() - max(stamps) > _SETTLED_NS:
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            _save(path, listing, pack(root, folders), stamps)
    return listing


def _load(path: Path, root: str) -> Listing:
    """Load a listing from the cache. Raise any exception if it cannot be used."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    more = json.loads(arrays["more"].tobytes())
    version = (int(arrays["format"]), arrays["root"].tobytes(), more["pillow"])
    if version != (_CACHE_FORMAT, os.fsencode(root), PIL.__version__):
        raise ValueError("the listing is of another format or folder")
    folders = Listing(root, arrays["folders"], arrays["folder_ends"], arrays["spans"]).paths()
    statuses = [os.stat(os.path.join(root, folder) if folder else root) for folder in folders]
    if list(itertools.chain.from_iterable(map(stamp, statuses))) != arrays["stamps"].tolist():
        raise ValueError("a folder has changed")
    return Listing(
        root,
        arrays["packed"],
        arrays["ends"],
        arrays["spans"],
        skipped=tuple(SkippedFiles(*row) for row in more["left_out"]),
        tables=tuple(more["tables"]),
    )


def _save(path: Path, listing: Listing, folders: Listing, stamps: list[int]) -> None:
    more = {
        "left_out": [astuple(skipped) for skipped in listing.skipped],
        "tables": listing.tables,
        "pillow": PIL.__version__,
    }
    with open_atomically(path) as file:
        np.savez(
            file,
            format=np.int64(_CACHE_FORMAT),
            root=np.frombuffer(os.fsencode(listing.root), np.uint8),
            packed=listing.packed,
            ends=listing.ends,
            spans=listing.spans,
            folders=folders.packed,
            folder_ends=folders.ends,
            stamps=np.array(stamps, np.int64),
            more=np.frombuffer(json.dumps(more).encode(), np.uint8),  # escapes non-UTF-8 bytes
        )


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that is renamed to `path` at the end, or removed after an error."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
