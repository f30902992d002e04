"""Lists of images and tables of labels, as people, spreadsheets and data-frame libraries write them.

The delimiter, the column of paths and the folder that paths are relative to are not guessed from names: they are
the ones with which the files exist.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ssl_pretrain.data import listing
from ssl_pretrain.data.listing import Listing

_DELIMITERS = (",", ";", "\t", "|")
_HEAD = 1 << 16  # characters of a list that tell how the rest is written
_MAX_COLUMNS = 50
_PATHS = ("path", "paths", "file", "files", "filename", "filepath", "image", "images")
_SAMPLE = 20  # rows that are looked up on disk to find out how a list is written
_LABELS = (
    "label",
    "labels",
    "class",
    "classname",
    "labelname",
    "category",
    "target",
    "species",
    "classid",
    "labelid",
    "y",
)
_INDEX = ("", "index", "unnamed0", "rownames", "rowid")
_SPLIT_COLUMNS = ("split", "splits", "subset", "partition", "phase", "fold", "set", "usage")
_MISSING = frozenset(
    {"", "-1", "-1.0", "nan", "NaN", "NA", "<NA>"}
)  # as pandas, polars and R write "no value"
ROLES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def role(name: str) -> str | None:
    """Return "train", "val" or "test" for the usual names of splits in any case, None for any other name."""
    return ROLES.get(name.strip().lower())


@dataclass(frozen=True)
class FileList:
    """The rows of a list that belong to one split.

    files: the images, in the list's order. labels: as written, "" for none. notes: how the list was read, where it is not plain.
    """

    files: Listing
    labels: list[str]
    notes: tuple[str, ...] = ()
    by_split: bool = False  # a column says which split a row belongs to


@dataclass(frozen=True)
class _Form:
    """How a table is written: what separates its cells, which column has the paths, and whether its first row is a header."""

    delimiter: str
    column: int
    has_header: bool
    share: float  # of the sampled rows, those whose path was found


@dataclass(frozen=True)
class _Table:
    """All rows of a list, and what is known about its columns."""

    rows: list[list[str]]
    column: int  # of the paths
    has_header: bool

    @property
    def header(self) -> list[str]:
        """The header's names, lower case letters and digits alone; empty without a header."""
        return (
            [re.sub(r"[^a-z0-9]", "", cell.lower()) for cell in self.rows[0]]
            if self.has_header
            else []
        )

    @property
    def body(self) -> list[list[str]]:
        return self.rows[1:] if self.has_header else self.rows


def open_list(
    path: Path, split: str, cache: Path, key: str = "data.root", root: Path | None = None
) -> FileList:
    """Read a list of images: one row per image, with its path and, in another column, its label.

    Args:
        path: The list.
        split: "train", "val" or "test". Matters only where a column says which split a row belongs to.
        cache: Folder of the listings, for lists that name images without their folders or suffixes.
        key: The configuration key that named the list, for messages.
        root: Another folder that paths may be relative to.

    Raises:
        ValueError: The list is not text, or none of its first images exists.
    """
    folder = Path(os.path.abspath(path)).parent
    texts = _texts(path.read_bytes(), f"{key}: {path}")
    head = list(_rows(_head(texts[0]), ",", 2))
    if not head or (
        len(head) == 1 and not listing.is_image(head[0][0]) and head[0][0].strip().lower() in _PATHS
    ):
        return FileList(listing.pack(str(folder), []), [])
    bases = list(
        dict.fromkeys([folder, *([root] if root else []), *list(folder.parents)[:2], Path.cwd()])
    )
    text, form, base, change = _best_form(texts, bases)
    names: dict[str, str | None] = {}
    if form.share <= 0:
        for base in (folder, *([root] if root else [])):
            names = _names(listing.of_folder(base, cache).paths())
            form, change = _form(text, partial(_is_named, names)), _stripped
            if form.share > 0:
                break
    if form.share <= 0:
        first = _first_path(head)
        raise ValueError(
            f"{key}: {path} begins with {first!r}, which is not in {folder}; paths are relative to the list's folder"
        )
    table = _Table(list(_rows(text, form.delimiter)), form.column, form.has_header)
    rows = [row for row in table.body if len(row) > table.column and row[table.column].strip()]
    rows, split_notes = _rows_of_split(table, rows, split, f"{key}: {path}")
    paths = [change(row[table.column]) for row in rows]
    notes = list(split_notes)
    if names:
        paths = [_look_up(names, name) or name for name in paths]
        notes.append(
            f"{path} names its images without their folders or suffixes; they were found below {base}"
        )
    elif base != folder or change(r"a\b/c") != _stripped(r"a\b/c"):
        notes.append(
            f"the paths in {path} were found below {base}, as in {paths[0] if paths else ''}"
        )
    if num_repeated := len(paths) - len(set(paths)):
        notes.append(
            f"{num_repeated:,} of {len(paths):,} rows of {path} name an image that an earlier row names, and it is read as often"
        )
    labels, label_note = _labels(table, rows)
    return FileList(
        listing.pack(str(base), paths), labels, (*notes, *label_note), bool(split_notes)
    )


def label_table(content: bytes, names: Iterable[str]) -> dict[str, str]:
    """Read the label of each image from a table that is not a list of paths, such as `val_annotations.txt`.

    Args:
        content: The table's bytes.
        names: Paths of the images. A row belongs to the one that has its file name, or that name without the suffix.

    Returns:
        Label by path, for the images that the table names; empty if it names none.
    """
    known = _names(names)
    try:
        texts = _texts(content, "")
    except ValueError:
        return {}
    form = _form(texts[0], partial(_is_named, known))
    if form.share <= 0:
        return {}
    table = _Table(list(_rows(texts[0], form.delimiter)), form.column, form.has_header)
    rows = [row for row in table.body if len(row) > table.column]
    labels, _ = _labels(table, rows)
    found = [(_look_up(known, row[table.column]), label) for row, label in zip(rows, labels)]
    return {path: label for path, label in found if path is not None}


def _look_up(known: dict[str, str | None], cell: str) -> str | None:
    name = _stripped(cell)
    return known.get(name) or known.get(os.path.basename(name))


def _is_named(known: dict[str, str | None], cell: str) -> bool:
    return _look_up(known, cell) is not None


def _names(paths: Iterable[str]) -> dict[str, str | None]:
    """Path by file name, alone or behind its folder, with its suffix and without; None where two images share it."""
    paths = list(paths)
    names: dict[str, str | None] = {}
    for num_parts, has_suffix in itertools.product((1, 2), (True, False)):
        found: dict[str, str | None] = {}
        for path in paths:
            name = "/".join(
                (path if has_suffix else os.path.splitext(path)[0]).split("/")[-num_parts:]
            )
            found[name] = None if name in found else path
        names = found | names
    return names


def _texts(content: bytes, what: str) -> list[str]:
    """The content as text, in the encodings that it may have, without a byte-order mark."""
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return [content.decode("utf-16")]
        if b"\0" in content:
            raise ValueError("it holds zero bytes")
        try:
            return [content.decode("utf-8-sig")]
        except UnicodeDecodeError:  # file names that are no UTF-8, or a spreadsheet's own encoding
            return [content.decode("utf-8", "surrogateescape"), content.decode("cp1252", "replace")]
    except ValueError as error:
        raise ValueError(f"{what} is not a list of paths: {error}") from None


def _rows(text: str, delimiter: str, limit: int | None = None) -> Iterable[list[str]]:
    """The non-empty rows; delimiter " " splits at the last white space of a line, "" not at all."""
    text = re.sub(
        r"\A(sep=.\r?\n)?(#[ \t].*\r?\n)*", "", text
    )  # how some spreadsheets begin, and comments
    if delimiter in ("", " "):
        lines = (line.strip() for line in io.StringIO(text))
        rows: Iterable[list[str]] = (
            line.rsplit(None, 1) if delimiter else [line] for line in lines
        )
    else:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return itertools.islice((row for row in rows if any(cell.strip() for cell in row)), limit)


def _head(text: str) -> str:
    """The first lines, which tell how the rest is written."""
    return text if len(text) <= _HEAD else text[: text.rfind("\n", 0, _HEAD) + 1] or text


def _form(text: str, exists: Callable[[str], bool]) -> _Form:
    """The delimiter and the column with which the most of the sampled rows name a file."""
    head, best = _head(text), _Form("", 0, False, -1.0)
    for delimiter in (*_DELIMITERS, " ", ""):
        try:
            rows = list(_rows(head, delimiter, 10 * _SAMPLE))
        except csv.Error:
            continue
        body = rows[1:] or rows
        body = body[:: max(1, len(body) // _SAMPLE)]
        for column in range(min(_MAX_COLUMNS, max(map(len, body), default=0))):
            cells = [row[column].strip() for row in body if len(row) > column]
            first = rows[0][column].strip() if len(rows[0]) > column else ""
            is_first = bool(first) and exists(first)
            share = (sum(bool(cell) and exists(cell) for cell in cells) + is_first) / (
                len(body) + is_first
            )
            if share > best.share:
                best = _Form(
                    delimiter,
                    column,
                    len(rows) > 1 and not is_first and not listing.is_image(first),
                    share,
                )
        if best.share == 1:
            break
    return best


def _is_file(base: Path, change: Callable[[str], str], cell: str) -> bool:
    return os.path.isfile(base / change(cell))


def _best_form(
    texts: list[str], bases: list[Path]
) -> tuple[str, _Form, Path, Callable[[str], str]]:
    """The text, its form, and the folder and spelling with which the most of the sampled paths are files."""
    found = []
    for text, (base, change) in itertools.product(texts, _ways(texts[0], bases)):
        form = _form(text, partial(_is_file, base, change))
        found.append((text, form, base, change))
        if form.share > 0.5:
            break
    return max(found, key=lambda way: way[1].share)


def _first_path(rows: list[list[str]]) -> str:
    cells = [row[0].strip() for row in rows]
    return next((cell for cell in cells if listing.is_image(cell)), cells[0])


def _stripped(path: str) -> str:
    return path.strip()


def _ways(text: str, bases: list[Path]) -> list[tuple[Path, Callable[[str], str]]]:
    """Ways to make a file of a path as written: relative to each folder, with slashes, without its first folders."""
    ways: list[tuple[Path, Callable[[str], str]]] = [(base, _stripped) for base in bases]
    sample = list(_rows(_head(text), "", _SAMPLE))[-1:]
    if sample and "\\" in sample[0][0]:
        ways += [(base, lambda path: path.strip().replace("\\", "/")) for base in bases]
    deepest = len(re.split(r"[/\\]", sample[0][0])) if sample else 0

    def without(first: int) -> Callable[[str], str]:
        return lambda path: "/".join(re.split(r"[/\\]", path.strip())[first:])

    return ways + [(bases[0], without(first)) for first in range(1, min(deepest, 12))]


def _rows_of_split(
    table: _Table, rows: list[list[str]], split: str, what: str
) -> tuple[list[list[str]], list[str]]:
    """The rows of one split, where a column tells the splits apart."""
    column = _split_column(table, rows)
    if column is None:
        return rows, []
    names = {row[column].strip() for row in rows if len(row) > column}
    roles = {name: role(name) for name in names}
    wanted = split
    if split == "val" and "val" not in roles.values():
        wanted = "test"
    chosen = [row for row in rows if len(row) > column and roles[row[column].strip()] == wanted]
    title = table.rows[0][column] if table.has_header else str(column + 1)
    return chosen, [
        f"{what.partition(': ')[2]}: the rows whose column {title!r} says {wanted}: {len(chosen):,} of {len(rows):,}"
    ]


def _split_column(table: _Table, rows: list[list[str]]) -> int | None:
    """The column in which every row names a split, with two different ones or under a header that says so."""
    for column in range(min(_MAX_COLUMNS, max(map(len, rows), default=0))):
        if column == table.column:
            continue
        values = {row[column].strip() if len(row) > column else "" for row in rows}
        titled = column < len(table.header) and table.header[column] in _SPLIT_COLUMNS
        roles = {role(value) for value in values if value}
        if roles and None not in roles and (titled or ("train" in roles and len(roles) > 1)):
            return column
    return None


def _labels(table: _Table, rows: list[list[str]]) -> tuple[list[str], list[str]]:
    """The label of each row as written, "" for none, and a note where the column of labels is not plain."""
    column, note = _label_column(table, rows)
    if column is None:
        return [""] * len(rows), note
    written = [row[column].strip() if len(row) > column else "" for row in rows]
    return _plain_labels(written), note


def _label_column(table: _Table, rows: list[list[str]]) -> tuple[int | None, list[str]]:
    width = max(map(len, rows), default=0)
    excluded = {table.column, _split_column(table, rows), _index_column(table, rows)}
    others = [column for column in range(width) if column not in excluded]
    if not table.has_header:
        after = [column for column in others if column > table.column]
        return next(iter(after or others), None), []
    titles = {
        title: column
        for column, title in reversed(list(enumerate(table.header)))
        if column in others
    }
    known = next((titles[title] for title in _LABELS if title in titles), None)
    if known is not None:
        return known, []
    if len(others) == 1:
        return others[0], [f"labels are the column {table.rows[0][others[0]]!r}"] if others[
            0
        ] < len(table.rows[0]) else []
    if others:
        names = ", ".join(repr(name) for name in table.rows[0])
        return None, [f"of the columns {names} none is called label, so the images have no labels"]
    return None, []


def _index_column(table: _Table, rows: list[list[str]]) -> int | None:
    """The first column, where it numbers the rows as data-frame libraries do."""
    if table.column == 0:
        return None
    if table.header:
        return 0 if table.header[0] in _INDEX else None
    numbers = [row[0].strip() for row in rows[:_SAMPLE]]
    return (
        0
        if numbers
        in ([str(i) for i in range(len(numbers))], [str(i + 1) for i in range(len(numbers))])
        else None
    )


def _plain_labels(written: list[str]) -> list[str]:
    """Labels with missing values as "", and whole numbers without a decimal point, which a missing value gives them."""
    labels = ["" if label in _MISSING else label for label in written]
    given = set(labels) - {""}
    if any("." in label for label in given) and all(
        re.fullmatch(r"\d+(\.0+)?", label) for label in given
    ):
        return [label.partition(".")[0] for label in labels]
    return labels
