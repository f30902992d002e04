"""Open a split of a data set in tar shards, with the labels and the names of its classes."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl_pretrain.data.config import DataConfig, pixel_format
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.tar.class_files import CLASS_FILES, read_classes
from ssl_pretrain.data.tar.index_files import open_indexes, stat_shards
from ssl_pretrain.data.tar.remote_errors import printable_url
from ssl_pretrain.data.tar.shard_cache import ShardCache
from ssl_pretrain.data.tar.shard_index import ShardIndex
from ssl_pretrain.data.tar.shard_names import ShardSet, find_shards
from ssl_pretrain.data.tar.tar_source import TarShards

_MAX_CLASSES = 1_000_000  # for numbers, which need one name per class
_MAX_REASONS = 8  # reasons for members that are not read, in a note


def open_tar_split(
    config: DataConfig, cache_dir: Path, split: str, classes: list[str] | None = None
) -> TarShards | None:
    """Open a split, or return None if the data set does not consist of tar shards.

    Args:
        config: The data set.
        cache_dir: Folder for indexes that cannot be written beside their shards, and for copies.
        split: "train" or "val".
        classes: Classes of the training split, or None to find them.

    Raises:
        NoSuchSplit: If there are no shards for validation.
        ValueError: If a shard or its index cannot be used.
    """
    shard_set = find_shards(config.root, config.train, config.val, split)
    if shard_set is None:
        return None
    if split == "val" and classes is None:
        train = open_tar_split(config, cache_dir, "train") if config.root or config.train else None
        classes = train.classes if train is not None else None
    shards = stat_shards(shard_set.paths)
    indexes = open_indexes(shards, cache_dir)
    if not any(map(len, indexes)):
        raise ValueError("; ".join([_no_image_message(shard_set), *_skipped_notes(indexes)]))
    stored_classes = read_classes(shard_set.folders)
    labels, classes = _merge_labels(shard_set.name, indexes, stored_classes, classes or [])
    cache = ShardCache(cache_dir / "shards", int(config.remote_cache_gb * 1e9))
    source = TarShards(
        shard_set.name, shards, indexes, labels, classes, cache, pixel_format(config)
    )
    empty = [shard.path for shard, index in zip(shards, indexes) if not len(index)]
    if empty:
        first = os.path.basename(printable_url(empty[0]))
        source.notes.append(f"{len(empty):,} shards have no image (first: {first})")
    num_unlabeled = int((labels < 0).sum())
    if 0 < num_unlabeled < len(labels):
        first = source.name(int(np.argmax(labels < 0)))
        source.notes.append(
            f"{num_unlabeled:,} of {len(labels):,} images in {shard_set.name} have no label "
            f"(first: {first})"
        )
    source.notes += [f"left out in {shard_set.name}: {note}" for note in _skipped_notes(indexes)]
    return source


def _no_image_message(shard_set: ShardSet) -> str:
    return (
        f"data.root: {shard_set.name} contains no image that Pillow can decode; give tars of "
        "images (NAME.jpg) in WebDataset's layout, which `ssl-pretrain shards write` makes"
    )


def _skipped_notes(indexes: Sequence[ShardIndex]) -> list[str]:
    """Return a text on what is left out, the most frequent reason first, or nothing."""
    counts: dict[str, int] = {}
    examples: dict[str, str] = {}
    for index in indexes:
        for skipped in index.skipped:
            counts[skipped.reason] = counts.get(skipped.reason, 0) + skipped.num_files
            examples.setdefault(skipped.reason, skipped.first_path)
    reasons = sorted(counts, key=lambda reason: (-counts[reason], reason))[:_MAX_REASONS]
    texts = [f"{counts[reason]:,} {reason} (first: {examples[reason]})" for reason in reasons]
    return [", ".join(texts)] if texts else []


def _merge_labels(
    name: str, indexes: Sequence[ShardIndex], stored_classes: list[str], train_classes: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Return the label of each image, and the names of the classes.

    Labels that are all numbers are indices into the classes. Other labels are names of classes.

    Raises:
        ValueError: If a label has no class.
    """
    names = sorted({name for index in indexes for name in index.label_names})
    if all(label.isdecimal() for label in names):
        numbers = {label: int(label) for label in names}
        highest = max(numbers.values(), default=-1)
        classes = train_classes or stored_classes
        if not classes and highest < _MAX_CLASSES:
            classes = list(map(str, range(highest + 1)))
        if highest >= len(classes):
            reason = f"there are only {len(classes):,} classes" if classes else "it is too large"
            raise ValueError(
                f"data.root: {name} has the label {highest:,}, but {reason}; check "
                f"{' or '.join(CLASS_FILES)} and the labels in .cls or .json"
            )
    else:
        classes = train_classes or stored_classes or names
        numbers = {label: number for number, label in enumerate(classes)}
        unknown = sorted(set(names) - set(numbers))
        if unknown:
            key = "data.val" if train_classes else "data.root"
            owner = "the training split" if train_classes else "the list of classes"
            raise ValueError(
                f"{key}: {name} has the class {unknown[0]!r}, but {owner} has only "
                f"{abbreviate(classes)}; check the shards of both splits"
            )
    labels = []
    for index in indexes:
        table = np.array([*(numbers[label] for label in index.label_names), -1], np.int64)
        labels.append(table[index.label])  # -1 is the last row
    return np.concatenate(labels), classes if names or train_classes else []
