"""Tables of means and deviations: their formats, what is in bold, and what is escaped."""

import csv
import doctest
import io
import math

import pytest

from ssl_pretrain.eval import table_text
from ssl_pretrain.eval.table_text import MeasureTable, TableColumn, TableRow

ACCURACY = TableColumn("linear, %", best="highest")


def table(*cells, columns=(ACCURACY,)):
    """Return a table whose rows are called a, b, ... and have these cells."""
    rows = [TableRow(chr(ord("a") + number), row) for number, row in enumerate(cells)]
    return MeasureTable(columns, rows)


def bold(text):
    return [line for line in text.splitlines() if "**" in line or "textbf" in line]


def test_the_examples_of_the_documentation_are_right():
    assert doctest.testmod(table_text).failed == 0
    assert doctest.testmod(table_text).attempted > 0


def test_one_seed_has_no_deviation():
    single = table([[44.21]], [[40.0]])
    assert single.markdown().splitlines()[2:] == ["| a | 1 | **44.2** |", "| b | 1 | 40.0 |"]
    assert single.csv().splitlines()[1:] == ["a,1,44.21,", "b,1,40,"]
    assert "±" not in single.markdown() and "\\pm" not in single.latex()


def test_the_best_mean_of_each_column_is_bold_and_references_never_are():
    columns = (ACCURACY, TableColumn("error", best="lowest"), TableColumn("rank"))
    rows = [
        TableRow("a", [[50.0], [3.0], [9.0]]),
        TableRow("b", [[40.0], [2.0], [1.0]]),
        TableRow("raw pixels", [[99.0], [1.0], [20.0]], is_reference=True),
    ]
    lines = MeasureTable(columns, rows).markdown().splitlines()[2:]
    assert lines == [
        "| a | 1 | **50.0** | 3.00 | 9.0 |",
        "| b | 1 | 40.0 | **2.00** | 1.0 |",
        "| raw pixels | 1 | 99.0 | 1.00 | 20.0 |",
    ]


def test_rows_that_are_equal_as_printed_share_the_bold_face():
    assert len(bold(table([[50.01]], [[50.04]], [[49.0]]).markdown())) == 2
    assert len(bold(table([[50.01]], [[50.04]], [[49.0]]).latex())) == 2


@pytest.mark.parametrize("cells", [[[[50.01]], [[50.04]]], [[[50.0]]], [[[]], [[math.nan]]]])
def test_nothing_is_bold_where_nothing_is_better(cells):
    assert not bold(table(*cells).markdown())


def test_missing_and_infinite_values_are_no_numbers():
    gaps = table([[math.nan, 40.0, 42.0]], [[math.inf]], [[]])
    assert gaps.markdown().splitlines()[2:] == [
        "| a | 2 | 41.0 ± 1.4 |",
        "| b | 0 | - |",
        "| c | 0 | - |",
    ]
    assert gaps.csv().splitlines()[2:] == ["b,0,,", "c,0,,"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([12345.6, 3.0], ["12346", "3"]),
        ([123.45, 0.04], ["123.5", "0.0"]),
        ([44.25, 7.0], ["44.2", "7.0"]),
        ([4.567, 0.1], ["4.57", "0.10"]),
        ([0.4567, 0.1], ["0.457", "0.100"]),
        ([0.0000123], ["0.0000"]),
        ([0.0], ["0.0"]),
    ],
)
def test_a_column_has_one_number_of_decimals_that_suits_its_largest_mean(values, expected):
    numbers = table(*[[[value]] for value in values], columns=[TableColumn("x")])
    assert [numbers.cell_text(row, 0) for row in numbers.rows] == expected


def test_special_characters_are_escaped_in_every_format():
    row = TableRow(r"a|b_c _d & 5 % #1 {x} $y$ ~ ^ \z <i>", [[1.0, 3.0]])
    text = MeasureTable([TableColumn("top-5, %")], [row])
    name = text.markdown().splitlines()[2].removesuffix(" | 2 | 2.00 ± 1.41 |")
    assert name == r"| a\|b_c \_d & 5 % #1 {x} $y$ ~ ^ \\z &lt;i>"
    lines = text.latex().splitlines()
    assert lines[3] == r"run & seeds & top-5, \% \\"
    assert lines[5] == (
        r"a$|$b\_c \_d \& 5 \% \#1 \{x\} \$y\$ \textasciitilde{} \textasciicircum{} "
        r"\textbackslash{}z $<$i$>$ & 2 & 2.00 $\pm$ 1.41 \\"
    )
    (read,) = list(csv.DictReader(io.StringIO(text.csv())))
    assert read == {
        "run": row.title,
        "seeds": "2",
        "top-5, % (mean)": "2",
        "top-5, % (deviation)": "1.41421",
    }


def test_the_files_are_written_beside_the_markdown_file(tmp_path):
    numbers = table([[50.0]], [[40.0]])
    paths = table_text.write_csv_and_latex(numbers, tmp_path / "study.of.md")
    assert [path.name for path in paths] == ["study.of.csv", "study.of.tex"]
    assert [path.read_text() for path in paths] == [numbers.csv(), numbers.latex()]
    assert not (tmp_path / "study.of.md").exists()


def test_values_that_are_not_finite_are_not_counted_as_seeds():
    assert TableRow("a", [[float("nan"), 44.2], [1.0]]).num_seeds() == 1
