"""Evaluations in TensorBoard and in a CSV table, with the names that W&B shows."""

import csv

import pytest

from ssl_pretrain.eval import result_trackers, results
from ssl_pretrain.system import optional_packages

needs_tensorboard = pytest.mark.skipif(
    not optional_packages.is_installed("tensorboard"), reason="tensorboard is not installed"
)


def save_results(run, log_settings):
    """Save the k-NN results of two checkpoints of a run, the later one first."""
    run.mkdir()
    (run / "config.yaml").write_text(f"log: {log_settings}\n")
    for step, accuracy in ((20, 60.0), (10, 50.0)):
        rows = [
            results.Row("raw pixels", {"top-1": 30.0}),
            results.Row("pretrained", {"top-1": accuracy}, spread={"top-1": 0.5}),
        ]
        provenance = {"checkpoint": f"step_{step}", "step": step, "network": "student"}
        results.save(run, "knn", {}, rows, provenance, 1.0)


def test_the_table_has_one_row_per_number_in_the_order_of_steps(tmp_path):
    run = tmp_path / "run"
    save_results(run, "{csv: true}")
    with (run / "evaluations.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["evaluation", "step", "features", "metric", "value", "standard_deviation"],
        ["knn", "10", "raw pixels", "top-1", "30.0", ""],
        ["knn", "10", "pretrained", "top-1", "50.0", "0.5"],
        ["knn", "20", "raw pixels", "top-1", "30.0", ""],
        ["knn", "20", "pretrained", "top-1", "60.0", "0.5"],
    ]


@needs_tensorboard
def test_tensorboard_shows_the_pretrained_features_at_the_step_of_their_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    save_results(run, "{tensorboard: true}")
    events = EventAccumulator(str(run / result_trackers.TENSORBOARD_FOLDER)).Reload()
    assert events.Tags()["scalars"] == ["Evaluation/knn/top-1"]
    points = {event.step: event.value for event in events.Scalars("Evaluation/knn/top-1")}
    assert points == {10: 50.0, 20: 60.0}


def test_a_run_without_trackers_gets_only_its_results(tmp_path):
    run = tmp_path / "run"
    save_results(run, "{}")
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "eval"]
