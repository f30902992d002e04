"""Each fault case has a test, and the table says what was seen, what failed and what was not run."""

from __future__ import annotations

import re
from pathlib import Path

import case_table


def test_every_case_has_a_test():
    text = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    marked = {int(number) for number in re.findall(r"mark\.case\((\d+)\)", text)}
    assert marked == set(case_table.CASES) == set(range(1, 34))


def test_the_document_has_a_place_for_the_table():
    text = (case_table.ROOT / "docs" / "reliability.md").read_text()
    before, _, rest = text.partition(case_table.BEGIN)
    written, found, _ = rest.partition(case_table.END)
    assert before and found
    assert re.findall(r"^\| (\d+) \|", written, re.M) == [
        str(number) for number in case_table.CASES
    ]


def test_what_a_line_says():
    def result(number, outcome="passed", *seen, **more):
        return {"cases": [number], "seconds": 1.25, "outcome": outcome, "seen": list(seen), **more}

    results = {
        "tests/faults/test_a.py::test_x[one]": result(1, "passed", "ended | after 3 s"),
        "tests/faults/test_a.py::test_x[two]": result(1, "failed"),
        "tests/data/test_b.py::Test::test_y": result(2),
        "tests/test_c.py::test_z": result(3, "skipped", reason="needs a GPU"),
    }
    lines = {
        line.split("|")[1].strip(): line
        for line in case_table.table(results).splitlines()
        if line.startswith("| ")
    }
    assert lines["1"].endswith(
        "| **failed**: test_x[two]; ended \\| after 3 s | `faults/test_a.py test_x` | 2.5 |"
    )
    assert lines["2"].endswith("| 1 test passed | `data/test_b.py Test test_y` | 1.2 |")
    assert lines["3"].endswith("| skipped: needs a GPU | `test_c.py test_z` | 1.2 |")
    assert lines["4"].endswith("| **not run** |  | 0.0 |")
