"""What a run says: records that survive kills, pictures, and the numbers that the logger adds."""

from __future__ import annotations

import errno
import io
import json
import os
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from conftest import run_ranks
from PIL import Image

from ssl_pretrain import config, train
from ssl_pretrain.build import flops_per_image
from ssl_pretrain.distributed import process_group
from ssl_pretrain.monitoring import logger as log
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.monitoring.wandb import run as wandb_run
from ssl_pretrain.planning import estimate, flops
from ssl_pretrain.system import durable_files


def logger(run: Path, first_step=0, every_steps=2, **named):
    run.mkdir(exist_ok=True)
    return log.Logger(
        log.LogConfig(every_steps=every_steps, wandb="off"),
        run,
        first_step=first_step,
        last_step=10,
        steps_per_epoch=5,
        global_batch_size=8,
        config={},
        facts={"wandb_id": None},
        **named,
    )


def records(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_means_over_the_interval_and_skipped_steps_summed(tmp_path):
    with logger(tmp_path) as made:
        for step, (loss, skipped) in enumerate(
            [(1.0, 0.0), (3.0, 1.0), (5.0, 0.0), (6.0, 0.0)], start=1
        ):
            made.step(
                step,
                {"loss": torch.tensor(loss), "skipped_steps": torch.tensor(skipped)},
                {"lr": 0.1 * step},
            )
    assert [
        (r["step"], r["epoch"], r["loss"], r["skipped_steps"], r["lr"]) for r in records(tmp_path)
    ] == [
        (2, 0.4, 2.0, 1.0, 0.2),
        (4, 0.8, 5.5, 0.0, 0.4),
    ]
    assert [alarm["title"] for alarm in records(tmp_path, "alarms.jsonl")] == ["diverging"]


def test_records_after_the_resumed_step_are_written_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 1}\n{"step": 4, "loss": 2}\n{"step": 6, "lo'
    )
    (tmp_path / "plots.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    with logger(tmp_path, first_step=2) as made:
        assert (
            [r["step"] for r in records(tmp_path)]
            == [r["step"] for r in made.past]
            == [r["step"] for r in records(tmp_path, "plots.jsonl")]
            == [2]
        )


def test_what_is_not_finite_is_null(tmp_path):
    with logger(tmp_path) as made:
        for step, loss in enumerate((1.0, float("nan")), start=1):
            made.step(
                step, {"loss": torch.tensor(loss), "skipped_steps": torch.tensor(0.0)}, {"lr": 0.1}
            )
    assert records(tmp_path)[-1]["loss"] is None  # JSON has no NaN


def test_measures_join_the_next_record_and_curves_go_to_their_own_file(tmp_path):
    with logger(tmp_path, every_steps=3) as made:
        plots = {"spectrum_index": [1, 2], "spectrum": [0.5, 0.25], "deviations": [1.0, 1.0]}
        for step in range(1, 4):
            made.step(
                step,
                {"loss": torch.tensor(1.0)},
                {"lr": 0.1},
                {"rankme": 2.0, "plots": plots} if step == 2 else {},
            )
        made.step(
            4,
            {"loss": torch.tensor(1.0)},
            {"lr": 0.1},
            {"knn": 0.5, "neighbours": torch.rand(3, 20, 30)},
        )
    (record,) = records(tmp_path)
    assert record["rankme"] == 2.0 and "plots" not in record
    assert records(tmp_path, "plots.jsonl") == [{"step": 2, "epoch": 0.4, **plots}]
    with Image.open(tmp_path / "neighbours" / "step_00000004.png") as image:
        assert image.size == (30, 20)


def test_views_become_a_grid_with_what_was_drawn(tmp_path):
    with logger(tmp_path) as made:
        drawn = [["10x10 pixels at (0, 0), flipped", "grey"]] * 8
        made.views(
            1,
            [torch.rand(10, 3, 16, 16), torch.rand(10, 3, 8, 8)],
            [0.5] * 3,
            [0.25] * 3,
            lambda: drawn,
        )
    with Image.open(tmp_path / "views.png") as image:
        assert image.size == (2 * 18 + 2, 8 * 18 + 2)  # 8 images, 2 views, 2 pixels between
    assert json.loads((tmp_path / "views.json").read_text()) == drawn


def _logged_by_ranks(run):
    """What rank 0 showed, of three ranks one of which is slow and warns."""
    with logger(run, every_steps=1, flops_per_image=1e9, peak_tflops=2.0) as made:
        made.console.stream = io.StringIO()
        if process_group.rank() == 1:
            warnings.warn("one rank's trouble", stacklevel=1)
            made._waited = 1e6
        made.step(1, {"loss": torch.tensor(float(process_group.rank()))}, {"lr": 0.1})
        return made.console.stream.getvalue()


def test_the_slowest_rank_counts_and_flops_are_a_ranks(tmp_path):
    shown = run_ranks(_logged_by_ranks, tmp_path, world_size=3)
    (record,) = records(tmp_path)
    assert record["loss"] == 1.0 and record["data_wait"] > 1e3 and record["memory_gib"] > 0.05
    assert record["model_tflops"] == pytest.approx(record["images_per_second"] / 3 / 1e3)
    assert record["flops_utilization"] == pytest.approx(record["model_tflops"] / 2)
    assert (
        shown[0].count("one rank's trouble") == 1
        and "on rank 1" in shown[0]
        and shown[1:] == ["", ""]
    )


def test_flops_of_a_network_counted_by_hand(tmp_path):
    run = config.load(
        tiny.config(tmp_path),
        [
            "backbone.name=vit_tiny_patch16_224",
            "backbone.stem=imagenet",
            "views.crops.global.size=32",
        ],
    )
    tokens, width, depth = 5, 192, 12  # 2 x 2 patches and the class token
    block = (
        2 * tokens * width * width * (3 + 1 + 4 + 4) + 2 * 2 * tokens * tokens * width
    )  # products; scores and their sum over values
    patches = 2 * 4 * (3 * 16 * 16) * width
    head = 2 * (width * 16 + 16 * 8)
    assert flops_per_image(run) == 3 * 2 * (
        depth * block + patches + head
    )  # forward and backward of two views
    assert estimate.method_on_meta(run).backbone.feature_dim == width
    assert flops.peak_tflops(torch.device("cpu")) == 0


def test_a_run_leaves_named_curves_pictures_and_words(tmp_path):
    path = tiny.config(tmp_path)
    train.train(
        config.load(
            path, ["epochs=1", "online.knn_every_epochs=1", "online.k=5", "log.peak_tflops=1"]
        ),
        torch.device("cpu"),
    )
    run = tmp_path / "run"
    logged = {key for record in records(run) for key in record}
    assert {
        "memory_gib",
        "flops_utilization",
        "gradient_norm_projector",
        "rankme",
        "knn",
        "weight_decay",
    } <= logged
    assert len({metric_names.name(key) for key in logged}) == len(logged)
    described = json.loads((run / "views.json").read_text())
    assert len(described) == 8 and all(
        "pixels at (" in text for texts in described for text in texts
    )
    assert any("brightness" in text for texts in described for text in texts)
    assert [path.name for path in (run / "neighbours").iterdir()] == ["step_00000003.png"]


def test_without_a_key_wandb_is_off(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not wandb_run.has_key()
    assert log._start_wandb(log.LogConfig(wandb="auto"), tmp_path, {}, {}, print) is None


def full(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def taken(made, steps):
    for step in steps:
        made.step(step, {"loss": torch.tensor(1.0)}, {"lr": 0.1})
        while not made._files._waiting.empty():
            time.sleep(0.01)
        time.sleep(0.05)


def test_records_that_a_full_disk_refused_are_written_when_there_is_room(
    tmp_path, monkeypatch, capsys
):
    with logger(tmp_path, every_steps=1, on_failure="warn") as made:
        taken(made, [1])
        with monkeypatch.context() as patched:
            patched.setattr(durable_files, "append", full)
            taken(made, [2, 3, 4])
            assert not made.must_stop
        assert [r["step"] for r in records(tmp_path)] == [1]
        taken(made, [5])
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5]
    out, path = capsys.readouterr().out, tmp_path / "metrics.jsonl"
    assert out.count(f"warning: {path} could not be written: No space left on device.") == 1
    assert f"{path} is written again, with what was missing" in out


def test_a_full_disk_asks_for_a_stop_and_ends_as_a_disk_error(tmp_path, monkeypatch):
    monkeypatch.setattr(durable_files, "append", full)
    with pytest.raises(durable_files.SaveError) as error, logger(tmp_path, every_steps=1) as made:
        taken(made, [1])
        assert not made.must_stop
        taken(made, [2])
        assert made.must_stop
    assert str(error.value) == (
        f"{tmp_path / 'metrics.jsonl'} could not be written: No space left on device. What was written before is whole; free space and resume"
    )


def test_a_slow_disk_does_not_hold_up_the_steps(tmp_path, monkeypatch):
    real = durable_files.append

    def slow(path, text):
        time.sleep(0.5)
        real(path, text)

    monkeypatch.setattr(durable_files, "append", slow)
    with logger(tmp_path, every_steps=1) as made:
        began = time.monotonic()
        for step in range(1, 10):
            made.step(step, {"loss": torch.tensor(1.0)}, {"lr": 0.1})
        assert time.monotonic() - began < 1
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 10))


def test_a_record_is_whole_or_absent(tmp_path, monkeypatch):
    """A disk that fills in the middle of a line."""
    path = tmp_path / "metrics.jsonl"
    durable_files.append(path, "first\n")
    real = os.write

    def half(descriptor, data):
        monkeypatch.setattr(os, "write", full)
        return real(descriptor, bytes(data)[:3])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        durable_files.append(path, "second\n")
    assert path.read_text() == "first\n"


def test_a_file_takes_its_name_after_its_content_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut between any two calls leaves the old content or the new, never none."""
    path, calls = tmp_path / "config.yaml", []
    path.write_text("old")
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        assert path.read_text() in ("old", "new")
        fsync(descriptor)

    def renamed(source, target):
        calls.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    durable_files.replace(path, "new")
    assert calls == ["fsync .config.yaml.part", "rename config.yaml", f"fsync {tmp_path.name}"]


def test_a_resume_that_loses_no_step_leaves_the_log_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.stat().st_ino
    with logger(tmp_path, first_step=2) as made:
        assert path.stat().st_ino == before and len(made.past) == 2


def test_pictures_that_cannot_be_written_are_named_and_missed(tmp_path, capsys):
    (tmp_path / "views.png").mkdir()
    with logger(tmp_path, on_failure="warn") as made:
        made.views(1, [torch.rand(8, 3, 16, 16)], [0.5] * 3, [0.25] * 3, lambda: [["drawn"]] * 8)
        for step in (1, 2):
            made.step(step, {"loss": torch.tensor(1.0)}, {"lr": 0.1})
    assert (
        f"warning: {tmp_path / 'views.png'} could not be written: Is a directory."
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "views.json").read_text())[0] == ["drawn"]
