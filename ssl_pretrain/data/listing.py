"""List the images of a folder or a zip: sorted, packed, and kept on disk so that the next start takes seconds.

One rule says what is skipped, in folders and archives alike: hidden entries and what operating systems and storage
servers leave beside the data. Everything else that is not read is counted by its reason, with one example.
"""

import contextlib
import errno
import hashlib
import heapq
import itertools
import json
import os
import re
import stat
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from ssl_pretrain.data.images import suffixes

MAX_TABLE_BYTES = 1 << 28  # of a table of labels in a zip, which is read whole
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    EOFError,
    ValueError,
)  # RuntimeError: encrypted, or a method that is not read
TABLES = (".csv", ".tsv", ".txt", ".lst")  # suffixes of lists of images and of tables of labels
_FORMAT = 3  # of the cache files; raise it when their content changes
_SETTLED_NS = 2_000_000_000  # a folder changed more recently may change again within the same tick of its file system's clock
_SYSTEM = frozenset(  # names in lower case
    {"__macosx", "icon\r"}  # macOS
    | {
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "recycler",
        "system volume information",
    }  # Windows
    | {"@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}  # Synology, QNAP
    | {"lost+found", "__pycache__"}
)
_UNFINISHED = frozenset(
    {".part", ".partial", ".crdownload", ".download", ".tmp", ".filepart", ".aria2", ".bak", ".swp"}
)
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftypavif", re.DOTALL
)
_MAGIC_BYTES = 16
_SAMPLE = 8  # files of an unknown suffix whose first bytes are read before all of them are


@dataclass(frozen=True)
class LeftOut:
    """Files that are not read, for one reason."""

    reason: str
    count: int
    first: str  # the first of them by name


class Span(NamedTuple):
    """Where a member of a zip is, as the archive's directory says."""

    offset: int  # of its local header
    stored: int  # bytes in the archive
    method: int  # of compression
    size: int  # bytes of the file
    crc: int  # CRC-32 of the file


@dataclass(frozen=True)
class Listing:
    """The paths of n images, in a fixed order. Packed: a million reach a worker in tens of milliseconds."""

    root: str  # the folder, or the zip
    packed: np.ndarray  # uint8, the paths one after the other, in the file system's encoding
    ends: np.ndarray  # int64 (n,), where each path ends
    spans: np.ndarray  # int64 (n, 5) for a zip: see `Span`; (0, 5) for files
    within: str = ""  # the paths are relative to this folder of the zip
    left_out: tuple[LeftOut, ...] = ()
    tables: tuple[str, ...] = ()  # for a zip: its members that may be lists or tables of labels

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
        files = pack(
            self.root,
            [paths[index][cut:] for index in indices],
            self.spans[indices] if len(self.spans) else self.spans,
        )
        return replace(
            files, within=within or self.within, left_out=self.left_out, tables=self.tables
        )


def is_skipped(name: str) -> bool:
    """Return True for a hidden file or folder, and for what operating systems and storage servers leave beside the data."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image(name: str) -> bool:
    """Return True if the suffix is that of a format that the installed Pillow decodes."""
    return os.path.splitext(name)[1].lower() in suffixes()


class _Tally:
    """Counts what is left out, by reason."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, path: str) -> None:
        count, first = self._counts.get(reason, (0, path))
        self._counts[reason] = (count + 1, min(first, path))

    def result(self) -> tuple[LeftOut, ...]:
        return tuple(LeftOut(reason, *self._counts[reason]) for reason in sorted(self._counts))


_Built = tuple[
    Listing, list[str], list[int]
]  # a listing, the folders it came from, and the stamps of each


def pack(root: str, paths: Iterable[str], spans: np.ndarray | None = None) -> Listing:
    """A listing of `paths` in the order given."""
    encoded = [os.fsencode(path) for path in paths]
    packed = np.frombuffer(b"".join(encoded), np.uint8)
    ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
    return Listing(
        root, packed, ends, np.zeros((0, len(Span._fields)), np.int64) if spans is None else spans
    )


def of_folder(root: str | Path, cache: Path) -> Listing:
    """All images below a folder, at any depth. Links are followed, and what `is_skipped` names is skipped.

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


def _walk(root: str) -> _Built:
    """Each folder's time is read before its content, so that a change in between makes the list stale.

    Folders behind links come last, in the order of their names. One that was listed already, or that contains the
    root, is left out: its images would be in the list twice.
    """
    images: list[str] = []
    others: list[str] = []
    folders: list[str] = []
    stamps: list[int] = []
    tally = _Tally()
    reported = time.monotonic()
    seen = _identities_above(root)
    waiting, links = [("", False)], list[str]()
    while waiting or links:
        folder, linked = waiting.pop() if waiting else (heapq.heappop(links), True)
        try:
            status = os.stat(os.path.join(root, folder))
            identity = (status.st_dev, status.st_ino)
            if linked and status.st_ino and identity in seen:
                tally.add("links to folders that are listed already", folder)
                continue
            seen.add(identity)
            folders.append(folder)
            stamps.extend(_stamp(status))
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path = os.path.join(folder, entry.name)
                    kind = kind_of(entry)
                    if kind == "folder" and entry.is_symlink():
                        heapq.heappush(links, path)
                    elif kind == "folder":
                        waiting.append((path, linked))
                    elif kind == "file":
                        (images if is_image(entry.name) else others).append(path)
                    else:
                        tally.add(kind, path)
        except OSError as error:
            raise ValueError(
                f"data.root: {os.path.join(root, folder)} cannot be listed: {error.strerror}"
            ) from None
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            print(f"listing {root}: {len(images):,} images so far", file=sys.stderr, flush=True)
    images += _images_by_content(others, lambda path: _first_bytes(os.path.join(root, path)), tally)
    return (
        replace(pack(root, sorted(images, key=os.fsencode)), left_out=tally.result()),
        folders,
        stamps,
    )


def _identities_above(root: str) -> set[tuple[int, int]]:
    """Device and inode of each folder that contains the root."""
    identities = set()
    for above in Path(os.path.realpath(root)).parents:
        with contextlib.suppress(OSError):
            status = above.stat()
            identities.add((status.st_dev, status.st_ino))
    return identities


def kind_of(entry: "os.DirEntry[str]") -> str:
    """Return "folder", "file", or the reason to leave the entry out."""
    if is_skipped(entry.name):
        return "hidden or system entries"
    with contextlib.suppress(OSError):  # a link to itself
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        if not entry.is_symlink() or os.path.exists(entry.path):
            return "pipes, sockets or devices"
    return "links to nothing"


def holds_images_by_content(folder: str | Path, names: Sequence[str]) -> bool:
    """Return True if one of some files of a folder is an image by its first bytes, whatever its name."""
    paths = [os.path.join(folder, name) for name in names[:: max(1, len(names) // _SAMPLE)]]
    return any(_MAGIC.match(_first_bytes(path)) for path in paths if os.path.isfile(path))


def read_member(path: str | Path, name: str) -> bytes:
    """Return the bytes of a zip's member by its path with slashes. Raises OSError, also where it is damaged or too large."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(
                each for each in archive.infolist() if member_name(each).removeprefix("./") == name
            )
            if member.file_size > MAX_TABLE_BYTES:
                raise OSError(
                    errno.EFBIG, f"{member.file_size:,} bytes are more than a table of labels has"
                )
            return archive.read(member)
    except _ZIP_ERRORS as error:
        raise OSError(errno.EIO, str(error)) from None


def _first_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MAGIC_BYTES)
    except OSError:
        return b""


def _images_by_content(
    paths: list[str], first_bytes: Callable[[str], bytes], tally: _Tally
) -> list[str]:
    """The images among files of other suffixes, or of none. All files of a suffix are tried where one of a sample is an image."""
    groups: dict[str, list[str]] = {}
    for path in sorted(paths, key=os.fsencode):
        groups.setdefault(os.path.splitext(path)[1].lower(), []).append(path)
    images = []
    for suffix, group in groups.items():
        reason = f"{suffix} files" if suffix else "files without a suffix"
        sample = group[:: max(1, len(group) // _SAMPLE)]
        readable = suffix not in _UNFINISHED and not suffix.endswith("~")
        tried = readable and any(_MAGIC.match(first_bytes(path)) for path in sample)
        for path in group:
            if tried and _MAGIC.match(first_bytes(path)):
                images.append(path)
            else:
                tally.add(reason, path)
    return images


def _central_directory(root: str) -> _Built:
    status = os.stat(root)
    tally = _Tally()
    try:
        with zipfile.ZipFile(root) as archive:
            members, others = _members(archive, tally)

            def first_bytes(path: str) -> bytes:
                try:
                    with archive.open(others[path]) as file:
                        return file.read(_MAGIC_BYTES)
                except (OSError, *_ZIP_ERRORS):
                    return b""

            members |= {
                path: others[path] for path in _images_by_content(list(others), first_bytes, tally)
            }
    except (OSError, *_ZIP_ERRORS) as error:
        raise ValueError(f"data.root: {root} cannot be read as a zip: {error}") from None
    for path, member in members.items():
        if member.flag_bits & 1 or member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise ValueError(
                f"data.root: {root} holds {path}, encrypted or of a rare compression; repack it with `zip -r -0`"
            )
        if max(member.header_offset, member.compress_size, member.file_size) >= 2**63:
            raise ValueError(
                f"data.root: {root} holds {path} with a size that no file has; the zip is damaged"
            )
    paths = sorted(members, key=os.fsencode)
    found = [
        Span(
            member.header_offset,
            member.compress_size,
            member.compress_type,
            member.file_size,
            member.CRC,
        )
        for member in (members[path] for path in paths)
    ]
    spans = np.array(found, np.int64).reshape(-1, len(Span._fields))
    tables = tuple(path for path in sorted(others) if path.lower().endswith(TABLES))
    return (
        replace(pack(root, paths, spans), left_out=tally.result(), tables=tables[:1000]),
        [""],
        _stamp(status),
    )


def _members(
    archive: zipfile.ZipFile, tally: _Tally
) -> tuple[dict[str, zipfile.ZipInfo], dict[str, zipfile.ZipInfo]]:
    """Return the images and the other files of an archive by path with slashes, as if it had been unpacked into a folder."""
    images: dict[str, zipfile.ZipInfo] = {}
    others: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member_name(member)
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts or name.endswith("/"):
            continue
        path = "/".join(parts)
        if any(is_skipped(part) for part in parts if part != ".."):
            tally.add("hidden or system entries", path)
        elif name.startswith("/") or re.match("[A-Za-z]:/", name):
            tally.add("members with absolute paths", name)
        elif ".." in parts:
            tally.add("members outside the archive", name)
        elif stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            tally.add("links, pipes or devices", path)
        else:
            found = images if is_image(path) else others
            if path in found:
                tally.add("earlier members of the same name", path)
            found[path] = member
    return images, others


def member_name(member: zipfile.ZipInfo) -> str:
    """The member's path with slashes. Windows writes backslashes, and macOS writes UTF-8 without saying so."""
    name = member.filename
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _stamp(status: os.stat_result) -> list[int]:
    """Times and size, which change with a folder's or file's content. The status change is among them, as the other time can be set."""
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size]


def _kept(root: str, cache: Path, build: Callable[[], _Built]) -> Listing:
    """The listing from the cache if nothing changed since, else built and put there; a damaged or unwritable cache only costs time."""
    path = cache / f"list-{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.npz"
    with contextlib.suppress(
        Exception
    ):  # absent, damaged, of another format, or a folder is gone: build anew
        with np.load(path, allow_pickle=False) as file:
            kept = {name: file[name] for name in file.files}
        more = json.loads(kept["more"].tobytes())
        left_out = tuple(LeftOut(*each) for each in more["left_out"])
        listing = Listing(
            root,
            kept["packed"],
            kept["ends"],
            kept["spans"],
            left_out=left_out,
            tables=tuple(more["tables"]),
        )
        folders = Listing(root, kept["folders"], kept["folder_ends"], listing.spans)
        same = (
            int(kept["format"]) == _FORMAT
            and kept["root"].tobytes() == os.fsencode(root)
            and more["pillow"] == PIL.__version__
        )
        now = [
            number
            for folder in folders.paths()
            for number in _stamp(os.stat(os.path.join(root, folder) if folder else root))
        ]
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
    left_out = [(each.reason, each.count, each.first) for each in listing.left_out]
    more = {"left_out": left_out, "tables": listing.tables, "pillow": PIL.__version__}
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
                more=np.frombuffer(
                    json.dumps(more).encode(), np.uint8
                ),  # ASCII: bytes that are no UTF-8 are escaped
            )
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
