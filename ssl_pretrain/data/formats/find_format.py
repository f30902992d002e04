"""Recognize a data set that does not consist of image files, by the names of its files."""

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.file_types import is_picture
from ssl_pretrain.data.folder_tree import DiskFolder
from ssl_pretrain.data.formats import idx_files, numpy_files, published_archives, table_files
from ssl_pretrain.data.formats.cifar_files import open_cifar
from ssl_pretrain.data.formats.stl10_files import open_stl10
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_search import split_of_file

OpenSplit = Callable[[str], Source]  # opens "train" or "val"
_NUM_FIRST_ENTRIES = 1000
FILE_SUFFIXES = (".npy", ".npz", *table_files.SUFFIXES)


def find_format(config: DataConfig, cache_dir: Path, split: str) -> Callable[[], Source] | None:
    """Return a function that opens a split, or None if the data set holds image files.

    Raises:
        ValueError: If the data set cannot be downloaded.
    """
    path = _named_file(config, split)
    if path is not None:
        config, split = replace(config, root=str(path), train="", val="none"), "train"
    open_split = _find(config, cache_dir)
    return partial(open_split, split) if open_split is not None else None


def _named_file(config: DataConfig, split: str) -> Path | None:
    """Return the file that `data.train` or `data.val` names, if it is not one of image files."""
    name = Path(config.train if split == "train" else config.val).expanduser()
    root = Path(config.root).expanduser()
    path = (root if root.is_dir() else root.parent) / name
    return path if name.suffix.lower() in FILE_SUFFIXES and path.is_file() else None


def _find(config: DataConfig, cache_dir: Path) -> OpenSplit | None:
    root = Path(config.root).expanduser()
    if config.source == "huggingface" and not root.exists():
        return partial(table_files.open_hub, config)
    if config.source in ("cifar100", "stl10") and not config.root:
        archive = published_archives.download(config.source, cache_dir)
        return _open_published(config.source, archive, config, cache_dir)
    if not config.root or not root.exists():
        return None
    find = _find_file_format if root.is_file() else _find_folder_format
    return find(root, config, cache_dir)


def _find_file_format(root: Path, config: DataConfig, cache_dir: Path) -> OpenSplit | None:
    suffix = root.suffix.lower()
    if suffix in (".npy", ".npz"):
        return partial(numpy_files.open_numpy, root, config, cache_dir)
    if suffix in table_files.SUFFIXES:
        return partial(table_files.open_tables, root, config, cache_dir)
    if idx_files.is_idx_images(root):
        return _without_columns(partial(idx_files.open_idx, root, config, cache_dir), root, config)
    published = published_archives.find_archive(root, config.source)
    return _open_published(*published, config, cache_dir) if published is not None else None


def _find_folder_format(root: Path, config: DataConfig, cache_dir: Path) -> OpenSplit | None:
    published = published_archives.find_archive(root, config.source)
    if published is not None and not (config.source == published[0] == "cifar10"):
        return _open_published(*published, config, cache_dir)
    if table_files.is_saved(root):
        return partial(table_files.open_tables, root, config, cache_dir)
    if _has_pictures(root):  # arrays and tables may lie beside them
        return None
    if table_files.has_shards(root):
        return partial(table_files.open_tables, root, config, cache_dir)
    if (idx_folder := idx_files.find_idx_folder(root)) is not None:
        return _without_columns(
            partial(idx_files.open_idx, idx_folder, config, cache_dir), root, config
        )
    if numpy_files.holds_many_images(root):
        return partial(numpy_files.open_numpy, root, config, cache_dir)
    npz_paths = sorted(root.glob("*.npz"))
    if len(npz_paths) == 1:
        return partial(numpy_files.open_numpy, npz_paths[0], config, cache_dir)
    if npz_paths and not (config.train or config.val):
        names = abbreviate([path.name for path in npz_paths])
        raise ValueError(
            f"data.root: {root} contains {len(npz_paths)} data sets ({names}); give one of them, "
            f"as in data.root={npz_paths[0]}"
        )
    return None


def _has_pictures(root: Path) -> bool:
    """Return True if a folder contains images at any depth, or a list or zip of a split.

    A .npy does not count, because it may be an array of many images.

    A folder of a million images is recognized by the first of them.
    """
    with os.scandir(root) as scan:
        if any(is_picture(entry.name) for entry in itertools.islice(scan, _NUM_FIRST_ENTRIES)):
            return True
    folder = DiskFolder(root)
    return any(map(split_of_file, folder.file_names)) or folder.has_pictures


def _open_published(name: str, path: Path, config: DataConfig, cache_dir: Path) -> OpenSplit:
    if name == "stl10":
        return _without_columns(partial(open_stl10, path, config, cache_dir), path, config)
    return partial(open_cifar, path, name, config, cache_dir)


def _without_columns(open_split: OpenSplit, root: Path, config: DataConfig) -> OpenSplit:
    """Refuse names of columns for files that have none."""
    for key in ("image_column", "label_column"):
        value = getattr(config, key)
        if value and (key, value) != ("label_column", "none"):
            raise ValueError(
                f"data.{key}: {root} has no columns, so {value!r} names none; leave it out"
            )
    return open_split
