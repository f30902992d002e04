"""Find the shards of a split by names: a pattern, one tar, or a folder with tars, also by URL."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ssl_pretrain.data.file_types import TABLE_SUFFIXES, is_picture, is_skipped
from ssl_pretrain.data.image_source import NoSuchSplit
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_search import split_of, words_in_name
from ssl_pretrain.data.tar import remote_store
from ssl_pretrain.data.tar.remote_errors import printable_url
from ssl_pretrain.data.tar.remote_store import is_remote
from ssl_pretrain.data.tar.shard_patterns import (
    expand_braces,
    folder_of,
    is_pattern,
    join,
    path_of,
    refuse_compressed,
)

# Files that are read on this machine, but not from a store.
_LOCAL_SUFFIXES = (".zip", ".beton", ".parquet", ".arrow", ".npy", ".npz", *TABLE_SUFFIXES)


@dataclass(frozen=True)
class ShardSet:
    """The shards of a split."""

    name: str  # folder, pattern or file, for messages
    paths: list[str]
    folders: list[str]  # folders to search for the names of the classes


def find_shards(root: str, train: str, val: str, split: str) -> ShardSet | None:
    """Return the shards of a split, or None if the data set does not consist of shards.

    Args:
        root: The setting `data.root`.
        train: The setting `data.train`.
        val: The setting `data.val`.
        split: "train" or "val".

    Raises:
        NoSuchSplit: If the data set consists of shards, and none of them are for validation.
        ValueError: If the names are ambiguous, or no shard has them.
    """
    root, name = os.path.expanduser(root), os.path.expanduser(train if split == "train" else val)
    if split == "val" and name == "none":
        if find_shards(root, train, "", "train") is None:
            return None
        raise NoSuchSplit(
            f"data.val: {printable_url(root)} has no validation split, because data.val is none"
        )
    if name:
        return _find_named(root, name, split)
    if is_pattern(root):
        if split == "train":
            return _from_pattern(root, "data.root")
        raise _no_validation(root)
    if not root and train and split == "val" and _find_named(root, train, "train") is not None:
        raise _no_validation(train)
    if train in (".", "./") and split == "val" and _list_tars(root):
        raise _no_validation(root)
    return _find_in_folder(root, split) if root else None


def _from_pattern(pattern: str, key: str) -> ShardSet:
    refuse_compressed(pattern)
    paths = expand_braces(pattern)
    if len(set(paths)) < len(paths):
        raise ValueError(f"{key}: {printable_url(pattern)} names a shard twice; name each one once")
    return ShardSet(printable_url(pattern), paths, [folder_of(paths[0])])


def _find_named(root: str, name: str, split: str) -> ShardSet | None:
    """Return the shards that `data.train` or `data.val` names."""
    is_root_folder = root and not is_pattern(root)
    folder = root if is_root_folder else folder_of(root) if root else ""
    path = name if is_remote(name) or os.path.isabs(name) or not folder else join(folder, name)
    if is_pattern(path):
        return _from_pattern(path, f"data.{split}")
    if name in (".", "./"):
        path = root
    tars = _list_tars(path)
    return _as_set(path, tars, path) if tars else None


def _find_in_folder(root: str, split: str) -> ShardSet | None:
    """Return the shards of a split in a folder, by their names or those of their folders."""
    if is_remote(root) and path_of(root).lower().endswith(_LOCAL_SUFFIXES):
        raise ValueError(
            f"data.root: {printable_url(root)} is not a .tar, and other files are not read from a "
            "store; download it and give its path"
        )
    tars = _list_tars(root)
    groups: dict[str, ShardSet] = {}
    if tars:
        by_split: dict[str, list[str]] = {}
        for name in tars:
            by_split.setdefault(_split_in_name(name), []).append(name)
        if set(by_split) == {""}:
            groups["train"] = _as_set(root, tars, root)
        elif "" in by_split:
            raise ValueError(
                f"data.root: {printable_url(root)} has shards of no split "
                f"({abbreviate(by_split[''], 2)}) beside those of splits; say which are which, as "
                f"in data.train={_pattern_hint(by_split[''])} data.val=none"
            )
        else:
            groups = {key: _as_set(root, names, root) for key, names in by_split.items()}
    else:
        for name in _list_split_folders(root):
            folder = join(root, name)
            if names := _list_tars(folder):
                groups.setdefault(split_of(name) or "", _as_set(folder, names, folder, root))
    if not groups:
        if is_remote(root):
            raise ValueError(
                f"data.root: {printable_url(root)} contains no .tar, and other files are not read "
                "from a store; give shards, which `ssl-pretrain shards write` makes"
            )
        return None
    wanted = ["train"] if split == "train" else ["val", "test"]
    shard_set = next((groups[key] for key in wanted if key in groups), None)
    if shard_set is None and split == "train":
        raise ValueError(
            f"data.train: {printable_url(root)} has shards for {' and '.join(sorted(groups))}, but "
            "none for training; name them, as in data.train=PATTERN"
        )
    if shard_set is None:
        raise _no_validation(root)
    return shard_set


def _as_set(folder: str, names: Sequence[str], *class_folders: str) -> ShardSet:
    splits = {_split_in_name(name) for name in names}
    pattern = f"{names[0]} ... {names[-1]}" if len(names) > 1 else names[0]
    folder_name = printable_url(folder)
    is_whole = splits == {""}
    name = folder_name if is_whole else join(folder_name, pattern)
    return ShardSet(name, [join(folder, tar) for tar in names], list(class_folders))


def _split_in_name(name: str) -> str:
    """Return the split that a word in a shard's name is, as in `imagenet-train-000000.tar`."""
    return next(filter(None, map(split_of, words_in_name(name))), "")


def _pattern_hint(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else "PATTERN"


def _no_validation(root: str) -> NoSuchSplit:
    return NoSuchSplit(
        f"data.val: {printable_url(root)} has no shards for validation, such as val-000000.tar; "
        "name them, as in data.val=PATTERN, or leave out evaluations that need them"
    )


def _list_tars(folder: str) -> list[str]:
    """Return the tars in a folder, sorted, or nothing if it has images or folders too."""
    names = []
    for name, is_folder in _list_folder(folder):
        if not is_remote(folder) and (is_folder or is_picture(name)):
            return []
        if not is_folder and is_pattern(name):
            names.append(name)
    names.sort()
    compressed = [name for name in names if not name.lower().endswith(".tar")]
    if compressed:
        refuse_compressed(join(folder, compressed[0]))
    return names


def _list_split_folders(root: str) -> list[str]:
    """Return the folders that are named after splits, or nothing if there are others or images."""
    names = []
    for name, is_folder in _list_folder(root):
        if not is_remote(root) and (is_picture(name) or (is_folder and split_of(name) is None)):
            return []
        if is_folder and split_of(name) is not None:
            names.append(name)
    return sorted(names)


def _list_folder(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield the name of each visible entry, and whether it is a folder."""
    if is_remote(folder):
        yield from remote_store.list_names(folder)
    elif os.path.isdir(folder):
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_skipped(entry.name):
                    yield entry.name, entry.is_dir()
