"""launch/methods.py: one method through the shared preset, and the table of what is there."""

from __future__ import annotations

import json

import pytest
import tiny

from ssl_pretrain import config, methods
from ssl_pretrain.launch import methods as table_of_methods


@pytest.mark.parametrize("name", methods.names())
def test_every_method_fits_the_preset(name):
    run = config.load(
        table_of_methods.ROOT / table_of_methods.CONFIG, table_of_methods.overrides_of(name)
    )
    config.check(run, 2)
    assert run.method.name == name and run.data.subset == 10000


def made_run(folder, knn, curve):
    (folder / "eval").mkdir(parents=True)
    rows = {
        "raw pixels": 30.0,
        "random, as built": 25.0,
        "random (better of two)": 28.0,
        "pretrained": knn,
    }
    (folder / "eval/knn.json").write_text(
        json.dumps(
            {
                "rows": [
                    {"features": name, "metrics": {"clean": value}} for name, value in rows.items()
                ]
            }
        )
    )
    records = [{"knn": value, "rankme": 12.5, "time": 60.0 * i} for i, value in enumerate(curve)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_table_has_the_means_the_margin_and_the_curve(tmp_path):
    for seed, knn in enumerate((40.0, 42.0, 44.0)):
        made_run(tmp_path / f"byol_{seed}", knn, [0.2, 0.304, 0.4])
    made_run(tmp_path / "barlow_twins_0", 29.0, [0.28, 0.29])
    lines = table_of_methods.table(tmp_path).splitlines()
    assert (
        "| raw pixels | | 30.0 | | | | |" in lines
        and "| random (better of two) | | 28.0 | | | | |" in lines
    )
    assert "| byol | 3 | 42.0 ± 2.0 | +14.0 | 12.5 ± 0.0 | 2.0 ± 0.0 | 20 30 40 |" in lines
    assert "| barlow_twins | 1 | 29.0 | +1.0 (under 3) | 12.5 | 1.0 | 28 29 |" in lines


def test_a_table_without_rows_is_not_written(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("numbers of many hours\n")
    arguments = ["--table-only", "--runs", str(tmp_path / "runs")]
    assert table_of_methods.main([*arguments, "--table", str(page)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'runs'}: no run there has been evaluated, so no table was written\n"
    )
    assert page.read_text() == "numbers of many hours\n"


def test_the_table_goes_beside_the_runs(tmp_path, capsys):
    made_run(tmp_path / "byol_0", 40.0, [0.2, 0.4])
    assert table_of_methods.main(["--table-only", "--runs", str(tmp_path)]) == 0
    assert (
        capsys.readouterr().out == f"{tmp_path / 'methods.md'}\n"
        and "| byol | 1 |" in (tmp_path / "methods.md").read_text()
    )


@pytest.mark.full
def test_one_command_trains_judges_and_writes(tmp_path):
    data = tiny.images(tmp_path / "images")
    arguments = [f"data.root={data}", "data.source=folder", "data.subset=0", "global_batch_size=24", "epochs=1", "launch.ranks=1",
                 "evaluation.k=3", "online.k=3", "health.every_steps=1", "views.crops.global.size=16", "--methods", "vicreg",
                 "--runs", str(tmp_path / "runs"), "--table", str(tmp_path / "table.md")]  # fmt: skip
    assert table_of_methods.main(arguments) == 0
    assert "| vicreg | 1 |" in (tmp_path / "table.md").read_text()
