"""Tables of a page as data URLs of Markdown, CSV and LaTeX files."""

import csv
import io
from collections.abc import Sequence
from urllib.parse import quote

from ssl_pretrain.eval.table_text import MeasureTable, escape_latex, latex_table
from ssl_pretrain.system import markdown

Download = tuple[str, str, str]  # name of the format, name of the file, and data URL


def measure_downloads(table: MeasureTable, file_name: str) -> list[Download]:
    """Return the downloads of a table of means and deviations.

    Args:
        table: The table.
        file_name: Name of the files without a suffix.
    """
    return _downloads(file_name, f"{table.markdown()}\n", table.csv(), table.latex())


def text_downloads(
    header: Sequence[str], rows: Sequence[Sequence[str]], file_name: str
) -> list[Download]:
    """Return the downloads of a table of text."""
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([header, *rows])
    escaped_rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    latex_header, *latex_rows = [list(map(escape_latex, row)) for row in (header, *rows)]
    return _downloads(
        file_name,
        f"{markdown.table(header, escaped_rows)}\n",
        content.getvalue(),
        latex_table(latex_header, latex_rows),
    )


def _downloads(
    file_name: str, markdown_text: str, csv_text: str, latex_text: str
) -> list[Download]:
    contents = (
        ("Markdown", "md", "text/markdown", markdown_text),
        ("CSV", "csv", "text/csv", csv_text),
        ("LaTeX", "tex", "application/x-tex", latex_text),
    )
    downloads = []
    for name, suffix, media_type, text in contents:
        quoted = quote(text.encode(errors="backslashreplace"))  # names may have bytes of no letter
        address = f"data:{media_type};charset=utf-8,{quoted}"
        downloads.append((name, f"{file_name}.{suffix}", address))
    return downloads
