"""Label the images of a split by their folders, by a list, or by a table beside them.

Such tables are `val.csv`, `LOC_val_solution.csv`, or ILSVRC2012's ground truth. Uncertain labels
are not used. An image without a label has -1, and a note counts these images and says why.
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
_MAX_TABLES = 20
_MAX_WRAPPERS = 4  # folders around the class folders of a validation split


@dataclass(frozen=True)
class SplitFolder:
    """The images of a split, and where tables of their labels may be.

    Tables may lie in `tree` and in the folders above it, up to `root`.
    """

    name: str  # "train", "val" or "test"
    paths: list[str]
    tree: FolderTree  # the folder of the split
    root: FolderTree  # the folder of the data set
    full_path: str  # path of the split's folder or list, for messages


class UnusableTable(Exception):
    """A table whose labels are damaged or uncertain. The message is the reason."""


def label_images(
    split: SplitFolder, listed_labels: list[str] | None, classes: list[str] | None
) -> tuple[np.ndarray, list[str], list[str]]:
    """Label the images of a split.

    Args:
        split: The images.
        listed_labels: Labels from a list of the images, "" for none. None if there is no list.
        classes: Classes of the training split, matched by name. None for the training split.

    Returns:
        The labels, int64 (n,), an index into the classes per image and -1 for none; the classes;
        notes for the start of a run.

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
    known = set(names) - {""}
    if not classes:
        # Folders called 1 to 10 are sorted as text, numbers in a list by their value.
        is_numeric = listed_labels is not None and all(name.isdecimal() for name in known)
        classes = sorted(known, key=int if is_numeric else os.fsencode)
    elif unknown := known - set(classes):
        raise ValueError(
            f"data.val: {split.full_path} has the class {min(unknown)!r}, which is not in the "
            f"training split; that has {abbreviate(classes)}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers.get(name, -1) for name in names], np.int64)
    missing = np.flatnonzero(labels < 0)
    if known and len(missing):
        notes.append(
            f"{len(missing):,} of {len(labels):,} images in {split.full_path} have no label "
            f"(first: {split.paths[missing[0]]})"
        )
    return labels, classes, notes


def _labels_from_folders(
    paths: list[str], classes: list[str] | None
) -> tuple[list[str], list[str]]:
    """Return the class of each image by its folder, "" for none, and notes.

    The class is the outermost folder that does not contain all images.
    """
    # Composed, as macOS separates letters from their accents.
    folders = [unicodedata.normalize("NFC", path).split("/")[:-1] for path in paths]
    for depth in range(_MAX_WRAPPERS):
        names = [levels[depth] if len(levels) > depth else "" for levels in folders]
        distinct = set(names) - {""}
        if distinct & set(classes or ()) or (len(distinct) > 1 and not classes):
            return names, []
    first_folders = sorted({levels[0] for levels in folders if levels})
    notes = [f"its folders ({abbreviate(first_folders)}) are not classes of the training split"]
    return [""] * len(paths), notes if classes and first_folders else []


def _labels_from_tables(
    split: SplitFolder, classes: list[str] | None
) -> tuple[dict[str, str], list[str]]:
    """Read labels from the first table that has them.

    Returns:
        The class by path, empty if no table has labels, and notes on the tables.
    """
    notes = []
    for folder, name in itertools.islice(_candidate_tables(split), _MAX_TABLES):
        table = os.path.join(folder.full_path, name)
        try:
            labels = _read_table(folder, name, split.paths, classes)
        except UnusableTable as error:
            notes.append(f"{table} gives no labels: {error}")
            continue
        if labels:
            return labels, [f"labels of {split.full_path} from {table}"]
    return {}, notes


def _candidate_tables(split: SplitFolder) -> Iterator[tuple[FolderTree, str]]:
    """Yield the files that may hold the labels, each with its folder.

    They are named after the split. They lie in its folder, above it up to the root, or in a devkit.
    """
    folders = [split.tree]
    while len(folders[-1].full_path) > len(split.root.full_path):
        folders.append(folders[-1].parent())
    if len(split.tree.folders) == 1:
        folders.insert(0, split.tree.child(split.tree.folders[0]))
    for folder in tuple(folders):
        for name in folder.folders:
            if "devkit" in name.lower():
                kit = folder.child(name)
                folders += [kit, *(kit.child(inner) for inner in kit.folders if inner == "data")]
    split_words = {*SPELLINGS[split_of(os.path.basename(split.full_path)) or split.name]}
    for folder in folders:
        is_inside = folder.full_path.startswith(split.tree.full_path)
        for name in folder.files:
            stem, suffix = os.path.splitext(name)
            words = set(re.findall("[a-z]+", stem.lower()))
            is_named = words & split_words or (is_inside and words & _LABEL_WORDS)
            if suffix.lower() in TABLE_SUFFIXES and is_named and not words & _PREDICTION_WORDS:
                yield folder, name


def _read_table(
    folder: FolderTree, name: str, paths: list[str], classes: list[str] | None
) -> dict[str, str]:
    """Return the class of each path, or nothing if this is no table of labels.

    Raises:
        UnusableTable: If the labels are damaged or uncertain.
    """
    try:
        content = folder.read(name)
    except OSError as error:
        raise UnusableTable(str(error.strerror)) from None
    labels = {path: label for path, label in labels_from_table(content, paths).items() if label}
    if not labels:
        return _labels_from_lines(folder, _lines(content), paths, classes or [])
    num_labels = len(set(labels.values()))
    if classes is None and 2 * num_labels > len(labels):
        raise UnusableTable(f"it has {num_labels:,} different labels for {len(labels):,} images")
    known = set(classes or labels.values())
    for path, label in labels.items():
        # Boxes may follow the class, as in "n03995372 85 1 499 272".
        labels[path] = label if label in known else label.split(" ")[0]
        if labels[path] not in known:
            raise UnusableTable(
                f"{label!r} is not a class of the training split, which has "
                f"{abbreviate(classes or [])}"
            )
    return labels


def _lines(content: bytes) -> list[str]:
    return list(filter(None, map(str.strip, content.decode("utf-8", "replace").splitlines())))


def _labels_from_lines(
    folder: FolderTree, lines: list[str], paths: list[str], classes: list[str]
) -> dict[str, str]:
    """Return the class of each path from a file with one class per line, which names no image.

    The lines are in the order of the images' names, or of the numbers in these names.
    """
    rows = _rows_of_images(paths, len(lines))
    if not classes or not rows:
        return {}
    class_of_line = {name: name for name in classes}
    if not set(lines) <= set(classes):
        if not all(line.isdecimal() for line in lines):
            return {}
        class_of_line = _class_numbers(folder, classes)
    if unknown := set(lines) - set(class_of_line):
        raise UnusableTable(f"it has the class {min(unknown)}, which is not in the list of classes")
    return {path: class_of_line[lines[row]] for path, row in zip(paths, rows)}


def _rows_of_images(paths: list[str], num_rows: int) -> list[int]:
    """Return the row of each image by the number in its name, else by the order of the names."""
    matches = [re.search(r"\d+(?=\.[^./]*$)", path) for path in paths]
    numbers = [int(match[0]) if match else 0 for match in matches]
    is_numbered = len(set(numbers)) == len(paths) and min(numbers) >= 1
    if is_numbered and max(numbers) <= num_rows:
        return [number - 1 for number in numbers]
    if num_rows != len(paths):
        return []
    order = np.argsort([os.fsencode(os.path.basename(path)) for path in paths], kind="stable")
    return np.argsort(order).tolist()


def _class_numbers(folder: FolderTree, classes: list[str]) -> dict[str, str]:
    """Return the class of each of ILSVRC2012's numbers, from `meta.mat` or a list of synsets."""
    if "meta.mat" in folder.files:
        return _read_meta(folder.read("meta.mat"), classes)
    reason = "it numbers the classes, and no list of them (meta.mat, map_clsloc.txt) lies beside it"
    for name in folder.files:
        if not name.lower().endswith(TABLE_SUFFIXES):
            continue
        try:
            rows = [line.split() for line in _lines(folder.read(name))]
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
            f"it numbers the classes, and {name} lists them in alphabetical order, "
            "which is not that of ILSVRC2012's numbers"
        )
    raise UnusableTable(reason)


def _read_meta(content: bytes, classes: list[str]) -> dict[str, str]:
    """Return the class of each number in ILSVRC2012's `meta.mat`."""
    from scipy.io import loadmat  # slow to import, and only needed for this file

    try:
        rows = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        synsets = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except Exception as error:  # scipy raises almost anything for a damaged file
        raise UnusableTable(f"meta.mat cannot be read: {type(error).__name__}: {error}") from None
    numbers = {number: synset for number, synset in synsets.items() if synset in classes}
    if not numbers:
        raise UnusableTable("meta.mat lists no class of the training split")
    return numbers
