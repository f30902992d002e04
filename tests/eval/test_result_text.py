"""Tables of results on a terminal of 80 columns."""

import dataclasses

import pytest

from ssl_pretrain.eval import result_text, results
from ssl_pretrain.eval.results import Row


def build_result(name, rows, measure=results.ACCURACY):
    return {
        "name": name,
        "checkpoint": "step_00000300",
        "step": 300,
        "measure": measure,
        "protocol": {"k": 20},
        "rows": [dataclasses.asdict(row) for row in rows],
        "seconds": 12.4,
    }


def build_rows(names, columns):
    return [
        Row(name, {column: 10.0 * row + i for i, column in enumerate(columns)})
        for row, name in enumerate(names)
    ]


BASELINES = ("raw pixels", "random, as built", "random (better of two)", "pretrained")


@pytest.mark.parametrize("num_columns", [1, 5, 16, 40])
@pytest.mark.parametrize("num_rows", [4, 30])
def test_a_table_of_any_size_fits_80_columns_and_keeps_every_number(num_columns, num_rows):
    columns = [f"learning rate {i:03d}" for i in range(num_columns)]
    names = [f"corruption {row:03d}" for row in range(num_rows)]
    header, rows = results.table_cells(build_result("linear_grid", build_rows(names, columns)))
    text = results.format_narrow_table(header, rows)
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    for number in (number for row in rows for number in row[1:]):
        assert number in words
    for name in (*columns, *names):
        assert name in text


def test_a_result_is_shown_as_its_table_and_the_paths_of_everything_else(tmp_path):
    result = build_result("knn", build_rows(BASELINES, ["clean", "shifted 1"]))
    assert result_text.format_briefly(result, tmp_path) == (
        "accuracy, %             clean  shifted 1\n"
        "----------------------------------------\n"
        "raw pixels                0.0        1.0\n"
        "random, as built         10.0       11.0\n"
        "random (better of two)   20.0       21.0\n"
        "pretrained               30.0       31.0\n"
        "\n"
        f"protocol: {tmp_path / 'eval/knn.txt'}\n"
        f"12 s; saved to {tmp_path / 'eval/knn.json'}"
    )


def test_an_evaluated_run_ends_with_one_table_its_report_and_the_next_command(tmp_path):
    provenance = {"checkpoint": "step_00000300", "step": 300}
    retrieval = build_rows(BASELINES, ["mAP", "recall@1", "recall@5"])
    finetuning = build_rows(["trained from random weights", "pretrained"], ["all labels"])
    for name, rows, measure in (
        ("knn", build_rows(BASELINES, ["clean"]), results.ACCURACY),
        ("knn_grid", build_rows(BASELINES, ["k 10"]), results.ACCURACY),
        ("retrieval", retrieval, "%"),
        ("finetune_simclr", finetuning, results.ACCURACY),
        ("spectrum", build_rows(["pretrained"], ["rank"]), "spectrum"),
    ):
        results.save(tmp_path, name, {}, rows, provenance, 1.0, measure)
    (tmp_path / "report.html").touch()
    *table, report, command = result_text.describe_evaluated_run(tmp_path).splitlines()
    assert table == [
        "accuracy, %          raw pixels  random backbone  pretrained",
        "------------------------------------------------------------",
        "fine-tuning                   -              0.0        10.0",
        "k-NN                        0.0             20.0        30.0",
        "retrieval, mAP              0.0             20.0        30.0",
        "retrieval, recall@1         1.0             21.0        31.0",
        "",
    ]
    assert report == f"report: {tmp_path / 'report.html'}"
    assert command.endswith(f" -m ssl_pretrain.eval.export {tmp_path}")


def test_a_run_without_numbers_ends_with_its_folder(tmp_path):
    first, command = result_text.describe_evaluated_run(tmp_path).splitlines()
    assert first == f"run:    {tmp_path}" and command.startswith("next:   ")
