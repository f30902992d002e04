"""The label of each image of a split: its first folder, its row in a list, or a table of labels beside the images.

A label that is not certain is not given. An image without a label has -1, and a note says how many there are and why.
"""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ssl_pretrain.data import listing
from ssl_pretrain.data.file_lists import ROLES, label_table, role
from ssl_pretrain.data.splits import Content, Tree

_TABLE_WORDS = frozenset(
    {"label", "labels", "annotation", "annotations", "metadata"}
)  # of a table inside a split's own folder
_NO_TRUTH = frozenset(
    {"submission", "prediction", "predictions", "pred", "preds", "result", "results", "sample"}
)
_WRAPPED = 4  # folders around the class folders of a validation split, at most
_MAX_TABLES = 20


@dataclass
class Labels:
    """Labels of a split.

    numbers: int64 (n,), an index into `classes` per image, -1 for none. notes: lines for the start of a run.
    """

    numbers: np.ndarray
    classes: list[str]
    notes: list[str] = field(default_factory=list)


def assign(
    where: str,
    content: Content,
    classes: list[str] | None,
    names: tuple[str, ...],
    tree: Tree,
    root: Tree,
) -> Labels:
    """Label the images of a split.

    Args:
        where: The split, for messages.
        content: The split's files.
        classes: Classes of the training split, matched by name. None for the training split itself.
        names: Names that tables of its labels may have, such as ("val", "validation").
        tree: The split's own folder.
        root: The data set's folder. Tables are looked for in `tree` and above it up to `root`.

    Raises:
        ValueError: Some classes of a validation split are among `classes` and another is not.
    """
    paths = content.files.paths()
    if content.written is not None:
        written, notes = [_composed(name) for name in content.written], list[str]()
    else:
        written, notes = _from_folders(paths, classes)
        if not any(written):
            tables = _from_tables(where, paths, classes, names, tree, root)
            written, notes = tables if any(tables[0]) else (written, [*notes, *tables[1]])
    given = set(written) - {""}
    numbers = content.written is not None and all(
        name.isdecimal() for name in given
    )  # folders 1 to 10 are sorted as text
    if not classes:
        classes = sorted(given, key=int if numbers else os.fsencode)
    elif not given <= set(classes):
        strange = min(given - set(classes))
        raise ValueError(
            f"data.val: {where} has the class {strange!r}, which the training split has not; it has {_some(classes)}"
        )
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number.get(name, -1) for name in written], np.int64)
    missing = [path for path, label in zip(paths, labels) if label < 0]
    if given and missing:
        notes.append(
            f"{len(missing):,} of {len(paths):,} images in {where} have no label (first: {missing[0]})"
        )
    return Labels(labels, classes, notes)


def _composed(name: str) -> str:
    """Return the name in Unicode's composed form, as macOS takes letters and their accents apart."""
    return unicodedata.normalize("NFC", name)


def _from_folders(paths: list[str], classes: list[str] | None) -> tuple[list[str], list[str]]:
    """Return the class of each image by its folder, "" for none, and notes.

    The class is the first folder that is not around all images.
    """
    folders = [path.split("/")[:-1] for path in paths]
    for depth in range(_WRAPPED):
        firsts = {_composed(parts[depth]) for parts in folders if len(parts) > depth}
        known = firsts & set(classes or ())
        if known or (len(firsts) > 1 and not classes):
            return [_composed(parts[depth]) if len(parts) > depth else "" for parts in folders], []
    names = {parts[0] for parts in folders if parts}
    if classes and names:
        return [""] * len(paths), [
            f"its folders ({_some(sorted(names))}) are no classes of the training split"
        ]
    return [""] * len(paths), []


def _from_tables(
    where: str,
    paths: list[str],
    classes: list[str] | None,
    names: tuple[str, ...],
    tree: Tree,
    root: Tree,
) -> tuple[list[str], list[str]]:
    """Return the class of each image by a table, "" for none, and notes.

    A table is a file such as `val.csv`, `LOC_val_solution.csv` or ILSVRC2012's ground truth.
    """
    notes = []
    for folder, name in _tables(names, tree, root):
        found, why = _from_table(folder, name, paths, classes)
        title = os.path.join(folder.where, name)
        if found:
            return [found.get(path, "") for path in paths], [f"labels of {where} from {title}"]
        if why:
            notes.append(f"{title} gives no labels: {why}")
    return [""] * len(paths), notes


def _tables(names: tuple[str, ...], tree: Tree, root: Tree) -> Iterator[tuple[Tree, str]]:
    """Yield the files that may hold a split's labels, each with its folder.

    They are named after the split, and lie in its folder, above it up to the root, or in a devkit.
    """
    folders = [tree]
    while folders[-1].where != root.where and len(folders[-1].where) > len(root.where):
        folders.append(folders[-1].parent())
    if tree.folders and len(tree.folders) == 1:
        folders.insert(0, tree.child(tree.folders[0]))
    for above in tuple(folders):
        for kit in (name for name in above.folders if "devkit" in name.lower()):
            folders += [above.child(kit), above.child(kit).child("data")]
    found = 0
    for folder in folders:
        for name in folder.files:
            stem, suffix = os.path.splitext(name)
            words = set(re.findall("[a-z]+", stem.lower()))
            own = folder.where.startswith(tree.where) and words & _TABLE_WORDS
            if (
                suffix.lower() in listing.TABLES
                and not words & _NO_TRUTH
                and (words & set(names) or own)
                and found < _MAX_TABLES
            ):
                found += 1
                yield folder, name


def _from_table(
    folder: Tree, name: str, paths: list[str], classes: list[str] | None
) -> tuple[dict[str, str], str]:
    """Return the class of each path, and the reason if there is none."""
    try:
        content = folder.read(name)
    except OSError as error:
        return {}, str(error.strerror)
    found = {path: label for path, label in label_table(content, paths).items() if label}
    if not found:
        return _from_lines(folder, content, paths, classes)
    if classes is None and 2 * len(set(found.values())) > len(found):
        return {}, f"it has {len(set(found.values())):,} different ones for {len(found):,} images"
    if not classes:
        return {path: _composed(label) for path, label in found.items()}, ""
    known = set(classes)
    chosen = {}
    for path, label in found.items():
        label = _composed(label)
        chosen[path] = (
            label if label in known else label.split(" ")[0]
        )  # "n03995372 85 1 499 272", with its boxes
        if chosen[path] not in known:
            return {}, f"{label!r} is no class of the training split, which has {_some(classes)}"
    return chosen, ""


def _from_lines(
    folder: Tree, content: bytes, paths: list[str], classes: list[str] | None
) -> tuple[dict[str, str], str]:
    """Return the class of each path, and the reason if there is none, from a file with one class per line.

    It names no image. Its lines are in the order of the images' names, or of the numbers in them.
    """
    lines = [
        line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()
    ]
    if not classes or not lines:
        return {}, ""
    numbers = [
        int(match[0]) if (match := re.search(r"\d+(?=\.[^./]*$)", path)) else 0 for path in paths
    ]
    if len(set(numbers)) == len(paths) and min(numbers) >= 1 and max(numbers) <= len(lines):
        places = [number - 1 for number in numbers]
    elif len(lines) == len(paths):
        order = sorted(range(len(paths)), key=lambda i: os.fsencode(os.path.basename(paths[i])))
        places = [0] * len(paths)
        for place, i in enumerate(order):
            places[i] = place
    else:
        return {}, ""
    by_name = dict(zip(classes, classes))
    if not set(lines) <= set(by_name):
        if not all(line.isdecimal() for line in lines):
            return {}, ""
        by_name, why = _numbered_classes(folder, classes)
        if not by_name:
            return {}, why
    if not set(lines) <= set(by_name):
        return (
            {},
            f"it has the class {min(set(lines) - set(by_name))}, which the list of classes has not",
        )
    return {path: by_name[lines[place]] for path, place in zip(paths, places)}, ""


def _numbered_classes(folder: Tree, classes: list[str]) -> tuple[dict[str, str], str]:
    """Read the class of each of ILSVRC2012's numbers, or the reason why there is none, from `meta.mat` or a list of synsets."""
    missing = (
        "it numbers the classes, and no list of them (meta.mat, map_clsloc.txt) lies beside it"
    )
    for name in folder.files:
        if name == "meta.mat":
            return _classes_of_meta(folder, name, classes)
    for name in folder.files:
        if not name.lower().endswith(listing.TABLES):
            continue
        try:
            content = folder.read(name)
        except OSError:
            continue
        rows = [
            line.split() for line in content.decode("utf-8", "replace").splitlines() if line.strip()
        ]
        if not {row[0] for row in rows} & set(classes):
            continue
        if all(len(row) > 1 and row[1].isdecimal() for row in rows):
            return {row[1]: row[0] for row in rows if row[0] in set(classes)}, ""
        order = [row[0] for row in rows]
        if not set(classes) <= set(order):
            continue
        if order != sorted(order):
            return {str(number): synset for number, synset in enumerate(order, 1)}, ""
        missing = f"it numbers the classes, and {name} lists them in alphabetical order, which is not that of ILSVRC2012's numbers"
    return {}, missing


def _classes_of_meta(folder: Tree, name: str, classes: list[str]) -> tuple[dict[str, str], str]:
    """Return the class of each number in ILSVRC2012's `meta.mat`, and the reason if there is none."""
    from scipy.io import loadmat  # only for this file

    try:
        synsets = loadmat(io.BytesIO(folder.read(name)), squeeze_me=True)["synsets"]
        by_number = {str(int(each["ILSVRC2012_ID"])): str(each["WNID"]) for each in synsets}
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        return {}, f"{name} cannot be read: {type(error).__name__}: {error}"
    known = set(classes)
    return {
        number: synset for number, synset in by_number.items() if synset in known
    }, f"{name} lists no class of the training split"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def table_names(where: str, split: str) -> tuple[str, ...]:
    """Return the names that tables of a split's labels may have: all spellings of its role, which its folder's name may give."""
    own = role(os.path.basename(where)) or split
    return tuple(name for name in ROLES if ROLES[name] == own)
