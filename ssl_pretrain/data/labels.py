"""Label the images of a split by their folders, a list, or a table beside them.

Uncertain labels are not used. An image without a label has -1, and a note counts these images and
says why.
"""

import os
import unicodedata
from dataclasses import dataclass, field

import numpy as np

from ssl_pretrain.data.label_tables import SplitFolder, find_table_labels
from ssl_pretrain.data.messages import abbreviate

_MAX_WRAPPERS = 4  # folders around the class folders of a validation split


@dataclass
class Labels:
    """Labels of a split."""

    numbers: np.ndarray  # int64 (n,), an index into `classes` per image, -1 for none
    classes: list[str]
    notes: list[str] = field(default_factory=list)  # lines for the start of a run


def label_images(
    split: SplitFolder, listed_labels: list[str] | None, classes: list[str] | None
) -> Labels:
    """Label the images of a split.

    Args:
        split: The images.
        listed_labels: Labels from a list of the images, "" for none. None if there is no list.
        classes: Classes of the training split, matched by name. None for the training split.

    Raises:
        ValueError: If a class of a validation split is not in `classes`, and others are.
    """
    notes: list[str] = []
    if listed_labels is not None:
        names = listed_labels
    else:
        names, notes = _labels_from_folders(split.paths, classes)
        if not any(names):
            table_labels, table_notes = find_table_labels(split, classes)
            notes = table_notes if table_labels else [*notes, *table_notes]
            names = [table_labels.get(path, "") for path in split.paths]
    known = set(names) - {""}
    if not classes:
        # Folders called 1 to 10 are sorted as text, numbers in a list by their value.
        is_numeric = listed_labels is not None and all(name.isdecimal() for name in known)
        classes = sorted(known, key=int if is_numeric else os.fsencode)
    elif unknown := known - set(classes):
        raise ValueError(
            f"data.val: {split.where} has the class {min(unknown)!r}, which is not in the "
            f"training split; that has {abbreviate(classes)}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers.get(name, -1) for name in names], np.int64)
    missing = np.flatnonzero(labels < 0)
    if known and len(missing):
        notes.append(
            f"{len(missing):,} of {len(labels):,} images in {split.where} have no label "
            f"(first: {split.paths[missing[0]]})"
        )
    return Labels(labels, classes, notes)


def _labels_from_folders(
    paths: list[str], classes: list[str] | None
) -> tuple[list[str], list[str]]:
    """Return the class of each image by its folder, "" for none, and notes.

    The class is the first folder that is not around all images.
    """
    # Composed, as macOS separates letters from their accents.
    folders = [unicodedata.normalize("NFC", path).split("/")[:-1] for path in paths]
    for depth in range(_MAX_WRAPPERS):
        names = [levels[depth] if len(levels) > depth else "" for levels in folders]
        distinct = set(names) - {""}
        if distinct & set(classes or ()) or (len(distinct) > 1 and not classes):
            return names, []
    first_folders = sorted({levels[0] for levels in folders if levels})
    notes = [f"its folders ({abbreviate(first_folders)}) are no classes of the training split"]
    return [""] * len(paths), notes if classes and first_folders else []
