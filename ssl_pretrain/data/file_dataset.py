"""Open a data set of image files: its training and validation splits, with their labels.

`data.train` and `data.val` name the splits. If a key is empty, its split is found by one of the
usual names, ignoring case: train, training; val, valid, validation, dev; test. The search covers
the top folder of the data set, inside any folders that only wrap it.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ssl_pretrain.data.caption_texts import PackedCaptions
from ssl_pretrain.data.file_lists import FileList, read_list
from ssl_pretrain.data.file_types import TABLE_SUFFIXES
from ssl_pretrain.data.folder_tree import DiskFolder, FolderTree, Location, ZipFolder, open_tree
from ssl_pretrain.data.image_source import ImageFiles, NoSuchSplit
from ssl_pretrain.data.labels import SplitFolder, label_images
from ssl_pretrain.data.listing import Listing, list_folder
from ssl_pretrain.data.pixels import RGB, PixelFormat
from ssl_pretrain.data.split_guess import AmbiguousSplits, find_inner_splits, guess_training_split
from ssl_pretrain.data.split_search import (
    folder_names,
    split_locations,
    split_of,
    top_folder,
    wrapper_folders,
)
from ssl_pretrain.data.zip_archive import list_zip

_MAX_REASONS = 8  # number of reasons for skipped files that a note lists
_VAL_REMEDY = (
    "name the one that contains the validation images, or leave out evaluations that need them"
)

SplitName = Literal["train", "val"]


class FileDataSet:
    """A folder, a zip or a list of image files.

    Args:
        root: Path of the folder, zip or list file.
        train: Value of `data.train`, which names the training split.
        val: Value of `data.val`, which names the validation split.
        cache_dir: Folder for cached listings.
        pixel_format: Number of channels and range of the images.
        caption_column: Value of `data.caption_column`, for lists.
    """

    def __init__(
        self,
        root: Path,
        train: str,
        val: str,
        cache_dir: Path,
        pixel_format: PixelFormat = RGB,
        caption_column: str = "",
    ):
        self.root = root
        self.splits = _find_splits(root, train, val, cache_dir)
        self._cache_dir = cache_dir
        self._pixel_format = pixel_format
        self._caption_column = caption_column

    def open_split(self, split: SplitName, classes: list[str] | None) -> ImageFiles:
        """Return the images of a split with their labels.

        Args:
            split: "train" or "val".
            classes: Classes of the training split, or None to open the training split itself.

        Raises:
            NoSuchSplit: If there is no validation split.
            ValueError: If the split is ambiguous, empty or unreadable.
        """
        is_train = split == "train"
        location = self.splits.train if is_train else self.splits.val
        if location is None and is_train:
            raise ValueError(self.splits.train_error)
        if location is None:
            raise (ValueError if self.splits.train_error else NoSuchSplit)(self.splits.val_error)
        name = "train" if is_train else self.splits.val_name
        is_root = location.path == self.root and not location.folder_in_zip
        file_list = self._list_images(location, name, "data.root" if is_root else f"data.{split}")
        path, skipped_notes = location.full_path, _skipped_notes(file_list.files)
        if not len(file_list.files):
            reason = f"data.root: {path} contains no image that Pillow can decode, at any depth; "
            reason += "give the folder of your images"
            raise ValueError("; ".join([reason, *skipped_notes]))
        folder = SplitFolder(
            name,
            file_list.files.paths(),
            tree=open_tree(location.path, self._cache_dir).descendant(location.folder_in_zip),
            root=open_tree(self.root, self._cache_dir),
            full_path=path,
        )
        labels, classes, label_notes = label_images(folder, file_list.labels, classes)
        captions = file_list.captions
        packed_captions = PackedCaptions.pack(captions) if captions is not None else None
        source = ImageFiles(
            path, file_list.files, labels, classes, self._pixel_format, packed_captions
        )
        split_notes = self.splits.notes if is_train else []
        source.notes = [*split_notes, *file_list.notes, *label_notes, *skipped_notes]
        return source

    def _list_images(self, location: Location, split: str, key: str) -> FileList:
        """List the images at a location. Only a list file also contains their labels."""
        path = location.path
        if location.is_list:
            root = self.root if self.root.is_dir() else None
            return read_list(path, split, self._cache_dir, key, root, self._caption_column)
        if path.is_dir():
            files = list_folder(path, self._cache_dir)
        elif path.suffix.lower() == ".zip":
            files = list_zip(path, self._cache_dir)
        else:
            raise ValueError(
                f"{key}: {path} is a file of an unsupported kind; give a folder, a .zip, or a list "
                "of files (.csv, .tsv, .txt)"
            )
        return FileList(_select_files(files, location), labels=None)


def _select_files(files: Listing, location: Location) -> Listing:
    """Return the files inside a location, without those in its excluded folders."""
    prefix = f"{location.folder_in_zip}/" if location.folder_in_zip else ""
    excluded_prefixes = tuple(f"{prefix}{name}/" for name in location.excluded_folders)
    if not prefix and not excluded_prefixes:
        return files
    indices = [
        index
        for index, path in enumerate(files.paths())
        if path.startswith(prefix) and not path.startswith(excluded_prefixes)
    ]
    return files.take(indices, location.folder_in_zip)


def _skipped_notes(files: Listing) -> list[str]:
    """Return a note on the files that are not read, if any, with the most frequent reason first."""
    reasons = sorted(files.skipped, key=lambda skipped: -skipped.num_files)
    if not reasons:
        return []
    descriptions = [
        f"{skipped.num_files:,} {skipped.reason} (first: {skipped.first_path})"
        for skipped in reasons[:_MAX_REASONS]
    ]
    num_more = sum(skipped.num_files for skipped in reasons[_MAX_REASONS:])
    ending = f", and {num_more:,} more" if num_more else ""
    return [f"left out in {files.root}: {', '.join(descriptions)}{ending}"]


@dataclass(frozen=True)
class Splits:
    """The splits of a data set, or the reasons why they are missing."""

    train: Location | None
    val: Location | None = None
    val_name: str = "val"  # "test" if only test images are held out
    train_error: str = ""  # reason why there is no training split, with the remedy
    val_error: str = ""  # reason why there is no validation split, with the remedy
    notes: list[str] = field(default_factory=list)


def _find_splits(root: Path, train: str, val: str, cache_dir: Path) -> Splits:
    """Find the splits of a data set.

    Args:
        root: Path of a folder, a zip or a list file.
        train: Path of the training split, which is a folder, list or zip, absolute or relative to
            root. "." means root itself. If it is empty, the split is found by its name.
        val: Path of the validation split, given like `train`, or "none" if there is none.
        cache_dir: Folder for cached listings.
    """
    base = open_tree(root, cache_dir)
    splits = _find_train(root, base, train, val)
    if val == "none":
        return replace(
            splits, val_error=f"data.val: {root} has no validation split, because data.val is none"
        )
    if val:
        return _add_named_val(splits, base, val)
    return splits if splits.val_error else _add_usual_val(splits, root, base, cache_dir)


def _find_train(root: Path, base: FolderTree, train: str, val: str) -> Splits:
    """Find the training split, or the reason why there is none."""
    if train in (".", "./"):
        return Splits(
            Location(root),
            val_error=f"data.val: {root} has no validation split, because data.train=. uses all "
            "images for training",
        )
    if train:
        location = _find_named(base, train)
        if location is not None:
            return Splits(location, notes=[] if val else _inner_split_notes(base, location))
        return Splits(
            None,
            train_error=f"data.train: {base.full_path} has no folder or list {train!r}"
            f"{_existing_folders(base)}; name the one that contains the training images",
        )
    if root.is_file() and isinstance(base, DiskFolder):
        return Splits(Location(root))
    try:
        location, notes = guess_training_split(base, val)
    except AmbiguousSplits as error:
        return Splits(None, train_error=str(error))
    return Splits(location, notes=notes)


def _inner_split_notes(base: FolderTree, train: Location) -> list[str]:
    """Return a note if the folder that `data.train` names has splits inside its folders."""
    if train.is_file:
        return []
    folder = base.descendant(train.folder_in_zip) if train.folder_in_zip else DiskFolder(train.path)
    if (inner := find_inner_splits(folder)) is None:
        return []
    return [
        f"{train.full_path} has splits inside its folders ({folder_names(list(inner))}), and all "
        "of them are for training"
    ]


def _add_named_val(splits: Splits, base: FolderTree, val: str) -> Splits:
    """Add the validation split that the configuration names."""
    location = _find_named(base, val)
    if location is None:
        return replace(
            splits,
            val_error=f"data.val: {base.full_path} has no folder or list {val!r}"
            f"{_existing_folders(base)}; {_VAL_REMEDY}",
        )
    train = splits.train
    if train is not None and not train.is_list and not location.is_list:
        relative = os.path.relpath(location.full_path, train.full_path)
        is_inside = location.full_path.startswith(train.full_path + os.sep)
        if is_inside and relative not in train.excluded_folders:
            train = replace(train, excluded_folders=(*train.excluded_folders, relative))
    val_name = split_of(Path(val).stem) or "val"
    return replace(splits, train=train, val=location, val_name=val_name, val_error="")


def _add_usual_val(splits: Splits, root: Path, base: FolderTree, cache_dir: Path) -> Splits:
    """Add the validation split that has one of the usual names."""
    train = splits.train
    is_list = train is not None and train.is_list
    if train is not None and is_list:
        file_list = read_list(train.path, "train", cache_dir, root=root if root.is_dir() else None)
        if file_list.has_split_column:
            return replace(splits, val=train)
    top = top_folder(base)
    locations = split_locations(top, "val", is_list) or split_locations(top, "test", is_list)
    locations = [location for location in locations if location != train]
    names = [os.path.basename(location.full_path) for location in locations]
    if len(locations) > 1:
        return replace(
            splits,
            val_error=f"data.val: {top.full_path} contains {' and '.join(names)}; choose the one "
            f"with the validation images, as in data.val={names[0]}",
        )
    if not locations:
        return replace(
            splits,
            val_error=f"data.val: {base.full_path} has no folder or list for validation, such as "
            f"val/{_existing_folders(base)}; {_VAL_REMEDY}",
        )
    return replace(splits, val=locations[0], val_name=split_of(Path(names[0]).stem) or "val")


def _find_named(base: FolderTree, name: str) -> Location | None:
    """Find a folder, list or zip by its name in the configuration.

    The name is absolute, or relative to the root or a folder that wraps the data set.
    """
    path = Path(name).expanduser()
    if path.is_absolute():
        is_list_or_zip = path.is_file() and path.suffix.lower() in (*TABLE_SUFFIXES, ".zip")
        return Location(path) if path.is_dir() or is_list_or_zip else None
    name = os.path.normpath(name)
    for folder in wrapper_folders(base):
        if isinstance(folder, ZipFolder):
            if folder.child(name).has_images():
                return folder.child(name).location()
        elif (folder.path / name).exists():
            return Location(folder.path / name)
    return None


def _existing_folders(base: FolderTree) -> str:
    """Return the part of an error message that lists the existing folders."""
    top = top_folder(base)
    subject = "it" if top is base else top.full_path
    return f"; {subject} has {folder_names(top.subfolder_names)}" if top.subfolder_names else ""
