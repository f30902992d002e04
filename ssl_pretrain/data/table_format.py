"""Detect the format of a list of images: encoding, delimiter and column of paths.

These are not guessed from names. The right ones are those with which the files exist.
"""

import codecs
import csv
import io
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ssl_pretrain.data.file_types import is_image

MAX_COLUMNS = 50
SAMPLE_ROWS = 20  # rows whose paths are looked up
_DELIMITERS = (",", ";", "\t", "|", " ", "")
_HEAD_CHARACTERS = 1 << 16  # beginning of a list, from which the format is detected


@dataclass(frozen=True)
class TableFormat:
    """The format of a table."""

    delimiter: str  # " " splits a line at its last white space, "" does not split it
    path_column: int
    has_header: bool
    match_share: float  # share of the sampled rows whose path exists


def decode_text(content: bytes, where: str) -> list[str]:
    """Return the content as text, in each encoding that it may have.

    Raises:
        ValueError: If it is not text. The message begins with `where`.
    """
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return [content.decode("utf-16")]
        if b"\0" in content:
            raise ValueError("it holds zero bytes")
        try:
            return [content.decode("utf-8-sig")]
        except UnicodeDecodeError:  # file names in bytes, or the encoding of a spreadsheet
            return [content.decode("utf-8", "surrogateescape"), content.decode("cp1252", "replace")]
    except ValueError as error:
        raise ValueError(f"{where} is not a list of paths: {error}") from None


def read_rows(text: str, delimiter: str, limit: int | None = None) -> list[list[str]]:
    """Return the rows that are not empty, without comments at the top. At most `limit` rows."""
    # Some spreadsheets begin with a line such as "sep=;".
    text = re.sub(r"\A(sep=.\r?\n)?(#[ \t].*\r?\n)*", "", text)
    rows: Iterable[list[str]]
    if delimiter in ("", " "):
        lines = (line.strip() for line in io.StringIO(text))
        rows = (line.rsplit(None, 1) if delimiter else [line] for line in lines)
    else:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    not_empty = (row for row in rows if any(cell.strip() for cell in row))
    return list(itertools.islice(not_empty, limit))


def head(text: str) -> str:
    """Return the first whole lines of a text."""
    if len(text) <= _HEAD_CHARACTERS:
        return text
    return text[: text.rfind("\n", 0, _HEAD_CHARACTERS) + 1] or text


def detect_format(text: str, exists: Callable[[str], bool]) -> TableFormat:
    """Return the format in which the largest share of a sample of rows names an existing file."""
    best = TableFormat("", 0, has_header=False, match_share=-1.0)
    for delimiter in _DELIMITERS:
        try:
            rows = read_rows(head(text), delimiter, 10 * SAMPLE_ROWS)
        except csv.Error:
            continue
        body = rows[1:] or rows
        body = body[:: max(1, len(body) // SAMPLE_ROWS)]
        for column in range(min(MAX_COLUMNS, max(map(len, body), default=0))):
            first, *cells = (
                row[column].strip() if len(row) > column else "" for row in (rows[0], *body)
            )
            first_exists = bool(first) and exists(first)
            num_matches = sum(bool(cell) and exists(cell) for cell in cells) + first_exists
            share = num_matches / (len(body) + first_exists)
            if share > best.match_share:
                has_header = len(rows) > 1 and not first_exists and not is_image(first)
                best = TableFormat(delimiter, column, has_header, share)
        if best.match_share == 1:
            break
    return best
