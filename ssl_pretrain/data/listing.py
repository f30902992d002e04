"""Which images a folder, a zip or a list file holds: sorted, packed, and kept on disk so that the next start takes seconds."""

import contextlib
import csv
import hashlib
import itertools
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMAT = 1  # of the cache files; raise it when their content changes
_SETTLED_NS = 2_000_000_000  # a folder changed more recently may change again within the same tick of its file system's clock


@dataclass(frozen=True)
class Listing:
    """The paths of n images, in a fixed order. Packed: a million reach a worker in tens of milliseconds."""

    root: str              # the folder, or the zip
    packed: np.ndarray     # uint8, the paths one after the other, in the file system's encoding
    ends: np.ndarray       # int64 (n,), where each path ends
    spans: np.ndarray      # int64 (n, 3) for a zip: offset of the local header, stored bytes, compression method; (0, 3) for files
    within: str = ""       # the paths are relative to this folder of the zip

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.packed[start : self.ends[index]].tobytes())

    def paths(self) -> list[str]:
        data, starts = self.packed.tobytes(), [0, *self.ends.tolist()]
        return [os.fsdecode(data[start:end]) for start, end in itertools.pairwise(starts)]

    def take(self, indices: Sequence[int] | np.ndarray, within: str = "") -> "Listing":
        """The images at `indices`, all of them below `within`, and their paths relative to it."""
        paths, cut = self.paths(), len(within) + 1 if within else 0
        files = pack(self.root, [paths[index][cut:] for index in indices], self.spans[indices] if len(self.spans) else self.spans)
        return replace(files, within=within or self.within)


_Built = tuple[Listing, list[str], list[int]]  # a listing, the folders it came from, and the stamps of each


def pack(root: str, paths: Iterable[str], spans: np.ndarray | None = None) -> Listing:
    """A listing of `paths` in the order given."""
    encoded = [os.fsencode(path) for path in paths]
    packed = np.frombuffer(b"".join(encoded), np.uint8)
    ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
    return Listing(root, packed, ends, np.zeros((0, 3), np.int64) if spans is None else spans)


def of_folder(root: str | Path, cache: Path) -> Listing:
    """All images below a folder, at any depth; symlinks are followed, names that start with a dot are skipped.

    The list is kept in `cache` with the times at which each folder last changed, and made anew when one of them differs.
    Raises ValueError, naming a folder that cannot be listed.
    """
    root = os.path.abspath(root)
    return _kept(root, cache, lambda: _walk(root))


def of_zip(path: str | Path, cache: Path) -> Listing:
    """All images in a zip, with where each one's bytes are. Kept in `cache` until the file's size or time changes.

    Raises ValueError, naming a file that is not a zip, is encrypted, or holds compression other than stored and deflated.
    """
    root = os.path.abspath(path)
    return _kept(root, cache, lambda: _central_directory(root))


def of_file(path: str | Path) -> tuple[Listing, list[str]]:
    """A text or CSV list, one `path` or `path,label` a line, relative to the list's folder; a first line `path,label` is skipped.

    Returns:
        The listing in the list's own order, and each label as written ("" where there is none).

    Raises:
        ValueError: the list is no text, or its first image does not exist (the others are met when they are read).
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with open(path, newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.reader(lines, skipinitialspace=True) if row and row[0].strip()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data.root: {path} is not a list of paths: {error}") from None
    if rows and rows[0][0].strip().lower() in ("path", "file", "filename", "image"):
        del rows[0]
    paths = [row[0].strip() for row in rows]
    if paths and not os.path.exists(os.path.join(folder, paths[0])):
        raise ValueError(f"data.root: {path} begins with {paths[0]!r}, which is not in {folder}; paths are relative to the list's folder")
    return pack(folder, paths), [row[1].strip() if len(row) > 1 else "" for row in rows]


def _walk(root: str) -> _Built:
    """Each folder's time is read before its content, so that a change in between makes the list stale."""
    images: list[str] = []
    folders: list[str] = []
    stamps: list[int] = []
    reported = time.monotonic()
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]  # and the folders above, against symlink loops
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in above:
                continue
            folders.append(folder)
            stamps.extend(_stamp(status))
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        waiting.append((os.path.join(folder, entry.name), above | {(status.st_dev, status.st_ino)}))
                    elif entry.name.lower().endswith(SUFFIXES):
                        images.append(os.path.join(folder, entry.name))
        except OSError as error:
            raise ValueError(f"data.root: {os.path.join(root, folder)} cannot be listed: {error.strerror}") from None
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            print(f"listing {root}: {len(images):,} images so far", file=sys.stderr, flush=True)
    return pack(root, sorted(images, key=os.fsencode)), folders, stamps


def _central_directory(root: str) -> _Built:
    status = os.stat(root)
    try:
        with zipfile.ZipFile(root) as archive:
            members = [member for member in archive.infolist() if _is_image(member.filename)]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"data.root: {root} cannot be read as a zip: {error}") from None
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"data.root: {root} holds {member.filename}, encrypted or of a rare compression; repack it with `zip -r -0`")
    members.sort(key=lambda member: os.fsencode(member.filename))
    spans = np.array([(member.header_offset, member.compress_size, member.compress_type) for member in members], np.int64).reshape(-1, 3)
    return pack(root, [member.filename for member in members], spans), [""], _stamp(status)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _stamp(status: os.stat_result) -> list[int]:
    """What changes with the content of a folder or file; the time of the last status change too, as the other one can be set at will."""
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size]


def _kept(root: str, cache: Path, build: Callable[[], _Built]) -> Listing:
    """The listing from the cache if nothing changed since, else built and put there; a damaged or unwritable cache only costs time."""
    path = cache / f"list-{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.npz"
    with contextlib.suppress(Exception):  # absent, damaged, of another format, or a folder is gone: build anew
        with np.load(path, allow_pickle=False) as file:
            kept = {name: file[name] for name in file.files}
        listing = Listing(root, kept["packed"], kept["ends"], kept["spans"])
        folders = Listing(root, kept["folders"], kept["folder_ends"], listing.spans)
        same = int(kept["format"]) == _FORMAT and kept["root"].tobytes() == os.fsencode(root)
        now = [number for folder in folders.paths() for number in _stamp(os.stat(os.path.join(root, folder) if folder else root))]
        if same and now == kept["stamps"].tolist():
            return listing
    listing, names, stamps = build()
    if len(listing) and time.time_ns() - max(stamps) > _SETTLED_NS:
        folders = pack(root, names)
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            _write(path, listing, folders, stamps)
    return listing


def _write(path: Path, listing: Listing, folders: Listing, stamps: list[int]) -> None:
    """Written beside and renamed, so that a reader on another rank never sees half a file."""
    handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                format=np.int64(_FORMAT),
                root=np.frombuffer(os.fsencode(listing.root), np.uint8),
                packed=listing.packed,
                ends=listing.ends,
                spans=listing.spans,
                folders=folders.packed,
                folder_ends=folders.ends,
                stamps=np.array(stamps, np.int64),
            )
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
