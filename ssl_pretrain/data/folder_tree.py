"""Folders of a data set, on disk or inside a zip, behind one interface."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain.data.file_types import (
    TABLE_SUFFIXES,
    any_image_by_content,
    entry_type,
    is_image,
)
from ssl_pretrain.data.zip_archive import list_zip, read_table

_MAX_DEPTH = 12  # levels below a folder that are searched for an image

Entries = dict[str, list[str]]  # sorted names by type: "folder", "file", and reasons to skip others


@dataclass(frozen=True)
class Location:
    """Position of a split: a folder, a zip, a folder inside a zip, or a list file."""

    path: Path
    within: str = ""  # folder inside the zip
    excluded: tuple[str, ...] = ()  # folders in it that do not belong to the split

    @property
    def full_path(self) -> str:
        """The path, continued inside the zip if there is one, for messages."""
        return os.path.join(self.path, self.within) if self.within else str(self.path)

    @property
    def is_list(self) -> bool:
        """True for a list file."""
        return self.path.suffix.lower() in TABLE_SUFFIXES and not self.path.is_dir()

    @property
    def is_file(self) -> bool:
        """True for a list file or a whole zip."""
        return not self.within and self.path.is_file()


class FolderTree(ABC):
    """One folder, without hidden and system entries."""

    path: Path  # the folder, or the zip
    within: str = ""  # folder inside the zip

    @property
    def full_path(self) -> str:
        """The path, continued inside the zip if there is one, for messages."""
        return self.location().full_path

    @property
    def folders(self) -> list[str]:
        """Names of the folders in it, sorted by bytes. Raise ValueError if it cannot be listed."""
        return self._entries["folder"]

    @property
    def files(self) -> list[str]:
        """Names of the files in it, sorted by bytes. Inside a zip, only images and tables."""
        return self._entries["file"]

    @property
    @abstractmethod
    def _entries(self) -> Entries: ...

    @property
    @abstractmethod
    def has_direct_images(self) -> bool:
        """True if an image lies directly in it."""

    @abstractmethod
    def child(self, name: str) -> FolderTree:
        """Return the folder `name` in it, without checking that it exists."""

    @abstractmethod
    def parent(self) -> FolderTree:
        """Return the folder that contains it. The top folder of a zip is its own parent."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file in it. Raise OSError if that fails."""

    def has_images(self, depth: int = _MAX_DEPTH) -> bool:
        """Return True if there is an image at any depth. The search ends at the first one."""
        return self.has_direct_images or (
            depth > 0 and any(self.child(name).has_images(depth - 1) for name in self.folders)
        )

    def folders_with_images(self) -> Iterator[str]:
        """Yield the names of the folders in it that hold an image at any depth."""
        return (name for name in self.folders if self.child(name).has_images())

    def location(self, excluded: tuple[str, ...] = ()) -> Location:
        """Return its position as a split without the excluded folders in it."""
        return Location(self.path, self.within, excluded)

    def descendant(self, path: str) -> FolderTree:
        """Return a folder at any depth below it, or itself for an empty path."""
        folder = self
        for name in filter(None, path.split("/")):
            folder = folder.child(name)
        return folder


class DiskFolder(FolderTree):
    """A folder on disk."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def _entries(self) -> Entries:
        entries: Entries = {"folder": [], "file": []}
        try:
            with os.scandir(self.path) as scan:
                for entry in scan:
                    entries.setdefault(entry_type(entry), []).append(entry.name)
        except OSError as error:
            raise ValueError(f"data.root: {self.path} cannot be listed: {error.strerror}") from None
        return {kind: sorted(names, key=os.fsencode) for kind, names in entries.items()}

    @functools.cached_property
    def has_direct_images(self) -> bool:
        """True if a file in it has an image's suffix, or a sampled file an image's first bytes."""
        return any(map(is_image, self.files)) or any_image_by_content(
            [os.path.join(self.path, name) for name in self.files]
        )

    def child(self, name: str) -> DiskFolder:
        """Return the folder `name` in it, without checking that it exists."""
        return DiskFolder(self.path / name)

    def parent(self) -> DiskFolder:
        """Return the folder that contains it on disk."""
        return DiskFolder(self.path.parent)

    def read(self, name: str) -> bytes:
        """Return the content of the file `name` in it. Raise OSError if that fails."""
        return (self.path / name).read_bytes()


class ZipFolder(FolderTree):
    """A folder inside a zip."""

    def __init__(self, path: Path, index: dict[str, Entries], within: str = ""):
        self.path, self.within, self._index = path, within, index

    @property
    def _entries(self) -> Entries:
        return self._index.get(self.within, {"folder": [], "file": []})

    @property
    def has_direct_images(self) -> bool:
        """True if a file other than a table lies directly in it."""
        return any(not name.lower().endswith(TABLE_SUFFIXES) for name in self.files)

    def child(self, name: str) -> ZipFolder:
        """Return the folder `name` in it, without checking that it exists."""
        return ZipFolder(self.path, self._index, os.path.join(self.within, name))

    def parent(self) -> ZipFolder:
        """Return the folder that contains it. The top folder of a zip is its own parent."""
        return ZipFolder(self.path, self._index, os.path.dirname(self.within))

    def read(self, name: str) -> bytes:
        """Return the content of a table in it. Raise OSError if it is damaged or too large."""
        return read_table(self.path, os.path.join(self.within, name))


def open_tree(root: Path, cache: Path) -> FolderTree:
    """Return the folder or zip at `root`, or the folder that a list file lies in."""
    if root.suffix.lower() == ".zip" and root.is_file():
        listing = list_zip(root, cache)
        return ZipFolder(root, _entries_by_folder([*listing.paths(), *listing.tables]))
    return DiskFolder(root if root.is_dir() else root.parent)


def _entries_by_folder(paths: list[str]) -> dict[str, Entries]:
    """Return the entries of each folder of a zip that holds these paths."""
    folders: dict[str, set[str]] = defaultdict(set)
    files: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        folder, _, name = path.rpartition("/")
        files[folder].append(name)
    for folder in files:
        while folder:
            folder, _, name = folder.rpartition("/")
            folders[folder].add(name)
    return {
        folder: {
            "folder": sorted(folders[folder], key=os.fsencode),
            "file": sorted(files[folder], key=os.fsencode),
        }
        for folder in {"", *folders, *files}
    }
