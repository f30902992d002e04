"""Read lists of images and tables of labels in the formats that people and programs write."""

import csv
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain.data.caption_texts import NO_CAPTIONS
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
    captions: list[list[str]] | None = None  # one list per image; None without such a column


def read_list(
    path: Path,
    split: str,
    cache_dir: Path,
    key: str = "data.root",
    root: Path | None = None,
    caption_title: str = "",
) -> FileList:
    """Read a list of images: one row per image, with its path and perhaps its label or caption.

    If there are captions, several rows with the same path are several captions of one image.

    Args:
        path: Path of the list.
        split: "train", "val" or "test". Only used if a column names the split of each row.
        cache_dir: Folder for cached listings, which are used if the list names images without their
            folders or suffixes.
        key: The configuration key of the list, for messages.
        root: Another folder that paths may be relative to.
        caption_title: Title of the column of captions, an empty string for a usual title, or
            "none". A list of validation images need not have that column.

    Raises:
        ValueError: If the list is not text, none of the first images in it exist, or it has no such
            column.
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
    table = _parse(text, table_format, caption_title, f"{key}: {path}")
    table, split_note = table.select_split(split)
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
    labels, label_notes = table.labels()
    rows = _Rows(paths, labels, table.captions())
    if rows.captions is None and caption_title not in ("", NO_CAPTIONS):
        message = _no_captions_message(path, caption_title, table.titles)
        if split == "train":
            raise ValueError(message)
        notes.append(message)
    if rows.captions is not None:
        rows = rows.merge()
        notes += _caption_notes(path, rows, len(paths))
    elif num_repeated := len(paths) - len(set(paths)):
        notes.append(
            f"{num_repeated:,} of {len(paths):,} rows of {path} repeat the image of an "
            "earlier row; that image is used once per row"
        )
    listing = pack_paths(str(rule.base), rows.paths)
    return FileList(
        listing, rows.labels, (*notes, *label_notes), bool(split_note), captions=rows.captions
    )


def _parse(text: str, table_format: TableFormat, caption_title: str, name: str) -> Table:
    """Parse a list. Raise ValueError if a quotation mark is missing."""
    try:
        return Table.parse(text, table_format, caption_title)
    except csv.Error as error:
        raise ValueError(
            f"{name} cannot be split into columns ({error}); end each quoted cell with a "
            "quotation mark"
        ) from None


@dataclass(frozen=True)
class _Rows:
    """The rows of a list, in their order."""

    paths: list[str]
    labels: list[str]
    captions: list[list[str]] | None

    def merge(self) -> "_Rows":
        """Merge the rows with the same path into one, with all their captions and the first label.

        The images have the order of their first rows.
        """
        assert self.captions is not None, "only rows with captions are merged"
        labels: dict[str, str] = {}
        captions: dict[str, list[str]] = {}
        for path, label, texts in zip(self.paths, self.labels, self.captions):
            labels[path] = labels.get(path) or label
            captions.setdefault(path, []).extend(texts)
        return _Rows(list(captions), list(labels.values()), list(captions.values()))


def _no_captions_message(path: Path, title: str, titles: list[str]) -> str:
    """Return the message about a column of captions that a list does not have."""
    if not titles:
        return (
            f"data.caption_column: {path} has no names of columns; write them into its first row, "
            f"as in path,{title}"
        )
    return (
        f"data.caption_column: {path} has no captions in a column {title!r}; its columns are "
        f"{', '.join(titles)}; choose one of them, or set data.caption_column=none"
    )


def _caption_notes(path: Path, rows: _Rows, num_rows: int) -> list[str]:
    """Return notes on the rows that share an image, and on the images without a caption."""
    notes = []
    num_images = len(rows.paths)
    if num_rows > num_images:
        notes.append(f"the {num_rows:,} rows of {path} are captions of {num_images:,} images")
    missing = [name for name, texts in zip(rows.paths, rows.captions or []) if not texts]
    if missing:
        notes.append(
            f"{len(missing):,} of {num_images:,} images in {path} have no caption "
            f"(first: {missing[0]})"
        )
    return notes


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
