"""Report at the start of a run which images it reads."""

import os

import numpy as np

from ssl_pretrain.data.image_files import ImageFiles
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.messages import printable
from ssl_pretrain.data.sources import DataConfig, open_source

_CLASSES_SHOWN = 3


def layout_lines(config: DataConfig, train: Source) -> list[str]:
    """Return lines that name the splits, their images and labels, and the skipped files.

    Args:
        config: The data set.
        train: Its training images.
    """
    notes = list(train.notes)
    try:
        val = open_source(config, "val", train.classes)
    except (ValueError, OSError) as error:
        validation = f"none ({error})"
    else:
        validation = f"{val.where}: {describe_counts(val)}"
        notes += [note for note in val.notes if note not in notes] + _overlap_notes(train, val)
    summary = f"training {train.where}: {describe_counts(train)}; validation {validation}"
    return [printable(f"data: {line}") for line in (summary, *notes)]


def describe_counts(source: Source) -> str:
    """Count the images of a source, its classes, and its images without a label."""
    images = f"{len(source):,} image" + ("s" if len(source) != 1 else "")
    num_missing = int((source.labels < 0).sum())
    if num_missing == len(source):
        return f"{images}, no labels"
    present = np.unique(source.labels[source.labels >= 0])
    names = [source.classes[label] for label in present[:_CLASSES_SHOWN]]
    if len(present) > _CLASSES_SHOWN:
        names.append("...")
    total = f" of {len(source.classes):,}" if len(present) < len(source.classes) else ""
    noun = "class" if len(present) == 1 and not total else "classes"
    missing = f", {num_missing:,} without a label" if num_missing else ""
    return f"{images}, {len(present):,}{total} {noun} ({', '.join(names)}){missing}"


def _overlap_notes(train: Source, val: Source) -> list[str]:
    """Return a note if some validation images are also training images.

    The paths are compared only if both splits share a folder, or one lies inside the other.
    """
    if not isinstance(train, ImageFiles) or not isinstance(val, ImageFiles):
        return []
    train_root, val_root = (
        os.path.join(os.path.realpath(source.files.root), source.files.within, "")
        for source in (train, val)
    )
    if not train_root.startswith(val_root) and not val_root.startswith(train_root):
        return []
    val_paths = {val_root + path for path in val.files.paths()}
    shared = sorted(val_paths.intersection(train_root + path for path in train.files.paths()))
    if not shared:
        return []
    counts = f"{len(shared):,} of {len(val):,}"
    return [f"{counts} validation images are also training images (first: {shared[0]})"]
