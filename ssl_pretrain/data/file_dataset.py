"""A data set of image files, with its splits and labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ssl_pretrain.data.file_lists import FileList, open_list
from ssl_pretrain.data.folder_tree import Location, open_tree
from ssl_pretrain.data.image_source import ImageFiles, NoSuchSplit
from ssl_pretrain.data.labels import SplitFolder, label_images
from ssl_pretrain.data.listing import Listing, list_folder
from ssl_pretrain.data.pixels import Range
from ssl_pretrain.data.splits import Splits, find_splits
from ssl_pretrain.data.zip_archive import list_zip

_REASONS_SHOWN = 8  # reasons for skipped files that a note lists

SplitName = Literal["train", "val"]


class FileDataSet:
    """A folder, a zip or a list of image files.

    Args:
        root: The folder, zip or list file.
        train: `data.train`, the training split.
        val: `data.val`, the validation split.
        cache: Folder for cached listings.
        value_range: `data.range`.
    """

    def __init__(self, root: Path, train: str, val: str, cache: Path, value_range: Range | None):
        self.root = root
        self.splits: Splits = find_splits(root, train, val, cache)
        self._cache = cache
        self._value_range = value_range

    def open_split(self, split: SplitName, classes: list[str] | None) -> ImageFiles:
        """Return the images of a split with their labels.

        Args:
            split: "train" or "val".
            classes: Classes of the training split. None for the training split itself.

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
        is_root = location.path == self.root and not location.within
        images = self._list_images(location, name, "data.root" if is_root else f"data.{split}")
        path, skipped_notes = location.full_path, _skipped_notes(images.files)
        if not len(images.files):
            reason = f"data.root: {path} holds no image that Pillow decodes, at any depth"
            raise ValueError("; ".join([reason, *skipped_notes]))
        tree = open_tree(location.path, self._cache).descendant(location.within)
        root = open_tree(self.root, self._cache)
        folder = SplitFolder(name, images.files.paths(), tree, root, path)
        labels = label_images(folder, images.labels if location.is_list else None, classes)
        source = ImageFiles(path, images.files, labels.numbers, labels.classes, self._value_range)
        split_notes: Sequence[str] = self.splits.notes if is_train else ()
        source.notes = [*split_notes, *images.notes, *labels.notes, *skipped_notes]
        return source

    def _list_images(self, location: Location, split: str, key: str) -> FileList:
        """List the images at a location. Only a list file gives labels."""
        path = location.path
        if location.is_list:
            root = self.root if self.root.is_dir() else None
            return open_list(path, split, self._cache, key, root)
        if path.is_dir():
            files = list_folder(path, self._cache)
        elif path.suffix.lower() == ".zip":
            files = list_zip(path, self._cache)
        else:
            raise ValueError(
                f"{key}: {path} is neither a folder, a .zip, nor a list of files (.csv, .tsv, .txt)"
            )
        return FileList(_select(files, location), [])


def _select(files: Listing, location: Location) -> Listing:
    """Return the files inside a location, without those in its excluded folders."""
    prefix = f"{location.within}/" if location.within else ""
    excluded = tuple(f"{prefix}{name}/" for name in location.excluded)
    if not prefix and not excluded:
        return files
    indices = [
        index
        for index, path in enumerate(files.paths())
        if path.startswith(prefix) and not path.startswith(excluded)
    ]
    return files.take(indices, location.within)


def _skipped_notes(files: Listing) -> list[str]:
    """Return a note on the files that are not read, the most frequent reason first."""
    reasons = sorted(files.skipped, key=lambda skipped: -skipped.count)
    if not reasons:
        return []
    descriptions = [
        f"{skipped.count:,} {skipped.reason} (first: {skipped.first})"
        for skipped in reasons[:_REASONS_SHOWN]
    ]
    num_more = sum(skipped.count for skipped in reasons[_REASONS_SHOWN:])
    more = f", and {num_more:,} more" if num_more else ""
    return [f"left out in {files.root}: {', '.join(descriptions)}{more}"]
