"""Guess which images of a data set are for training.

If no folder or list is named like a training split, all images are for training. A layout whose
names or structure suggest other splits is refused, because training on held-out images would
go unnoticed.
"""

import itertools
import os
from collections.abc import Iterator, Sequence

from ssl_pretrain.data.file_types import TABLE_SUFFIXES, is_image
from ssl_pretrain.data.folder_tree import FolderTree, Location, ZipFolder
from ssl_pretrain.data.split_search import (
    HELD_OUT,
    MAX_WRAPPERS,
    TRAIN,
    folder_names,
    split_locations,
    split_of,
    split_of_file,
    suggested_split,
    top_folder,
    words_in_name,
    wrapper_folders,
)

# Words in the names of tables that do not list images.
_RECORD_WORDS = frozenset({"log", "logs", "loss", "losses", "metrics", "result", "results"})
_FILE_SPLITS = ("train", "val", "test", None)  # order of preference among lists
_MAX_CHILDREN = 50  # subfolders that are searched per folder
_MAX_FOLDERS = 500  # folders that are searched in total
_MAX_FILES = 1000  # image names that are examined per folder
_MANY_CLASSES = 10  # among so many classes, one may be named like a split by chance

Guess = tuple[Location, list[str]]  # the training images, and notes on the choice


class AmbiguousSplits(ValueError):
    """A layout that suggests splits without naming them."""

    def __init__(self, reason: str, example: str = ""):
        example_text = f", as in {example}" if example else ""
        super().__init__(
            f"data.train: {reason}{example_text}, or give data.train=. if all images there are for "
            "training"
        )


def guess_training_split(root: FolderTree, val: str) -> Guess:
    """Return the location of the training images if the configuration does not name it.

    Args:
        root: The root of the data set.
        val: Name of the validation split in the configuration, or "".

    Raises:
        AmbiguousSplits: If held-out images might be among the guessed ones.
    """
    top = top_folder(root)
    locations = split_locations(top, "train")
    if len(locations) > 1:
        names = [os.path.basename(location.full_path) for location in locations]
        raise AmbiguousSplits(
            f"{top.full_path} contains {' and '.join(names)}; say which has the training images",
            f"data.train={names[0]}",
        )
    if not locations and any(split_of_file(name) == "train" for name in top.file_names):
        raise AmbiguousSplits(
            f"{top.full_path} contains lists of its splits, which are not read inside a zip; "
            "unpack it"
        )
    if not locations:
        return _all_images(root, top, val)
    if locations[0].is_file:
        return locations[0], []
    return _training_folder(root, top, locations[0], val)


def _training_folder(root: FolderTree, top: FolderTree, train: Location, val: str) -> Guess:
    """Return a folder called train, unless it might just as well be one class of several."""
    name = os.path.basename(train.full_path)
    folder = top.child(name)
    others = [other for other in top.subfolder_names if other != name]
    is_only_split = not any(
        split_of(other) or suggested_split(other) or other == val for other in others
    )
    num_classes = len(list(itertools.islice(folder.folders_with_images(), 2)))
    if is_only_split and num_classes < 2:
        siblings = [other for other in others if top.child(other).has_images()]
        if len(siblings) + 1 >= _MANY_CLASSES:
            return root.location(), [
                f"{train.full_path} is read as one of {len(siblings) + 1} classes; "
                f"give data.train={name} if it is the training split"
            ]
        if siblings:
            raise AmbiguousSplits(
                f"{top.full_path} contains {name}/ next to {folder_names(siblings)}, so it may be "
                "the training split or one class of several; say which",
                f"data.train={name}",
            )
    _check_inner_splits(folder, f"{name}/")
    unread = [other for other in others if not split_of(other) and other != val]
    return train, [f"not read: {folder_names(unread)} in {top.full_path}"] if unread else []


def _all_images(root: FolderTree, top: FolderTree, val: str) -> Guess:
    """Return all images below the root, without the held-out splits."""
    names = [name for name in top.subfolder_names if name != val]
    held_out = [name for name in names if split_of(name)]
    split_like = [name for name in names if not split_of(name) and suggested_split(name)]
    if not held_out and not split_like:
        _check_structure(root, top)
        return root.location(), []
    others = [name for name in names if name not in (*held_out, *split_like)]
    num_classes = sum(top.child(name).has_images() for name in others) + len(split_like)
    if split_like and len(split_like) * _MANY_CLASSES > num_classes:
        raise AmbiguousSplits(
            f"{top.full_path} contains {folder_names([*held_out, *split_like])}, whose names look "
            "like splits; say which is which",
            _example_settings([*held_out, *split_like]),
        )
    notes = [f"{name}/ is read as one of {num_classes} classes" for name in split_like]
    if not held_out:
        return root.location(), notes
    if not num_classes and not top.has_direct_images:
        raise AmbiguousSplits(
            f"{top.full_path} contains {folder_names(held_out)} and no training images; "
            "say where they are",
            "data.train=FOLDER",
        )
    folders = folder_names(held_out)
    notes.append(f"held out: {folders} in {top.full_path}; everything else there is for training")
    return top.location(tuple(held_out)), notes


def _example_settings(names: list[str]) -> str:
    """Return example settings for these folders, all of which look like splits."""
    train = [name for name in names if not split_of(name) and suggested_split(name) == TRAIN]
    held_out = [name for name in names if name not in train]
    return " ".join(
        [f"data.train={name}" for name in train[:1]] + [f"data.val={name}" for name in held_out[:1]]
    )


def _check_structure(root: FolderTree, top: FolderTree) -> None:
    """Raise AmbiguousSplits if folders, lists or images suggest splits below the top folder."""
    relative = "" if top is root else f"{os.path.relpath(top.full_path, root.full_path)}/"
    _check_inner_splits(top, relative)
    _check_same_classes(top)
    for wrapper in wrapper_folders(root):
        for folder in (wrapper, *_folders_without_images(wrapper)):
            _check_lists(root, folder)
    kinds: dict[str, str] = {}
    for name in top.file_names[:: max(1, len(top.file_names) // _MAX_FILES)]:
        if (kind := suggested_split(name)) and is_image(name):
            kinds.setdefault(kind, name)
    if len(kinds) > 1:
        names = ", ".join(sorted(kinds.values()))
        raise AmbiguousSplits(
            f"{top.full_path} contains images whose names look like splits ({names}); "
            "list those of each split",
            "data.train=LIST data.val=LIST",
        )


def _check_inner_splits(folder: FolderTree, prefix: str) -> None:
    """Raise AmbiguousSplits if folders inside this one are named like splits."""
    if splits := find_inner_splits(folder):
        train, held_out = splits
        raise AmbiguousSplits(
            f"{folder.full_path} has splits inside its folders ({train}/, {held_out}/); "
            "name them, or a list of the training images",
            f"data.train={prefix}{train} data.val={prefix}{held_out}",
        )


def find_inner_splits(top: FolderTree) -> tuple[str, str] | None:
    """Return the paths of a training and a held-out folder in the same folder below `top`."""
    queue = [("", top, 0)]
    for path, folder, depth in queue:  # the queue grows, nearest folders first
        kinds = {suggested_split(name): name for name in reversed(folder.subfolder_names)}
        if kinds.keys() >= {TRAIN, HELD_OUT} and folder.child(kinds[TRAIN]).has_images():
            return path + kinds[TRAIN], path + kinds[HELD_OUT]
        if depth < MAX_WRAPPERS and len(queue) < _MAX_FOLDERS:
            names = folder.subfolder_names[:_MAX_CHILDREN]
            queue += [(f"{path}{name}/", folder.child(name), depth + 1) for name in names]
    return None


def _check_same_classes(top: FolderTree) -> None:
    """Raise AmbiguousSplits if folders have the same subfolders, as splits of one data set do."""
    if top.has_direct_images or not 2 <= len(top.subfolder_names) < _MANY_CLASSES:
        return
    folders = list(top.folders_with_images())
    classes = [set(top.child(name).subfolder_names) for name in folders]
    all_classes = max(classes, key=len, default=set())
    shared = sorted(all_classes.intersection(*classes))
    if len(folders) >= 2 and len(shared) >= 2 and all(names <= all_classes for names in classes):
        raise AmbiguousSplits(
            f"{top.full_path} contains {folder_names(folders)} with the same folders in each "
            f"({folder_names(shared)}), so they may be splits; say which is which",
            f"data.train={folders[0]} data.val={folders[1]}",
        )


def _folders_without_images(folder: FolderTree) -> Iterator[FolderTree]:
    """Yield the subfolders without images, and the folders in them."""
    for name in folder.subfolder_names[:_MAX_CHILDREN]:
        child = folder.child(name)
        if not child.has_images():
            yield child
            yield from (child.child(inner) for inner in child.subfolder_names[:_MAX_CHILDREN])


def _check_lists(root: FolderTree, folder: FolderTree) -> None:
    """Raise AmbiguousSplits if files in a folder look like lists of splits."""
    kinds = _lists_by_kind(folder.file_names)
    if len(kinds) < 2:
        return
    reason = f"{folder.full_path} contains lists whose names look like splits"
    if isinstance(root, ZipFolder):
        raise AmbiguousSplits(f"{reason}, which are not read inside a zip; unpack it")
    relative = os.path.relpath(folder.full_path, root.full_path)
    train, held_out = (
        os.path.normpath(os.path.join(relative, kinds[kind])) for kind in (TRAIN, HELD_OUT)
    )
    if train == held_out:
        train, held_out = "LIST", "LIST"
    raise AmbiguousSplits(
        f"{reason}; say which images are for training", f"data.train={train} data.val={held_out}"
    )


def _lists_by_kind(files: Sequence[str]) -> dict[str, str]:
    """Return the names of the lists of training and of held-out images, if there are any.

    The keys are `TRAIN` and `HELD_OUT`. Both may name the same file.
    """
    tables = [name for name in files if name.lower().endswith(TABLE_SUFFIXES)]
    kinds: dict[str, str] = {}
    for name in sorted(tables, key=lambda name: (_FILE_SPLITS.index(split_of_file(name)), name)):
        words = words_in_name(name)
        if _RECORD_WORDS.isdisjoint(words):
            for kind in filter(None, map(suggested_split, words)):
                kinds.setdefault(kind, name)
    return kinds
