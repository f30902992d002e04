"""Lists of images and tables of labels, however people and programs write them."""

import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain.data.file_types import is_image
from ssl_pretrain.data.folder_listing import list_folder
from ssl_pretrain.data.listing import Listing, pack
from ssl_pretrain.data.table_columns import Table
from ssl_pretrain.data.table_format import (
    SAMPLE_ROWS,
    TableFormat,
    decode_text,
    detect_format,
    head,
    read_rows,
)

_PATH_TITLES = ("path", "paths", "file", "files", "filename", "filepath", "image", "images")
_MAX_DROPPED_FOLDERS = 11


@dataclass(frozen=True)
class FileList:
    """The rows of a list that belong to one split."""

    files: Listing  # the images, in the order of the list
    labels: list[str]  # labels in the list, "" for none
    notes: tuple[str, ...] = ()  # how the list was read
    has_split_column: bool = False  # a column says which split a row belongs to


def open_list(
    path: Path, split: str, cache: Path, key: str = "data.root", root: Path | None = None
) -> FileList:
    """Read a list of images: one row per image, with its path and perhaps its label.

    Args:
        path: The list.
        split: "train", "val" or "test". Only used if a column says which split a row belongs to.
        cache: Folder of the listings, for lists that name images without folders or suffixes.
        key: The configuration key that names the list, for messages.
        root: Another folder that paths may be relative to.

    Raises:
        ValueError: If the list is not text, or none of its first images exists.
    """
    folder = Path(os.path.abspath(path)).parent
    folders = [folder, *([root] if root else [])]
    texts = decode_text(path.read_bytes(), f"{key}: {path}")
    first_cells = [row[0].strip() for row in read_rows(head(texts[0]), ",", 2)]
    if not first_cells or (len(first_cells) == 1 and first_cells[0].lower() in _PATH_TITLES):
        return FileList(pack(str(folder), []), [])
    text, form, rule = _best_rule(texts, [*folders, *list(folder.parents)[:2], Path.cwd()])
    names: NameIndex | None = None
    if form.match_share <= 0:
        for rule in map(_PathRule, folders):
            names = NameIndex(list_folder(rule.base, cache).paths())
            form = detect_format(text, names.has)
            if form.match_share > 0:
                break
        else:
            first = next(filter(is_image, first_cells), first_cells[0])
            raise ValueError(
                f"{key}: {path} begins with {first!r}, which is not in {folder}; "
                "paths are relative to the list's folder"
            )
    table, split_note = Table.parse(text, form).select_split(split)
    paths = [rule.convert(cell) for cell in table.cells(table.path_column)]
    notes = [f"{path}: {split_note}"] if split_note else []
    if names is not None:
        paths = [names.find(cell) or cell for cell in paths]
        notes.append(
            f"{path} names its images without their folders or suffixes; "
            f"they were found below {rule.base}"
        )
    elif rule != _PathRule(folder):
        example = paths[0] if paths else ""
        notes.append(f"the paths in {path} were found below {rule.base}, as in {example}")
    if num_repeated := len(paths) - len(set(paths)):
        notes.append(
            f"{num_repeated:,} of {len(paths):,} rows of {path} repeat the image of an "
            "earlier row; it is used once per row"
        )
    labels, label_notes = table.labels()
    return FileList(pack(str(rule.base), paths), labels, (*notes, *label_notes), bool(split_note))


def labels_from_table(content: bytes, paths: Iterable[str]) -> dict[str, str]:
    """Read labels from a table that is not a list of paths, such as `val_annotations.txt`.

    Args:
        content: The bytes of the table.
        paths: Paths of the images. A row belongs to the image with its file name, or with that
            name without the suffix.

    Returns:
        The label by path, for the images that the table names. Empty if it names none.
    """
    names = NameIndex(paths)
    try:
        text = decode_text(content, "")[0]
    except ValueError:
        return {}
    form = detect_format(text, names.has)
    if form.match_share <= 0:
        return {}
    table = Table.parse(text, form)
    images = [names.find(cell) for cell in table.cells(table.path_column)]
    labels, _ = table.labels()
    return {path: label for path, label in zip(images, labels) if path is not None}


class NameIndex:
    """Images by file name, alone or behind its folder, with its suffix or without."""

    def __init__(self, paths: Iterable[str]):
        paths = list(paths)
        self._paths: dict[str, str | None] = {}  # None where two images share the name
        for num_levels, has_suffix in itertools.product((1, 2), (True, False)):
            level: dict[str, str | None] = {}
            for path in paths:
                name = path if has_suffix else os.path.splitext(path)[0]
                name = "/".join(name.split("/")[-num_levels:])
                level[name] = None if name in level else path
            self._paths = level | self._paths

    def find(self, cell: str) -> str | None:
        """Return the path of the only image with this name."""
        name = cell.strip()
        return self._paths.get(name) or self._paths.get(os.path.basename(name))

    def has(self, cell: str) -> bool:
        """Return True if exactly one image has this name."""
        return self.find(cell) is not None


@dataclass(frozen=True)
class _PathRule:
    """A way to find the file that a path in a list means."""

    base: Path  # the folder that paths are relative to
    num_dropped: int = 0  # first folders of the path that are ignored
    has_backslashes: bool = False

    def convert(self, cell: str) -> str:
        """Return the path relative to `base`."""
        path = cell.strip()
        if self.num_dropped:
            return "/".join(re.split(r"[/\\]", path)[self.num_dropped :])
        return path.replace("\\", "/") if self.has_backslashes else path

    def has_file(self, cell: str) -> bool:
        """Return True if the path of this cell is a file."""
        return os.path.isfile(self.base / self.convert(cell))


def _best_rule(texts: list[str], bases: list[Path]) -> tuple[str, TableFormat, _PathRule]:
    """Return the text, format and rule by which the largest share of sampled paths exists."""
    results = []
    for text, rule in itertools.product(texts, _rules(texts[0], bases)):
        form = detect_format(text, rule.has_file)
        results.append((text, form, rule))
        if form.match_share > 0.5:
            break
    return max(results, key=lambda result: result[1].match_share)


def _rules(text: str, bases: list[Path]) -> list[_PathRule]:
    """Return the rules to try, the plainest first."""
    bases = list(dict.fromkeys(bases))
    lines = read_rows(head(text), "", SAMPLE_ROWS)
    example = lines[-1][0] if lines else ""
    rules = [_PathRule(base) for base in bases]
    if "\\" in example:
        rules += [_PathRule(base, has_backslashes=True) for base in bases]
    num_levels = len(re.split(r"[/\\]", example))
    dropped = range(1, min(num_levels, _MAX_DROPPED_FOLDERS + 1))
    return rules + [_PathRule(bases[0], num_dropped) for num_dropped in dropped]
