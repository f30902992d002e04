"""The predicted tables: written between the marks of their page, from the plan's own numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_configs import FIRST, _reduced
from test_estimate import TOY

from ssl_pretrain.parallel.memory import ROOM
from ssl_pretrain.planning import scaling

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_tables_go_between_the_marks_and_nothing_else_moves(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    for _ in range(2):
        scaling.write(page, "| new |")
        assert page.read_text() == f"before\n{scaling.BEGIN}\n\n| new |\n\n{scaling.END}\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(ValueError) as error:
        scaling.write(page, "| new |")
    assert (
        str(error.value)
        == f"{page}: no lines {scaling.BEGIN!r} and {scaling.END!r}; the tables go between them"
    )


def test_a_share_that_does_not_fit_is_fed_in_parts_with_batch_norm_over_one(tmp_path):
    run = replace(
        _reduced(next(path for path in FIRST if path.stem == "simclr_imagenet"), tmp_path),
        global_batch_size=32,
    )
    whole, program = scaling.predicted(run, 2, TOY, None)
    assert (whole.images, whole.group) == (16, 32)
    tight = replace(TOY, memory=(sum(program.memory(8).values()) + 1) / ROOM)
    parts, _ = scaling.predicted(run, 2, tight, program)
    assert (parts.images, parts.group, parts.batch) == (8, 8, 32)
    assert parts.step.compute > whole.step.compute  # each part is embedded twice
    table = list(scaling._table([whole, replace(whole, gpus=4)]))
    assert [row.split(" | ")[10] for row in table[2:]] == ["100%", "50%"]  # of linear


@pytest.mark.full
def test_the_page_is_what_the_command_writes():
    between = PAGE.read_text().partition(scaling.BEGIN)[2].partition(scaling.END)[0]
    assert between.strip() == "\n\n".join(scaling.tables()).strip()
