"""Which files of a data set are its training part and which its validation part, and what their labels are."""

import itertools
import os
from pathlib import Path

import numpy as np

from ssl_pretrain.data import listing
from ssl_pretrain.data.listing import Listing

_LISTS = (".csv", ".txt")


def find(root: Path, name: str, cache: Path) -> tuple[str, Listing, list[str] | None] | None:
    """The part `name` (a sub-folder, or a list file) of a folder, a zip, or the folder of a list file.

    Looked for in root, then in the only folder of root, as archives often wrap a data set in one.

    Returns:
        Where it is, its files, and their labels as written in a list (None for folders); None where there is no such part.
    """
    if not name:
        return None
    if root.suffix.lower() == ".zip":
        archive = listing.of_zip(root, cache)
        paths = archive.paths()
        tops = {path.partition("/")[0] for path in paths}
        for within in (name, *(f"{top}/{name}" for top in tops if len(tops) == 1)):
            chosen = [index for index, path in enumerate(paths) if path.startswith(f"{within}/")]
            if chosen:
                return os.path.join(root, within), archive.take(chosen, within), None
        return None
    folder = root if root.is_dir() else root.parent
    for base in (folder, *_only_folder(folder)):
        if (base / name).is_dir():
            return str(base / name), listing.of_folder(base / name, cache), None
        if (base / name).is_file():
            return str(base / name), *listing.of_file(base / name)
    return None


def whole(root: Path, without: str, cache: Path) -> tuple[str, Listing, list[str] | None]:
    """Every file of a root that has no part for training; what is below the sub-folder `without` is left out."""
    if root.suffix.lower() in _LISTS:
        return str(root), *listing.of_file(root)
    files = listing.of_zip(root, cache) if root.suffix.lower() == ".zip" else listing.of_folder(root, cache)
    chosen = [index for index, path in enumerate(files.paths()) if not without or not path.startswith(f"{without}/")]
    return str(root), files.take(chosen) if len(chosen) < len(files) else files, None


def labels(where: str, files: Listing, written: list[str] | None, classes: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """The label of each file, int64 (n,), -1 for none, and the classes that they index.

    Classes are in the order of their names (of their values, where a list gives whole numbers), unless `classes` gives those of
    the training part. Files in folders have labels where all lie in <class>/<file> and there are two classes or more.

    Raises:
        ValueError: a class that is not among `classes`.
    """
    if written is None:
        paths = files.paths()
        tree = all(path.count("/") == 1 for path in paths)
        folders = [path.partition("/")[0] for path in paths] if tree else []
        written = folders if len(set(folders)) > 1 or classes else [""] * len(paths)
        names = set(written) - {""}
        numbers = False  # folders named 1 to 10 are sorted as text, as torchvision does
    else:
        names = set(written) - {"", "-1"}
        numbers = all(name.isdecimal() for name in names)
    if classes is None:
        classes = sorted(names, key=int if numbers else os.fsencode)
    elif classes and not names <= set(classes):
        strange = min(names - set(classes))
        raise ValueError(f"data.val: {where} has the class {strange!r}, which the training part has not; it has {_some(classes)}")
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number.get(name, -1) for name in written], np.int64), classes


def _only_folder(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        first = list(itertools.islice(entries, 100))  # a folder with more beside it wraps nothing, and may hold a million images
    folders = [Path(entry.path) for entry in first if entry.is_dir() and not entry.name.startswith(".")]
    return folders if len(folders) == 1 and len(first) < 100 else []


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
