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
    entry_type,
    is_array,
    is_picture,
    sample_has_image,
)
from ssl_pretrain.data.zip_archive import list_zip, read_table

_MAX_DEPTH = 12  # levels below a folder that are searched for images

# Sorted names by type of entry. The types are "folder", "file" and the reasons to skip an entry.
Entries = dict[str, list[str]]


@dataclass(frozen=True)
class Location:
    """Location of a split, which is a folder, a zip, a folder inside a zip, or a list file."""

    path: Path
    folder_in_zip: str = ""  # path of the folder inside the zip
    excluded_folders: tuple[str, ...] = ()  # subfolders that do not belong to the split

    @property
    def full_path(self) -> str:
        """Path for messages, including the path inside a zip."""
        return os.path.join(self.path, self.folder_in_zip) if self.folder_in_zip else str(self.path)

    @property
    def is_list(self) -> bool:
        """True if the location is a list file."""
        return self.path.suffix.lower() in TABLE_SUFFIXES and not self.path.is_dir()

    @property
    def is_file(self) -> bool:
        """True if the location is a list file or a whole zip."""
        return not self.folder_in_zip and self.path.is_file()


class FolderTree(ABC):
    """A folder and its subfolders, without hidden and system entries."""

    path: Path  # path of the folder, or of the zip
    folder_in_zip: str = ""  # path of the folder inside the zip

    @property
    def full_path(self) -> str:
        """Path for messages, including the path inside a zip."""
        return self.location().full_path

    @property
    def subfolder_names(self) -> list[str]:
        """Names of the subfolders, sorted by bytes.

        Raises:
            ValueError: If the folder cannot be listed.
        """
        return self._entries["folder"]

    @property
    def file_names(self) -> list[str]:
        """Names of the folder's files, sorted by bytes. Zips only list images and tables."""
        return self._entries["file"]

    @property
    @abstractmethod
    def _entries(self) -> Entries: ...

    @property
    @abstractmethod
    def has_direct_images(self) -> bool:
        """True if the folder itself contains an image."""

    @abstractmethod
    def child(self, name: str) -> FolderTree:
        """Return the subfolder `name`, without checking that it exists."""

    @abstractmethod
    def parent(self) -> FolderTree:
        """Return the parent folder. The top folder of a zip is its own parent."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of the file `name`. Raise OSError if it cannot be read."""

    def has_images(self, depth: int = _MAX_DEPTH) -> bool:
        """Return True if the folder or a subfolder at most `depth` levels below has an image."""
        if self.has_direct_images:
            return True
        subfolders = map(self.child, self.subfolder_names if depth > 0 else [])
        return any(subfolder.has_images(depth - 1) for subfolder in subfolders)

    def folders_with_images(self) -> Iterator[str]:
        """Yield the names of the subfolders that contain an image at any depth."""
        return (name for name in self.subfolder_names if self.child(name).has_images())

    def location(self, excluded_folders: tuple[str, ...] = ()) -> Location:
        """Return the folder's location as a split without the excluded subfolders."""
        return Location(self.path, self.folder_in_zip, excluded_folders)

    def descendant(self, path: str) -> FolderTree:
        """Return the folder at a relative path. An empty path stands for the folder itself."""
        folder = self
        for name in filter(None, path.split("/")):
            folder = folder.child(name)
        return folder


class DiskFolder(FolderTree):
    """A folder on disk.

    Args:
        path: Path of the folder.
        top: Folder of the data set, if it is another one. If there are pictures below it, arrays
            are not images.
    """

    def __init__(self, path: Path, top: DiskFolder | None = None):
        self.path, self._top = path, top or self

    @functools.cached_property
    def _entries(self) -> Entries:
        entries: Entries = {"folder": [], "file": []}
        try:
            with os.scandir(self.path) as scan:
                for entry in scan:
                    entries.setdefault(entry_type(entry), []).append(entry.name)
        except OSError as error:
            raise ValueError(
                f"data.root: {self.path} cannot be listed: {error.strerror}; check that the "
                "folder exists and can be read"
            ) from None
        return {kind: sorted(names, key=os.fsencode) for kind, names in entries.items()}

    @functools.cached_property
    def has_direct_images(self) -> bool:
        """True if a file has an image suffix, or a sampled file starts with an image signature."""
        if self._has_direct_pictures:
            return True
        return any(map(is_array, self.file_names)) and not self._top.has_pictures

    @functools.cached_property
    def has_pictures(self) -> bool:
        """True if the folder contains an image that is not a .npy, at any depth."""
        return self._search_pictures(_MAX_DEPTH)

    def _search_pictures(self, depth: int) -> bool:
        if self._has_direct_pictures:
            return True
        subfolders = map(self.child, self.subfolder_names if depth > 0 else [])
        return any(subfolder._search_pictures(depth - 1) for subfolder in subfolders)

    @functools.cached_property
    def _has_direct_pictures(self) -> bool:
        names = self.file_names
        return any(map(is_picture, names)) or sample_has_image(
            [os.path.join(self.path, name) for name in names if not is_array(name)]
        )

    def child(self, name: str) -> DiskFolder:
        """Return the subfolder `name`, without checking that it exists."""
        return DiskFolder(self.path / name, self._top)

    def parent(self) -> DiskFolder:
        """Return the parent folder."""
        return DiskFolder(self.path.parent)

    def read(self, name: str) -> bytes:
        """Return the content of the file `name`. Raise OSError if it cannot be read."""
        return (self.path / name).read_bytes()


class ZipFolder(FolderTree):
    """A folder inside a zip."""

    def __init__(self, path: Path, index: dict[str, Entries], folder_in_zip: str = ""):
        self.path, self.folder_in_zip, self._index = path, folder_in_zip, index

    @property
    def _entries(self) -> Entries:
        return self._index.get(self.folder_in_zip, {"folder": [], "file": []})

    @property
    def has_direct_images(self) -> bool:
        """True if the folder itself contains a file that is not a table."""
        return any(not name.lower().endswith(TABLE_SUFFIXES) for name in self.file_names)

    def child(self, name: str) -> ZipFolder:
        """Return the subfolder `name`, without checking that it exists."""
        return ZipFolder(self.path, self._index, os.path.join(self.folder_in_zip, name))

    def parent(self) -> ZipFolder:
        """Return the parent folder. The top folder of a zip is its own parent."""
        return ZipFolder(self.path, self._index, os.path.dirname(self.folder_in_zip))

    def read(self, name: str) -> bytes:
        """Return the content of the table `name`. Raise OSError if it is damaged or too large."""
        return read_table(self.path, os.path.join(self.folder_in_zip, name))


def open_tree(root: Path, cache_dir: Path) -> FolderTree:
    """Return the tree of the folder or zip at `root`. For a list file, use its folder."""
    if root.suffix.lower() == ".zip" and root.is_file():
        listing = list_zip(root, cache_dir)
        return ZipFolder(root, _entries_by_folder([*listing.paths(), *listing.tables]))
    return DiskFolder(root if root.is_dir() else root.parent)


def _entries_by_folder(paths: list[str]) -> dict[str, Entries]:
    """Return the entries of each folder, given the paths of all files in a zip."""
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
