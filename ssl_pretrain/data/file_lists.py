"""Read lists of images and tables of labels in the formats that people and programs write."""

import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain.data.file_types import is_image
from ssl_pretrain.data.listing import Listing, list_folder, pack_paths
from ssl_pretrain.data.table_parsing import (
    NUM_SAMPLE_ROWS,
    Table,
    TableFormat,
    decode_text,
    detect_format,
    first_lines,
    read_rows,
)

_PATH_TITLES = ("path", "paths", "file", "files", "filename", "filepath", "image", "images")
_MAX_REMOVED_FOLDERS = 11  # leading folders that a rule may remove from each path


@dataclass(frozen=True)
class FileList:
    """The images of one split, from a list file, a folder or a zip."""

    files: Listing  # in the order of the list
    labels: list[str] | None  # one per image of a list, "" if it has none; None without a list
    notes: tuple[str, ...] = ()  # notes on how the list was read
    has_split_column: bool = False  # a column names the split of each row


def read_list(
    path: Path, split: str, cache_dir: Path, key: str = "data.root", root: Path | None = None
) -> FileList:
    """Read a list of images: one row per image, with its path and optionally its label.

    Args:
        path: Path of the list.
        split: "train", "val" or "test". Only used if a column names the split of each row.
        cache_dir: Folder for cached listings, which are used if the list names images without their
            folders or suffixes.
        key: The configuration key of the list, for messages.
        root: Another folder that paths may be relative to.

    Raises:
        ValueError: If the list is not text, or none of the first images in it exist.
    """
    folder = Path(os.path.abspath(path)).parent
    folders = [folder, *([root] if root else [])]
    texts = decode_text(path.read_bytes(), f"{key}: {path}")
    first_cells = [row[0].strip() for row in read_rows(first_lines(texts[0]), ",", 2)]
    if not first_cells or (len(first_cells) == 1 and first_cells[0].lower() in _PATH_TITLES):
        return FileList(pack_paths(str(folder), []), [])
    text, table_format, rule = _best_rule(texts, [*folders, *list(folder.parents)[:2], Path.cwd()])
    name_index: NameIndex | None = None
    if table_format.match_share <= 0:
        for rule in map(_PathRule, folders):
            name_index = NameIndex(list_folder(rule.base, cache_dir).paths())
            table_format = detect_format(text, name_index.find)
            if table_format.match_share > 0:
                break
        else:
            example = next(filter(is_image, first_cells), first_cells[0])
            raise ValueError(
                f"{key}: {path} begins with {example!r}, which is not in {folder}; "
                "write paths relative to the list's folder"
            )
    table, split_note = Table.parse(text, table_format).select_split(split)
    paths = [rule.convert(cell) for cell in table.cells(table.path_column)]
    notes = [f"{path}: {split_note}"] if split_note else []
    if name_index is not None:
        paths = [name_index.find(cell) or cell for cell in paths]
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
            "earlier row; that image is used once per row"
        )
    labels, label_notes = table.labels()
    listing = pack_paths(str(rule.base), paths)
    return FileList(listing, labels, (*notes, *label_notes), bool(split_note))


def labels_from_table(content: bytes, paths: Iterable[str]) -> dict[str, str]:
    """Read labels from a table that accompanies the images, such as `val_annotations.txt`.

    Args:
        content: The bytes of the table.
        paths: Paths of the images. The table may name them without folders and suffixes.

    Returns:
        Labels by path, for the images that the table names. Empty if it names none.
    """
    name_index = NameIndex(paths)
    try:
        text = decode_text(content, "")[0]
    except ValueError:
        return {}
    table_format = detect_format(text, name_index.find)
    if table_format.match_share <= 0:
        return {}
    table = Table.parse(text, table_format)
    images = [name_index.find(cell) for cell in table.cells(table.path_column)]
    labels, _ = table.labels()
    return {path: label for path, label in zip(images, labels) if path is not None}


class NameIndex:
    """Index of images by file name, with or without the last folder and the suffix."""

    def __init__(self, paths: Iterable[str]):
        paths = list(paths)
        self._paths: dict[str, str | None] = {}  # None if several images share the name
        for num_levels, has_suffix in itertools.product((1, 2), (True, False)):
            level: dict[str, str | None] = {}
            for path in paths:
                name = path if has_suffix else os.path.splitext(path)[0]
                name = "/".join(name.split("/")[-num_levels:])
                level[name] = None if name in level else path
            self._paths = level | self._paths

    def find(self, cell: str) -> str | None:
        """Return the path of the image with this name, or None unless exactly one has it."""
        return self._paths.get(cell) or self._paths.get(os.path.basename(cell))


@dataclass(frozen=True)
class _PathRule:
    """Rule that turns the paths in a list into paths of files."""

    base: Path  # the folder that paths are relative to
    num_removed_folders: int = 0  # leading folders to remove from each path
    has_backslashes: bool = False  # the list has backslashes between folders

    def convert(self, cell: str) -> str:
        """Return the path in a cell, relative to `base`."""
        if self.num_removed_folders:
            return "/".join(re.split(r"[/\\]", cell)[self.num_removed_folders :])
        return cell.replace("\\", "/") if self.has_backslashes else cell

    def has_file(self, cell: str) -> bool:
        """Return True if the path in this cell belongs to an existing file."""
        return os.path.isfile(self.base / self.convert(cell))


def _best_rule(texts: list[str], bases: list[Path]) -> tuple[str, TableFormat, _PathRule]:
    """Return the text, format and rule that find the largest share of the sampled paths."""
    results = []
    for text, rule in itertools.product(texts, _rules(texts[0], bases)):
        table_format = detect_format(text, rule.has_file)
        results.append((text, table_format, rule))
        if table_format.match_share > 0.5:
            break
    return max(results, key=lambda result: result[1].match_share)


def _rules(text: str, bases: list[Path]) -> list[_PathRule]:
    """Return the rules to try, simplest first."""
    bases = list(dict.fromkeys(bases))
    lines = read_rows(first_lines(text), "", NUM_SAMPLE_ROWS)
    example = lines[-1][0] if lines else ""
    rules = [_PathRule(base) for base in bases]
    if "\\" in example:
        rules += [_PathRule(base, has_backslashes=True) for base in bases]
    num_rules = min(len(re.split(r"[/\\]", example)), _MAX_REMOVED_FOLDERS + 1)
    return rules + [_PathRule(bases[0], num_removed) for num_removed in range(1, num_rules)]
