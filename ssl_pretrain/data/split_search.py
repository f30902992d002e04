"""Search the folders of a data set for splits by their usual names."""

import itertools
import os
from collections.abc import Iterator

from ssl_pretrain.data.file_types import TABLE_SUFFIXES
from ssl_pretrain.data.folder_tree import DiskFolder, FolderTree, Location
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_names import split_of, suggested_split

MAX_WRAPPERS = 6


def wrappers(base: FolderTree) -> Iterator[FolderTree]:
    """Yield the root, then the only folder in it that holds images, the only one in that, etc."""
    yield base
    for _ in range(MAX_WRAPPERS):
        if base.has_direct_images:
            return
        names = list(itertools.islice(base.folders_with_images(), 2))
        if len(names) != 1:
            return
        base = base.child(names[0])
        yield base


def top_folder(base: FolderTree) -> FolderTree:
    """Return the first wrapper that holds a training split.

    Without one, the first with a name that suggests a split, and else the innermost wrapper.
    """
    folders = list(wrappers(base))
    for folder in folders:
        if any(split_of(name) == "train" for name in folder.folders) or any(
            split_of_file(name) == "train" for name in folder.files
        ):
            return folder
    suggestive = (folder for folder in folders if any(map(suggested_split, folder.folders)))
    return next(suggestive, folders[-1])


def split_of_file(name: str) -> str | None:
    """Return the split that a list or a zip holds by its name."""
    stem, suffix = os.path.splitext(name)
    return split_of(stem) if suffix.lower() in (*TABLE_SUFFIXES, ".zip") else None


def split_locations(top: FolderTree, split: str, prefer_files: bool = False) -> list[Location]:
    """Return the folders named like a split. If there are none, the lists and zips.

    Args:
        top: The folder to search.
        split: "train", "val" or "test".
        prefer_files: Return lists and zips first, and folders if there are none.
    """
    folders = [top.child(name).location() for name in top.folders if split_of(name) == split]
    files = [name for name in top.files if split_of_file(name) == split]
    locations = [Location(top.path / name) for name in files if isinstance(top, DiskFolder)]
    return (locations or folders) if prefer_files else (folders or locations)


def folder_names(names: list[str]) -> str:
    """Name the first few folders, for messages."""
    return abbreviate([f"{name}/" for name in names])
