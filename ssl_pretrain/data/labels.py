"""Label the images of a split by their folders, by a list, or by a table of labels.

Examples of tables are `val.csv`, `LOC_val_solution.csv` and ILSVRC2012's ground truth. Uncertain
labels are not used. Images without a label get -1, and a note reports how many there are and why.
"""

import io
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ssl_pretrain.data.file_lists import labels_from_table
from ssl_pretrain.data.file_types import TABLE_SUFFIXES
from ssl_pretrain.data.folder_tree import FolderTree
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_search import SPELLINGS, split_of

_LABEL_WORDS = frozenset({"label", "labels", "annotation", "annotations", "metadata"})
_PREDICTION_WORDS = frozenset(
    ["submission", "prediction", "predictions", "pred", "preds", "result", "results", "sample"]
)
_MAX_TABLES = 20  # number of tables to try
_MAX_CLASS_DEPTH = 4  # number of folder levels that are searched for class folders


@dataclass(frozen=True)
class SplitFolder:
    """The images of a split, and the folders to search for tables of their labels.

    Tables may be in `tree` and in the folders above it, up to `root`.
    """

    name: str  # "train", "val" or "test"
    paths: list[str]  # one per image
    tree: FolderTree  # folder of the split
    root: FolderTree  # folder of the data set
    full_path: str  # path of the split's folder or list, for messages


class UnusableTable(Exception):
    """Error for a table whose labels are damaged or uncertain. The message gives the reason."""


def label_images(
    split: SplitFolder, listed_labels: list[str] | None, classes: list[str] | None
) -> tuple[np.ndarray, list[str], list[str]]:
    """Label the images of a split.

    Args:
        split: Images and their folders.
        listed_labels: Label of each image in a list, "" if the list has none for the image. None if
            the images do not come from a list.
        classes: Classes of the training split, matched by name, or None to label the training split
            itself.

    Returns:
        The labels, int64 (n,), which are indices into the classes or -1; the classes; and notes to
        print at the start of a run.

    Raises:
        ValueError: If a validation split has a class that the training split lacks.
    """
    notes: list[str] = []
    if listed_labels is not None:
        names = listed_labels
    else:
        names, notes = _labels_from_folders(split.paths, classes)
        if not any(names):
            table_labels, table_notes = _labels_from_tables(split, classes)
            notes = table_notes if table_labels else [*notes, *table_notes]
            names = [table_labels.get(path, "") for path in split.paths]
    distinct_names = set(names) - {""}
    if not classes:
        # Folders called 1 to 10 are sorted as text, but numbers in a list are sorted by value.
        is_numeric = listed_labels is not None and all(name.isdecimal() for name in distinct_names)
        classes = sorted(distinct_names, key=int if is_numeric else os.fsencode)
    elif unknown_names := distinct_names - set(classes):
        raise ValueError(
            f"data.val: {split.full_path} has the class {min(unknown_names)!r}, but the training "
            f"split has only {abbreviate(classes)}; check data.train and data.val"
        )
    class_indices = {name: index for index, name in enumerate(classes)}
    labels = np.array([class_indices.get(name, -1) for name in names], np.int64)
    unlabeled = np.flatnonzero(labels < 0)
    if distinct_names and len(unlabeled):
        notes.append(
            f"{len(unlabeled):,} of {len(labels):,} images in {split.full_path} have no label "
            f"(first: {split.paths[unlabeled[0]]})"
        )
    return labels, classes, notes


def _labels_from_folders(
    paths: list[str], classes: list[str] | None
) -> tuple[list[str], list[str]]:
    """Return the class of each image by its folder, "" if it has none, and notes.

    The class is the outermost folder that does not contain all images.
    """
    # NFC joins letters and their accents, which macOS stores separately.
    folders = [unicodedata.normalize("NFC", path).split("/")[:-1] for path in paths]
    for depth in range(_MAX_CLASS_DEPTH):
        names = [levels[depth] if len(levels) > depth else "" for levels in folders]
        distinct_names = set(names) - {""}
        if distinct_names & set(classes or ()) or (len(distinct_names) > 1 and not classes):
            return names, []
    first_folders = sorted({levels[0] for levels in folders if levels})
    notes = [
        f"the folders of the validation images ({abbreviate(first_folders)}) are not classes of "
        "the training split"
    ]
    return [""] * len(paths), notes if classes and first_folders else []


def _labels_from_tables(
    split: SplitFolder, classes: list[str] | None
) -> tuple[dict[str, str], list[str]]:
    """Read labels from the first table that has them.

    Returns:
        The class of each path, empty if no table has labels, and notes on the tables.
    """
    notes = []
    for folder, name in itertools.islice(_candidate_tables(split), _MAX_TABLES):
        table = os.path.join(folder.full_path, name)
        try:
            labels = _read_table(folder, name, split.paths, classes)
        except UnusableTable as error:
            notes.append(f"{table} has no usable labels: {error}")
            continue
        if labels:
            return labels, [f"the labels of {split.full_path} come from {table}"]
    return {}, notes


def _candidate_tables(split: SplitFolder) -> Iterator[tuple[FolderTree, str]]:
    """Yield the files that may contain the labels, each with its folder.

    The search covers the folder of the split, the folders above it up to the root, and development
    kits. The files are named after the split or, inside its folder, after labels.
    """
    folders = [split.tree]
    while len(folders[-1].full_path) > len(split.root.full_path):
        folders.append(folders[-1].parent())
    if len(split.tree.subfolder_names) == 1:
        folders.insert(0, split.tree.child(split.tree.subfolder_names[0]))
    for folder in tuple(folders):
        for name in folder.subfolder_names:
            if "devkit" in name.lower():
                devkit = folder.child(name)
                folders.append(devkit)
                if "data" in devkit.subfolder_names:
                    folders.append(devkit.child("data"))
    split_words = {*SPELLINGS[split_of(os.path.basename(split.full_path)) or split.name]}
    for folder in folders:
        is_inside = folder.full_path.startswith(split.tree.full_path)
        for name in folder.file_names:
            stem, suffix = os.path.splitext(name)
            words = set(re.findall("[a-z]+", stem.lower()))
            is_named = words & split_words or (is_inside and words & _LABEL_WORDS)
            if suffix.lower() in TABLE_SUFFIXES and is_named and not words & _PREDICTION_WORDS:
                yield folder, name


def _read_table(
    folder: FolderTree, name: str, paths: list[str], classes: list[str] | None
) -> dict[str, str]:
    """Return the class of each path, or an empty dict if the file is not a table of labels.

    Raises:
        UnusableTable: If the labels are damaged or uncertain.
    """
    try:
        content = folder.read(name)
    except OSError as error:
        raise UnusableTable(str(error.strerror)) from None
    labels = {path: label for path, label in labels_from_table(content, paths).items() if label}
    if not labels:
        return _labels_from_lines(folder, _nonempty_lines(content), paths, classes or [])
    num_labels = len(set(labels.values()))
    if classes is None and 2 * num_labels > len(labels):
        raise UnusableTable(f"it has {num_labels:,} different labels for {len(labels):,} images")
    known_classes = set(classes or labels.values())
    for path, label in labels.items():
        # Boxes may follow the class, as in "n03995372 85 1 499 272".
        labels[path] = label if label in known_classes else label.split(" ")[0]
        if labels[path] not in known_classes:
            raise UnusableTable(
                f"{label!r} is not a class of the training split, which has "
                f"{abbreviate(classes or [])}"
            )
    return labels


def _nonempty_lines(content: bytes) -> list[str]:
    return list(filter(None, map(str.strip, content.decode("utf-8", "replace").splitlines())))


def _labels_from_lines(
    folder: FolderTree, lines: list[str], paths: list[str], classes: list[str]
) -> dict[str, str]:
    """Return the class of each path from a file that has one class per line and no image names.

    The lines are in the order of the image names, or of the numbers in these names.
    """
    rows = _rows_of_images(paths, len(lines))
    if not classes or not rows:
        return {}
    class_of_line = {name: name for name in classes}
    if not set(lines) <= set(classes):
        if not all(line.isdecimal() for line in lines):
            return {}
        class_of_line = _classes_by_number(folder, classes)
    if unknown_lines := set(lines) - set(class_of_line):
        raise UnusableTable(
            f"it has the class {min(unknown_lines)}, which is not in the list of classes"
        )
    return {path: class_of_line[lines[row]] for path, row in zip(paths, rows)}


def _rows_of_images(paths: list[str], num_rows: int) -> list[int]:
    """Return the row of each image, by the number in its name or by the order of the names.

    The list is empty if neither fits the number of rows.
    """
    matches = [re.search(r"\d+(?=\.[^./]*$)", path) for path in paths]
    numbers = [int(match[0]) if match else 0 for match in matches]
    is_numbered = len(set(numbers)) == len(paths) and min(numbers) >= 1
    if is_numbered and max(numbers) <= num_rows:
        return [number - 1 for number in numbers]
    if num_rows != len(paths):
        return []
    order = np.argsort([os.fsencode(os.path.basename(path)) for path in paths], kind="stable")
    return np.argsort(order).tolist()


def _classes_by_number(folder: FolderTree, classes: list[str]) -> dict[str, str]:
    """Return the class of each ILSVRC2012 number, from `meta.mat` or a list of synsets."""
    if "meta.mat" in folder.file_names:
        return _read_meta(folder.read("meta.mat"), classes)
    reason = (
        "it numbers the classes, but its folder has no list of them (meta.mat or map_clsloc.txt)"
    )
    for name in folder.file_names:
        if not name.lower().endswith(TABLE_SUFFIXES):
            continue
        try:
            rows = [line.split() for line in _nonempty_lines(folder.read(name))]
        except OSError:
            continue
        synsets = [row[0] for row in rows]
        if not set(synsets) & set(classes):
            continue
        if all(len(row) > 1 and row[1].isdecimal() for row in rows):
            return {row[1]: row[0] for row in rows if row[0] in classes}
        if not set(classes) <= set(synsets):
            continue
        if synsets != sorted(synsets):
            return {str(number): synset for number, synset in enumerate(synsets, 1)}
        reason = (
            f"it numbers the classes, but {name} lists them in alphabetical order, "
            "not in the order of ILSVRC2012's numbers"
        )
    raise UnusableTable(reason)


def _read_meta(content: bytes, classes: list[str]) -> dict[str, str]:
    """Return the class of each ILSVRC2012 number in a `meta.mat`."""
    from scipy.io import loadmat  # slow to import, and only needed for this file

    try:
        rows = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        synsets = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except Exception as error:  # scipy raises almost anything for a damaged file
        raise UnusableTable(f"meta.mat cannot be read: {type(error).__name__}: {error}") from None
    class_of_number = {number: synset for number, synset in synsets.items() if synset in classes}
    if not class_of_number:
        raise UnusableTable("meta.mat lists no class of the training split")
    return class_of_number
