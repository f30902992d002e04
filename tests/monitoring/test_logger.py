"""The logger: records that survive kills and full disks, pictures, and metrics over all ranks."""

import errno
import io
import json
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from conftest import run_ranks
from PIL import Image
from saved_views import save_views

from ssl_pretrain import config, train
from ssl_pretrain.distributed import process_group
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.monitoring.log_config import LogConfig
from ssl_pretrain.monitoring.logger import Logger
from ssl_pretrain.monitoring.records import Measurements
from ssl_pretrain.system import durable_files


def build_logger(run: Path, num_steps_done=0, every_steps=2, **arguments):
    run.mkdir(exist_ok=True)
    return Logger(
        LogConfig(every_steps=every_steps, wandb="off"),
        run,
        num_steps_done=num_steps_done,
        last_step=10,
        steps_per_epoch=5,
        global_batch_size=8,
        config={},
        **arguments,
    )


def log_steps(logger, *steps, **logs):
    for step in steps:
        logger.log_step(step, {"loss": torch.tensor(1.0), **logs}, {"lr": 0.1})


def read_records(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_records_hold_means_over_the_interval_and_the_sum_of_skipped_steps(tmp_path):
    with build_logger(tmp_path) as logger:
        for step, (loss, skipped) in enumerate([(1.0, 0.0), (3.0, 1.0), (5.0, 0.0), (6.0, 0.0)], 1):
            logs = {"loss": torch.tensor(loss), "skipped_steps": torch.tensor(skipped)}
            logger.log_step(step, logs, {"lr": 0.1 * step})
    keys = ("step", "epoch", "loss", "skipped_steps", "lr")
    assert [tuple(record[key] for key in keys) for record in read_records(tmp_path)] == [
        (2, 0.4, 2.0, 1.0, 0.2),
        (4, 0.8, 5.5, 0.0, 0.4),
    ]
    assert [alert["title"] for alert in read_records(tmp_path, "alerts.jsonl")] == ["diverging"]


def test_a_resumed_run_removes_the_records_that_it_will_write_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 1}\n{"step": 4, "loss": 2}\n{"step": 6, "lo'
    )
    (tmp_path / "plots.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    with build_logger(tmp_path, num_steps_done=2) as logger:
        past_records = [{"step": 2, "loss": 1}]
        assert read_records(tmp_path) == logger.past_records == past_records
        assert read_records(tmp_path, "plots.jsonl") == [{"step": 2}]


def test_a_resume_that_loses_no_step_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    inode = path.stat().st_ino
    with build_logger(tmp_path, num_steps_done=2) as logger:
        assert path.stat().st_ino == inode and len(logger.past_records) == 2


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    with build_logger(tmp_path) as logger:
        log_steps(logger, 1)
        log_steps(logger, 2, loss=torch.tensor(float("nan")))
    assert read_records(tmp_path)[-1]["loss"] is None  # JSON has no NaN


def test_measurements_join_the_next_record_and_curves_have_their_own_file(tmp_path):
    curves = {"spectrum_index": [1, 2], "spectrum": [0.5, 0.25], "deviations": [1.0, 1.0]}
    logs, rates = {"loss": torch.tensor(1.0)}, {"lr": 0.1}
    with build_logger(tmp_path, every_steps=3) as logger:
        logger.log_step(1, logs, rates)
        logger.log_step(2, logs, rates, Measurements({"rankme": 2.0}, curves))
        logger.log_step(3, logs, rates)
        picture = torch.rand(3, 20, 30)
        logger.log_step(4, logs, rates, Measurements({"knn": 0.5}, neighbor_grid=picture))
    (record,) = read_records(tmp_path)
    assert record["rankme"] == 2.0 and "knn" not in record
    assert read_records(tmp_path, "plots.jsonl") == [{"step": 2, "epoch": 0.4, **curves}]
    with Image.open(tmp_path / "neighbors" / "step_00000004.png") as image:
        assert image.size == (30, 20)


def test_views_are_saved_as_a_grid_with_descriptions(tmp_path):
    views = [torch.rand(10, 3, 16, 16), torch.rand(10, 3, 8, 8)]
    descriptions = [["10x10 pixels at (0, 0), flipped", "gray"]] * 8
    with build_logger(tmp_path) as logger:
        save_views(logger, views, lambda: descriptions)
    with Image.open(tmp_path / "views.png") as image:
        assert image.size == (2 * 18 + 2, 8 * 18 + 2)  # 8 images, 2 views, 2 pixels of padding
    assert json.loads((tmp_path / "views.json").read_text()) == descriptions


def _log_on_ranks(run):
    """Return the console output of each rank. Rank 1 is slow and warns."""
    with build_logger(run, every_steps=1, flops_per_image=1e9, peak_tflops=2.0) as logger:
        logger.console.stream = io.StringIO()
        if process_group.rank() == 1:
            warnings.warn("one rank's trouble", stacklevel=1)
            logger._interval._seconds_waited = 1e6
        log_steps(logger, 1, loss=torch.tensor(float(process_group.rank())))
        return logger.console.stream.getvalue()


def test_a_record_holds_the_slowest_rank_and_the_flops_per_rank(tmp_path):
    outputs = run_ranks(_log_on_ranks, tmp_path, world_size=3)
    (record,) = read_records(tmp_path)
    assert record["loss"] == 1.0 and record["data_wait"] > 1e3 and record["memory_gib"] > 0.05
    assert record["model_tflops"] == pytest.approx(record["images_per_second"] / 3 / 1e3)
    assert record["flops_utilization"] == pytest.approx(record["model_tflops"] / 2)
    assert outputs[0].count("one rank's trouble") == 1 and "on rank 1" in outputs[0]
    assert outputs[1:] == ["", ""]


def test_a_run_writes_metrics_with_distinct_titles_pictures_and_descriptions(tmp_path):
    overrides = ["epochs=1", "online.knn_every_epochs=1", "online.k=5", "log.peak_tflops=1"]
    train.train(config.load(tiny.write_config(tmp_path), overrides), torch.device("cpu"))
    run = tmp_path / "run"
    keys = {key for record in read_records(run) for key in record}
    expected = {"memory_gib", "flops_utilization", "rankme", "knn", "weight_decay"}
    assert expected | {"gradient_norm_projector"} <= keys
    assert len({metric_names.metric_info(key).title for key in keys}) == len(keys)
    descriptions = json.loads((run / "views.json").read_text())
    texts = [text for texts in descriptions for text in texts]
    assert len(descriptions) == 8 and all("pixels at (" in text for text in texts)
    assert any("brightness" in text for text in texts)
    assert [path.name for path in (run / "neighbors").iterdir()] == ["step_00000003.png"]


def test_without_an_api_key_nothing_is_sent_to_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    steps = {"num_steps_done": 0, "last_step": 10, "steps_per_epoch": 5}
    settings = LogConfig(wandb="auto")
    with Logger(settings, tmp_path, global_batch_size=8, config={}, **steps) as logger:
        assert logger.wandb_id is None
    assert not (tmp_path / "wandb").exists()


def raise_disk_full(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def log_and_wait(logger, *steps):
    """Log steps, and wait after each until the background writer has tried to write it."""
    for step in steps:
        log_steps(logger, step)
        while not logger._writer._queue.empty():
            time.sleep(0.01)
        time.sleep(0.05)


def test_records_refused_by_a_full_disk_are_written_when_there_is_room(
    tmp_path, monkeypatch, capsys
):
    with build_logger(tmp_path, every_steps=1, on_failure="warn") as logger:
        log_and_wait(logger, 1)
        with monkeypatch.context() as full_disk:
            full_disk.setattr(durable_files, "append", raise_disk_full)
            log_and_wait(logger, 2, 3, 4)
            assert not logger.must_stop
        assert [record["step"] for record in read_records(tmp_path)] == [1]
        log_and_wait(logger, 5)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3, 4, 5]
    out, path = capsys.readouterr().out, tmp_path / "metrics.jsonl"
    assert out.count(f"warning: {path} could not be written: No space left on device.") == 1
    assert f"{path} can be written again and is complete" in out


def test_a_full_disk_requests_a_stop_and_ends_with_a_disk_error(tmp_path, monkeypatch):
    monkeypatch.setattr(durable_files, "append", raise_disk_full)
    with (
        pytest.raises(durable_files.SaveError) as error,
        build_logger(tmp_path, every_steps=1) as logger,
    ):
        log_and_wait(logger, 1)
        assert not logger.must_stop
        log_and_wait(logger, 2)
        assert logger.must_stop
    assert str(error.value) == (
        f"{tmp_path / 'metrics.jsonl'} could not be written: No space left on device. "
        "Everything written earlier is intact. Free some space and resume"
    )


def test_a_slow_disk_does_not_delay_the_steps(tmp_path, monkeypatch):
    append = durable_files.append

    def append_slowly(path, text):
        time.sleep(0.5)
        append(path, text)

    monkeypatch.setattr(durable_files, "append", append_slowly)
    with build_logger(tmp_path, every_steps=1) as logger:
        start = time.monotonic()
        log_steps(logger, *range(1, 10))
        assert time.monotonic() - start < 1
    assert [record["step"] for record in read_records(tmp_path)] == list(range(1, 10))


def test_pictures_that_cannot_be_written_are_reported_and_left_out(tmp_path, capsys):
    (tmp_path / "views.png").mkdir()
    views = [torch.rand(8, 3, 16, 16)]
    with build_logger(tmp_path, on_failure="warn") as logger:
        save_views(logger, views, lambda: [["flipped"]] * 8)
        log_steps(logger, 1, 2)
    message = f"warning: {tmp_path / 'views.png'} could not be written: Is a directory."
    assert message in capsys.readouterr().out
    assert json.loads((tmp_path / "views.json").read_text())[0] == ["flipped"]
