"""Record files written by this version and by earlier versions."""

import json

from ssl_pretrain.eval.html import run_files
from ssl_pretrain.monitoring import metric_names, records


def test_read_returns_one_record_per_step_in_order_and_skips_a_truncated_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 4, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 4, "loss": 3}\n{"step": 6, "lo'
    )
    assert records.read(path) == [{"step": 2, "loss": 2}, {"step": 4, "loss": 3}]
    assert records.read(tmp_path / "missing.jsonl") == []


def test_non_finite_numbers_are_written_as_null():
    record = {"step": 1, "loss": float("nan"), "knn": float("inf"), "lr": 0.5}
    assert json.loads(records.encode(record)) == {"step": 1, "loss": None, "knn": None, "lr": 0.5}


def test_trim_removes_the_records_of_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6, "lo')
    assert records.trim(path, 2) == [{"step": 2}] and path.read_text() == '{"step": 2}\n'
    assert records.trim(path, 0) == [] and path.read_text() == ""


def test_metrics_of_an_earlier_version_are_renamed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "neighbour_cosine": 0.5}\n')
    assert records.read(path) == [{"step": 1, "neighbor_cosine": 0.5}]
    assert records.trim(path, 1) == [{"step": 1, "neighbor_cosine": 0.5}]
    assert path.read_text() == '{"step": 1, "neighbor_cosine": 0.5}\n'


def test_files_of_an_earlier_version_come_before_those_of_this_version(tmp_path):
    """A run that was started by an earlier version and resumed by this one has both."""
    for name, text in (("alarms.jsonl", "old"), ("alerts.jsonl", "new")):
        alert = {"title": name, "text": text, "time": 1.0}
        (tmp_path / name).write_text(json.dumps(alert) + "\n")
    folders = [tmp_path / "neighbours", tmp_path / "neighbors"]
    for folder in folders:
        folder.mkdir()
    assert metric_names.existing_paths(tmp_path, "neighbors") == folders
    assert [alert["text"] for alert in run_files.read_alerts(tmp_path)] == ["old", "new"]
