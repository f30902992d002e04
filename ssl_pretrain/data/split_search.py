"""Find the splits of a data set by the names that people usually give them."""

import itertools
import os
import re
from collections.abc import Iterator

from ssl_pretrain.data.file_types import TABLE_SUFFIXES
from ssl_pretrain.data.folder_tree import DiskFolder, FolderTree, Location
from ssl_pretrain.data.messages import abbreviate

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
TRAIN, HELD_OUT = "train", "held out"
MAX_WRAPPERS = 6  # nested folders to open in search of the images
_PATTERNS = {
    TRAIN: re.compile(r"train(ing|set|val|imgs?|images?|data)?|trn"),
    HELD_OUT: re.compile(
        r"(val|valid|validation|dev|test|testing|eval|evaluation|holdout|heldout)"
        r"(set|imgs?|images?|data)?"
    ),
}


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" for a common name of that split, ignoring case."""
    name = name.strip().lower()
    return next((split for split, names in SPELLINGS.items() if name in names), None)


def split_of_file(name: str) -> str | None:
    """Return the split that a list or a zip is named after, or None."""
    stem, suffix = os.path.splitext(name)
    return split_of(stem) if suffix.lower() in (*TABLE_SUFFIXES, ".zip") else None


def suggested_split(name: str) -> str | None:
    """Return `TRAIN` or `HELD_OUT` if a word in the name suggests it, as in `images_val`."""
    words = words_in_name(name)
    return next((kind for kind in _PATTERNS if any(map(_PATTERNS[kind].fullmatch, words))), None)


def words_in_name(name: str) -> list[str]:
    """Return the lower-case words of a file name, without its suffix."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", os.path.splitext(name)[0])
    return [word.lower() for word in words]


def wrapper_folders(root: FolderTree) -> Iterator[FolderTree]:
    """Yield the root, then its only folder with images, then the only one in that, and so on."""
    folder = root
    yield folder
    for _ in range(MAX_WRAPPERS):
        if folder.has_direct_images:
            return
        names = list(itertools.islice(folder.folders_with_images(), 2))
        if len(names) != 1:
            return
        folder = folder.child(names[0])
        yield folder


def top_folder(root: FolderTree) -> FolderTree:
    """Return the first wrapper that contains a training split.

    If there is none, return the first wrapper with a folder whose name suggests a split. If there
    is no such folder either, return the innermost wrapper.
    """
    folders = list(wrapper_folders(root))
    for folder in folders:
        splits = [*map(split_of, folder.subfolder_names), *map(split_of_file, folder.file_names)]
        if "train" in splits:
            return folder
    candidates = (folder for folder in folders if any(map(suggested_split, folder.subfolder_names)))
    return next(candidates, folders[-1])


def split_locations(top: FolderTree, split: str, prefer_files: bool = False) -> list[Location]:
    """Return the folders named after a split, or the lists and zips if there are no folders.

    Args:
        top: The folder to search.
        split: "train", "val" or "test".
        prefer_files: Return lists and zips, and folders only if there are none.
    """
    names = [name for name in top.subfolder_names if split_of(name) == split]
    folders = [top.child(name).location() for name in names]
    names = [name for name in top.file_names if split_of_file(name) == split]
    files = [Location(top.path / name) for name in names if isinstance(top, DiskFolder)]
    return (files or folders) if prefer_files else (folders or files)


def folder_names(names: list[str]) -> str:
    """Return the first few folder names as text for messages."""
    return abbreviate([f"{name}/" for name in names])
