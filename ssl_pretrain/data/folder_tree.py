"""Folders of a data set, on disk or inside a zip, behind one interface."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ssl_pretrain.data.file_types import (
    TABLE_SUFFIXES,
    any_image_by_content,
    entry_type,
    is_image,
)
from ssl_pretrain.data.zip_archive import list_zip, read_table

_MAX_DEPTH = 12  # levels below a folder that are searched for an image


@dataclass(frozen=True)
class Location:
    """Position of a split: a folder, a zip, a folder inside a zip, or a list file."""

    path: Path
    within: str = ""  # folder inside the zip
    excluded: tuple[str, ...] = ()  # folders in it that do not belong to the split

    @property
    def where(self) -> str:
        """The path for messages."""
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
    def where(self) -> str:
        """The path for messages."""
        return self.location().where

    @property
    @abstractmethod
    def folders(self) -> list[str]:
        """Sorted names of the folders in it."""

    @property
    @abstractmethod
    def files(self) -> list[str]:
        """Sorted names of the files in it. Inside a zip, only images and tables."""

    @property
    @abstractmethod
    def has_direct_images(self) -> bool:
        """True if an image lies directly in it."""

    @abstractmethod
    def child(self, name: str) -> FolderTree:
        """Return a folder in it."""

    @abstractmethod
    def parent(self) -> FolderTree:
        """Return the folder that it lies in."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file in it. Raise OSError if that fails."""

    def has_images(self, depth: int = _MAX_DEPTH) -> bool:
        """Return True if there is an image at any depth, reading no further than the first."""
        return self.has_direct_images or (
            depth > 0 and any(self.child(name).has_images(depth - 1) for name in self.folders)
        )

    def folders_with_images(self) -> Iterator[str]:
        """Yield the names of the folders in it that hold an image at any depth."""
        return (name for name in self.folders if self.child(name).has_images())

    def location(self, excluded: tuple[str, ...] = ()) -> Location:
        """Return where it is, without the excluded folders in it."""
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

    @cached_property
    def _entries(self) -> dict[str, list[str]]:
        entries: dict[str, list[str]] = {"folder": [], "file": []}
        try:
            with os.scandir(self.path) as scan:
                for entry in scan:
                    entries.setdefault(entry_type(entry), []).append(entry.name)
        except OSError as error:
            raise ValueError(f"data.root: {self.path} cannot be listed: {error.strerror}") from None
        return {kind: sorted(names, key=os.fsencode) for kind, names in entries.items()}

    @property
    def folders(self) -> list[str]:
        """Names of the folders in it, sorted by bytes. Raise ValueError if it cannot be listed."""
        return self._entries["folder"]

    @property
    def files(self) -> list[str]:
        """Names of the files in it, sorted by bytes. Raise ValueError if it cannot be listed."""
        return self._entries["file"]

    @cached_property
    def has_direct_images(self) -> bool:
        """True if a file in it has an image's suffix, or a sampled file an image's first bytes."""
        paths = [os.path.join(self.path, name) for name in self.files]
        return any(map(is_image, self.files)) or any_image_by_content(paths)

    def child(self, name: str) -> DiskFolder:
        """Return the folder `name` in it, without checking that it exists."""
        return DiskFolder(self.path / name)

    def parent(self) -> DiskFolder:
        """Return the folder that contains it on disk."""
        return DiskFolder(self.path.parent)

    def read(self, name: str) -> bytes:
        """Return the content of the file `name` in it. Raise OSError if that fails."""
        return (self.path / name).read_bytes()


_Index = dict[str, tuple[list[str], list[str]]]  # folder of a zip -> names of folders, of files


class ZipFolder(FolderTree):
    """A folder inside a zip."""

    def __init__(self, path: Path, index: _Index, within: str = ""):
        self.path, self.within, self._index = path, within, index

    @property
    def folders(self) -> list[str]:
        """Names of the folders in it, sorted by bytes."""
        return self._index.get(self.within, ([], []))[0]

    @property
    def files(self) -> list[str]:
        """Names of the images and tables in it, sorted by bytes."""
        return self._index.get(self.within, ([], []))[1]

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
        return ZipFolder(root, _index([*listing.paths(), *listing.tables]))
    return DiskFolder(root if root.is_dir() else root.parent)


def _index(paths: list[str]) -> _Index:
    """Index the paths in a zip by folder."""
    folders: dict[str, set[str]] = {"": set()}
    files: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        files.setdefault(folder, []).append(name)
    for folder in files:
        while folder:
            parent, _, name = folder.rpartition("/")
            folders.setdefault(folder, set())
            folders.setdefault(parent, set()).add(name)
            folder = parent
    return {
        folder: (sorted(names, key=os.fsencode), sorted(files.get(folder, []), key=os.fsencode))
        for folder, names in folders.items()
    }
