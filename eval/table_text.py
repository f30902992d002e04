r"""Write tables of means and deviations over seeds as Markdown, CSV and LaTeX.

>>> table = MeasureTable(
...     columns=[TableColumn("linear, %", best="highest")],
...     rows=[
...         TableRow("SimCLR", [(44.2, 45.2)]),
...         TableRow("raw pixels", [(38.6,)], is_reference=True),
...         TableRow("SimSiam", [(40.1, 40.3)]),
...     ],
... )
>>> print(table.markdown())
| run | seeds | linear, % |
|---|---|---|
| SimCLR | 2 | **44.7 ± 0.7** |
| raw pixels | 1 | 38.6 |
| SimSiam | 2 | 40.2 ± 0.1 |
>>> print(table.csv(), end="")
run,seeds,"linear, % (mean)","linear, % (deviation)"
SimCLR,2,44.7,0.707107
raw pixels,1,38.6,
SimSiam,2,40.2,0.141421
"""

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssl_pretrain.system import durable_files, markdown

MISSING = "-"
PLUS_MINUS = "±"
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    PLUS_MINUS: r"$\pm$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class TableColumn:
    """A column of numbers."""

    title: str
    # Which mean is the best one and is shown in bold, or "" if none is.
    best: Literal["highest", "lowest", ""] = ""


@dataclass(frozen=True)
class TableRow:
    """A row of the table, with the values of every column, one per seed.

    Values that are not finite do not count. A cell may be empty. A reference row, such as raw
    pixels, is never in bold.
    """

    title: str
    cells: Sequence[Sequence[float]]
    is_reference: bool = False
    missing: str = MISSING  # text of a cell without a finite value

    def num_seeds(self) -> int:
        """Return the largest number of finite values in a cell."""
        return max((sum(map(math.isfinite, values)) for values in self.cells), default=0)


@dataclass
class MeasureTable:
    """A table with one row per method or variant and one column per measure."""

    columns: Sequence[TableColumn]
    rows: Sequence[TableRow]
    corner: str = "run"  # title of the first column
    counted: str = "seeds"  # title of the second column, which has the numbers of values
    decimals: list[int] = field(init=False)  # digits after the point, by column

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row.cells) == len(self.columns), "a row needs a cell per column"
        self.decimals = [
            num_decimals([mean(row.cells[index]) for row in self.rows])
            for index in range(len(self.columns))
        ]

    def cell_text(self, row: TableRow, index: int) -> str:
        """Return the mean of a cell with the standard deviation over seeds, if there is one."""
        text = format_mean(row.cells[index], self.decimals[index])
        return row.missing if text == MISSING else text

    def is_best(self, row: TableRow, index: int) -> bool:
        """Return True if no other row has a better mean in this column, as it is printed.

        Rows with the same printed mean are equally good. None is the best if all are the same.
        """
        best = self.columns[index].best
        if not best or row.is_reference:
            return False
        candidates = [mean(other.cells[index]) for other in self.rows if not other.is_reference]
        means = [round(value, self.decimals[index]) for value in candidates if math.isfinite(value)]
        value = round(mean(row.cells[index]), self.decimals[index])
        winner = max(means, default=math.nan) if best == "highest" else min(means, default=math.nan)
        return value == winner and min(means) < max(means)

    def markdown(self) -> str:
        """Return the table in Markdown, without a trailing newline."""
        return markdown.table(
            [_escape_markdown(title) for title in self._header()],
            self._text_rows(_escape_markdown, lambda text: f"**{text}**"),
        )

    def latex(self) -> str:
        """Return the table as a LaTeX `tabular` that needs the package booktabs."""
        rows = self._text_rows(escape_latex, lambda text: f"\\textbf{{{text}}}")
        return latex_table([escape_latex(title) for title in self._header()], rows)

    def csv(self) -> str:
        """Return the table as CSV, with the mean and the deviation in columns of their own."""
        content = io.StringIO()
        writer = csv.writer(content, lineterminator="\n")
        titles = [
            f"{column.title} ({statistic})"
            for column in self.columns
            for statistic in ("mean", "deviation")
        ]
        writer.writerow([self.corner, self.counted, *titles])
        for row in self.rows:
            numbers = [statistic(values) for values in row.cells for statistic in (mean, deviation)]
            texts = [f"{number:.6g}" if math.isfinite(number) else "" for number in numbers]
            writer.writerow([row.title, row.num_seeds(), *texts])
        return content.getvalue()

    def _header(self) -> list[str]:
        return [self.corner, self.counted, *(column.title for column in self.columns)]

    def _text_rows(
        self, escape: Callable[[str], str], emphasize: Callable[[str], str]
    ) -> list[list[str]]:
        """Return the rows as text, with the best value of each column emphasized."""
        rows = []
        for row in self.rows:
            cells = [escape(self.cell_text(row, index)) for index in range(len(self.columns))]
            cells = [
                emphasize(text) if self.is_best(row, index) else text
                for index, text in enumerate(cells)
            ]
            rows.append([escape(row.title), str(row.num_seeds()), *cells])
        return rows


def write_csv_and_latex(table: MeasureTable, path: Path) -> list[Path]:
    """Write the table as CSV and LaTeX beside a Markdown file, and return both paths.

    Args:
        table: The table.
        path: Path of the Markdown file, which is not written. The endings are replaced.
    """
    contents = {".csv": table.csv(), ".tex": table.latex()}
    for suffix, content in contents.items():
        durable_files.replace(path.with_suffix(suffix), content)
    return [path.with_suffix(suffix) for suffix in contents]


def mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values, or NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation of the finite values, or NaN for fewer than two."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.stdev(finite) if len(finite) > 1 else math.nan


def num_decimals(means: Sequence[float]) -> int:
    """Return the digits after the point that suit a column, from the largest of its means.

    Numbers from 10 to 1,000, such as percentages, get one. Columns of smaller numbers get up to
    four, so that the largest has three digits.
    """
    largest = max((abs(value) for value in means if math.isfinite(value)), default=0.0)
    if largest == 0 or 10 <= largest < 1000:
        return 1
    return min(4, max(0, 2 - math.floor(math.log10(largest))))


def format_mean(values: Sequence[float], decimals: int) -> str:
    """Format the mean of values, and their standard deviation if there are two or more."""
    center, spread = mean(values), deviation(values)
    if not math.isfinite(center):
        return MISSING
    text = f"{center:.{decimals}f}"
    return f"{text} {PLUS_MINUS} {spread:.{decimals}f}" if math.isfinite(spread) else text


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return cells of LaTeX as a `tabular` that needs the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return f"{' & '.join(cells)} \\\\"

    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            "\\toprule",
            line(header),
            "\\midrule",
            *map(line, rows),
            "\\bottomrule",
            "\\end{tabular}\n",
        ]
    )


def escape_latex(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return "".join(LATEX_ESCAPES.get(character, character) for character in text)


def _escape_markdown(text: str) -> str:
    """Escape what would end a table's cell or start emphasis, code or HTML."""
    return re.sub(r"([\\|*`]|(?<!\w)_|_(?!\w))", r"\\\1", text).replace("<", "&lt;")
