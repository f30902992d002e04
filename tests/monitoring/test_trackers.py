"""TensorBoard and CSV beside metrics.jsonl: the same names and numbers, also after a resume."""

import csv
import json

import numpy as np
import pytest
import torch
from saved_views import save_views

from ssl_pretrain import config
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.monitoring.log_config import LogConfig
from ssl_pretrain.monitoring.logger import Logger
from ssl_pretrain.monitoring.records import Measurements
from ssl_pretrain.system import durable_files, optional_packages

CURVES = {"spectrum_index": [1, 2], "spectrum": [0.5, 0.25], "deviations": [1.0, 0.5]}


def run_steps(run, num_steps_done, last_step, knn_step=None, **settings):
    """Log steps as one process of a run, with a k-NN accuracy at one of them."""
    run.mkdir(exist_ok=True)
    with Logger(
        LogConfig(every_steps=1, wandb="off", **settings),
        run,
        num_steps_done=num_steps_done,
        last_step=last_step,
        steps_per_epoch=5,
        global_batch_size=8,
        config={"seed": 0},
    ) as logger:
        save_views(logger, [torch.rand(8, 3, 16, 16)], lambda: [["a"]] * 8)
        for step in range(num_steps_done + 1, last_step + 1):
            measurements = None
            if step == knn_step:
                measurements = Measurements({"knn": 0.5, "rankme": 3.0}, CURVES)
            logs = {"loss": torch.tensor(10.0 / step)}
            logger.log_step(step, logs, {"lr": 0.1}, measurements)
        logger.raise_alert("collapse", "the embeddings are similar")


def read_jsonl(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_table(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file, restkey="too many", restval="too few"))


def assert_table_equals_records(run):
    records, rows = read_jsonl(run), read_table(run)
    assert [int(row["step"]) for row in rows] == [record["step"] for record in records]
    for record, row in zip(records, rows):
        assert {key: float(value) for key, value in row.items() if value} == {
            key: value for key, value in record.items() if value is not None
        }


def test_the_table_has_the_names_and_numbers_of_the_records(tmp_path):
    run_steps(tmp_path, 0, 4, knn_step=3, csv=True)
    assert_table_equals_records(tmp_path)
    header = (tmp_path / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert header[:6] == ["step", "epoch", "loss", "knn", "probe", "lr"]
    assert header[-1] == "rankme"  # appeared last
    assert [row["knn"] for row in read_table(tmp_path)] == ["", "", "0.5", ""]


def test_the_table_of_a_resumed_run_keeps_its_columns_and_drops_the_steps_taken_again(tmp_path):
    run_steps(tmp_path, 0, 5, knn_step=2, csv=True)
    header = (tmp_path / "metrics.csv").read_text().partition("\n")[0]
    run_steps(tmp_path, 3, 6, csv=True)
    assert (tmp_path / "metrics.csv").read_text().startswith(f"{header}\n")
    assert [int(row["step"]) for row in read_table(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert_table_equals_records(tmp_path)


def test_a_table_that_begins_with_a_resume_has_the_earlier_steps(tmp_path):
    run_steps(tmp_path, 0, 3)
    assert not (tmp_path / "metrics.csv").exists()
    run_steps(tmp_path, 3, 5, csv=True)
    assert_table_equals_records(tmp_path)


def test_a_number_that_is_not_finite_is_an_empty_field(tmp_path):
    with Logger(
        LogConfig(every_steps=1, wandb="off", csv=True),
        tmp_path,
        num_steps_done=0,
        last_step=2,
        steps_per_epoch=5,
        global_batch_size=8,
        config={},
    ) as logger:
        logger.log_step(1, {"loss": torch.tensor(float("nan"))}, {"lr": 0.1})
    assert [row["loss"] for row in read_table(tmp_path)] == [""]


def read_events(run):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    events = event_accumulator.EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    return events.Reload()


def test_tensorboard_has_the_numbers_of_the_records_once_per_step(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run_steps(tmp_path, 0, 5, knn_step=2, tensorboard=True)
    run_steps(tmp_path, 3, 6, knn_step=6, tensorboard=True)  # takes steps 4 and 5 again
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events, records = read_events(tmp_path), read_jsonl(tmp_path)
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    keys = {key for record in records for key in record} - {"step", "time"}
    assert scalars.keys() == {metric_names.tracker_name(key) for key in keys}
    assert {"Learning/loss", "Learning/knn", "Collapse/rankme", "epoch"} <= scalars.keys()
    for key in keys:
        expected = [
            (record["step"], pytest.approx(record[key], rel=1e-6))
            for record in records
            if key in record
        ]
        assert scalars[metric_names.tracker_name(key)] == expected, key
    assert scalars["Learning/knn"] == [(2, 0.5), (6, 0.5)]


def test_tensorboard_has_pictures_histograms_the_configuration_and_alerts(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run_steps(tmp_path, 0, 3, knn_step=2, tensorboard=True)
    events = read_events(tmp_path)
    assert [image.step for image in events.Images("Pictures/views")] == [1]
    assert [histogram.step for histogram in events.Histograms("Collapse/deviations")] == [2]
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    assert '"seed": 0' in texts["config/text_summary"]
    assert texts["alerts/collapse/text_summary"] == "collapse: the embeddings are similar"


def test_a_run_continues_if_tensorboard_files_cannot_be_written(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "tensorboard").touch()
    run_steps(tmp_path, 0, 2, tensorboard=True)
    assert len(read_jsonl(tmp_path)) == 2
    message = f"TensorBoard: {tmp_path / 'tensorboard'} could not be written: File exists."
    assert capsys.readouterr().out.count(message) == 1


def test_a_missing_tensorboard_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: None)
    settings = config.load("configs/simclr_digits.yaml", ["log.tensorboard=true", "log.wandb=off"])
    with pytest.raises(config.ConfigError) as error:
        config.check(settings, 1)
    hint = optional_packages.install_hint("tensorboard")
    assert str(error.value) == (
        f"log.tensorboard=true: tensorboard is not installed; {hint}, or set log.tensorboard=false"
    )


@pytest.mark.filterwarnings("ignore:.*metrics.csv could not be written")
def test_a_table_refused_by_a_full_disk_is_complete_when_there_is_room(tmp_path, monkeypatch):
    """New columns and rows that could not be written are written together at the end."""
    replace, is_full = durable_files.replace, [True]

    def replace_if_there_is_room(path, text):
        if is_full[0] and path.name == "metrics.csv":
            raise OSError(28, "No space left on device")
        replace(path, text)

    monkeypatch.setattr(durable_files, "replace", replace_if_there_is_room)
    with Logger(
        LogConfig(every_steps=1, wandb="off", csv=True),
        tmp_path,
        num_steps_done=0,
        last_step=4,
        steps_per_epoch=5,
        global_batch_size=8,
        config={},
        on_failure="warn",
    ) as logger:
        for step in (1, 2, 3):
            measurements = Measurements({"knn": 0.5}) if step == 2 else None
            logger.log_step(step, {"loss": torch.tensor(1.0)}, {"lr": 0.1}, measurements)
        is_full[0] = False
    assert_table_equals_records(tmp_path)
    assert np.isclose(float(read_table(tmp_path)[1]["knn"]), 0.5)
