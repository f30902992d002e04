"""Runs whose files are damaged, half written or strange: their pages open, and so do the others."""

import json
import os
import urllib.error
import urllib.request

import pytest
from page_runs import add_result, make_small_run, serve

from ssl_pretrain.eval import compare
from ssl_pretrain.eval.html import headline, run_files, run_groups, run_list_server
from ssl_pretrain.eval.run_folders import RunFolders

DAMAGES = {
    "config.yaml": ["epochs: [1, 2]", "epochs: '100'", "epochs: {"],
    "metrics.jsonl": ['{"step": 7, "loss": 1.0}', '{"step": "x"}', "[1]"],
    "eval/knn.json": ["[1]", "{}", '{"name": "knn", "rows": [1]}'],
    "alerts.jsonl": ['{"title": "c", "te', "[1]"],
}


def get(address):
    with urllib.request.urlopen(address) as response:
        return response.read().decode()


@pytest.fixture
def folder(tmp_path):
    make_small_run(tmp_path / "sound")
    add_result(make_small_run(tmp_path / "damaged"), "knn", 50.0)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content"), [(name, text) for name, texts in DAMAGES.items() for text in texts]
)
def test_a_damaged_run_hides_no_other_and_each_request_has_an_answer(folder, name, content):
    (folder / "damaged" / name).write_text(content)
    with serve(run_list_server.build_server(RunFolders(folder))) as address:
        assert {row["name"] for row in json.loads(get(f"{address}runs.json"))} == {
            "damaged",
            "sound",
        }
        assert "sound" in get(address)
        for page in ("", "main"):
            try:
                get(f"{address}run/damaged/{page}")
            except urllib.error.HTTPError as error:
                assert error.code == 500
                assert "Error: " in error.read().decode()


def test_a_request_that_makes_no_sense_has_an_answer(folder):
    with serve(run_list_server.build_server(RunFolders(folder))) as address:
        assert json.loads(get(f"{address}changes?since={'9' * 5000}"))["rows"].keys() == {
            "damaged",
            "sound",
        }


def test_links_to_a_run_do_not_list_it_twice(folder):
    os.symlink(folder / "sound", folder / "latest")
    os.symlink(folder, folder / "sound" / "all")
    assert len(RunFolders(folder).read()) == 2


def test_an_alert_that_is_being_written_is_left_out(folder):
    alert = {"title": "a", "text": "b", "step": 1}
    (folder / "sound/alerts.jsonl").write_text(f'{json.dumps(alert)}\n{{"title": "c", "te')
    assert run_files.read_alerts(folder / "sound") == [alert]


def test_results_that_are_not_finite_are_no_headline_and_no_number(folder):
    add_result(folder / "sound", "knn", float("nan"))
    result = json.loads((folder / "sound/eval/knn.json").read_text())
    assert headline.describe_result(result) == ""
    assert RunFolders(folder).read()["sound"].evaluations == {}


def test_a_run_that_is_given_twice_counts_once(folder):
    with pytest.raises(ValueError, match="a comparison needs two or more runs"):
        compare.write([folder / "sound", folder / "damaged/../sound"])


def test_groups_of_the_same_name_are_told_apart(folder):
    runs = [
        make_small_run(folder / f"simclr_{number}", seed=number % 2, optim=f"{{base_lr: {lr}}}")
        for number, lr in enumerate((0.1, 0.1, 0.2, 0.2))
    ]
    groups = run_groups.group_by_seed([run_groups.read_run(run.name, run) for run in runs])
    assert [group.name for group in groups] == [
        "simclr (from simclr_0)",
        "simclr (from simclr_2)",
    ]


def test_a_comparison_of_runs_with_names_of_any_bytes_is_written(folder):
    names = [os.fsdecode(b"caf\xe9_0"), "other"]
    runs = [make_small_run(folder / name, method=str(i)) for i, name in enumerate(names)]
    for run in runs:
        add_result(run, "knn", 40.0)
    path = compare.write(runs, folder / "compare.html")
    assert "40.0" in path.read_text(errors="replace")
