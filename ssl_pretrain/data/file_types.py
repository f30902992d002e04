"""Distinguish images from other files by their suffix or by their first bytes.

The same rules apply to folders and zips. A `.npy` is an image where there are no images in other
formats, because beside those it usually holds their features or labels. Hidden entries are skipped,
and so are the files that operating systems and storage servers add to folders. Skipped files are
counted by reason, with one example per reason.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ssl_pretrain.data.images import image_suffixes

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".lst")  # lists of images and tables of labels
SIGNATURE_BYTES = 16
HIDDEN = "hidden or system entries"
_SYSTEM_NAMES = frozenset(  # in lower case
    [
        *("__macosx", "icon\r"),  # macOS
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler"),  # Windows
        *("system volume information", "lost+found", "__pycache__"),
        *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),  # storage servers
    ]
)
_UNFINISHED_SUFFIXES = frozenset(  # partial downloads and backups
    [".part", ".partial", ".crdownload", ".download", ".tmp", ".filepart", ".aria2", ".bak", ".swp"]
)
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftypavif", re.DOTALL
)
_SAMPLE_SIZE = 8  # approximate number of files to try per unknown suffix before reading all


@dataclass(frozen=True)
class SkippedFiles:
    """Files that are not read, all for the same reason."""

    reason: str
    num_files: int
    first_path: str  # in alphabetical order


class SkipCounter:
    """Counts skipped files by reason."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, path: str) -> None:
        """Count a skipped file."""
        count, first = self._counts.get(reason, (0, path))
        self._counts[reason] = (count + 1, min(first, path))

    def skipped_files(self) -> tuple[SkippedFiles, ...]:
        """Return the skipped files, one item per reason, sorted by reason."""
        return tuple(SkippedFiles(reason, *self._counts[reason]) for reason in sorted(self._counts))


def is_skipped(name: str) -> bool:
    """Return True for hidden entries and for system files such as `Thumbs.db`."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Return True if files with this suffix are images, in a format of Pillow or as a .npy."""
    return is_picture(name) or is_array(name)


def is_picture(name: str) -> bool:
    """Return True if the installed Pillow decodes files with this suffix."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def is_array(name: str) -> bool:
    """Return True if a file is an array, which is an image where there are no pictures."""
    return name.lower().endswith(".npy")


def without_arrays(
    pictures: Sequence[str], arrays: Sequence[str], skip_counter: SkipCounter
) -> list[str]:
    """Return the pictures, or the arrays if there are none. Count the arrays that are left out."""
    if not pictures:
        return list(arrays)
    for path in arrays:
        skip_counter.add(".npy files beside images in other formats", path)
    return list(pictures)


def entry_type(entry: os.DirEntry[str]) -> str:
    """Return "folder", "file", or the reason to skip the entry."""
    if is_skipped(entry.name):
        return HIDDEN
    with contextlib.suppress(OSError):  # raised for a symbolic link that points to itself
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        if not entry.is_symlink() or os.path.exists(entry.path):
            return "pipes, sockets or devices"
    return "broken links"


def sample_has_image(paths: Sequence[str]) -> bool:
    """Return True if any file in a sample of these paths has an image signature."""
    return any(_SIGNATURE.match(read_head(path)) for path in _sample(paths))


def find_images_by_content(
    paths: Iterable[str], read_head: Callable[[str], bytes], skip_counter: SkipCounter
) -> list[str]:
    """Find the images among files whose suffix is unknown or absent.

    All files with the same suffix are read if a sample of them contains an image.

    Args:
        paths: Paths of the files.
        read_head: Function that returns the first `SIGNATURE_BYTES` bytes of a file.
        skip_counter: Counter of the files that are not images.
    """
    groups: dict[str, list[str]] = {}
    for path in sorted(paths, key=os.fsencode):
        groups.setdefault(os.path.splitext(path)[1].lower(), []).append(path)
    images = []
    for suffix, group in groups.items():
        may_contain_images = (
            suffix not in _UNFINISHED_SUFFIXES
            and not suffix.endswith("~")
            and any(_SIGNATURE.match(read_head(path)) for path in _sample(group))
        )
        for path in group:
            if may_contain_images and _SIGNATURE.match(read_head(path)):
                images.append(path)
            else:
                skip_counter.add(f"{suffix} files" if suffix else "files without a suffix", path)
    return images


def read_head(path: str) -> bytes:
    """Return the first bytes of a regular file, or an empty result if it cannot be read."""
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return file.read(SIGNATURE_BYTES)
    return b""


def _sample(paths: Sequence[str]) -> Sequence[str]:
    return paths[:: max(1, len(paths) // _SAMPLE_SIZE)]
