"""What a run says: records that survive kills, the progress line, and one W&B run across resumes."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch

from ssl_pretrain import checkpoint, config, log
from ssl_pretrain.train import train


def logger(run: Path, first_step=0, every_steps=2, **settings):
    run.mkdir(exist_ok=True)
    facts = {"wandb_id": None}
    return log.Logger(
        log.LogConfig(every_steps=every_steps, wandb="off", **settings),
        run,
        first_step=first_step,
        last_step=10,
        steps_per_epoch=5,
        global_batch_size=8,
        config={},
        facts=facts,
    )


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_means_over_the_interval_and_skipped_steps_summed(tmp_path):
    made = logger(tmp_path)
    for step, (loss, skipped) in enumerate([(1.0, 0.0), (3.0, 1.0), (5.0, 0.0), (6.0, 0.0)], start=1):
        made.step(step, {"loss": torch.tensor(loss), "skipped_steps": torch.tensor(skipped)}, {"lr": 0.1 * step})
    assert [(r["step"], r["epoch"], r["loss"], r["skipped_steps"], r["lr"]) for r in records(tmp_path)] == [
        (2, 0.4, 2.0, 1.0, 0.2),
        (4, 0.8, 5.5, 0.0, 0.4),
    ]


def test_records_after_the_resumed_step_are_written_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 2}\n{"step": 6, "lo')
    logger(tmp_path, first_step=2)
    assert [r["step"] for r in records(tmp_path)] == [2]


def test_the_progress_line_says_what_people_ask(tmp_path, capsys):
    record = {"step": 5, "epoch": 1.0, "loss": 4.25, "lr": 0.3, "images_per_second": 8.0, "data_wait": 0.25, "skipped_steps": 2.0}
    line = log._progress_line(record, last_step=3605, global_batch_size=8, knn=0.5)
    assert line == "step 5/3605  epoch 1.00  loss 4.2500  lr 0.3  k-NN 50.0 %  8 images/s  data wait 25 %  2 steps skipped  ETA 1:00:00"


def test_what_is_not_finite_is_null(tmp_path):
    made = logger(tmp_path)
    broken, whole = torch.tensor(float("nan")), torch.tensor(1.0)
    made.step(1, {"loss": whole, "skipped_steps": torch.tensor(1.0)}, {"lr": 0.1})
    made.step(2, {"loss": whole, "skipped_steps": torch.tensor(0.0)}, {"lr": 0.1})
    made.step(3, {"loss": broken, "skipped_steps": torch.tensor(1.0)}, {"lr": 0.1})
    made.step(4, {"loss": broken, "skipped_steps": torch.tensor(1.0)}, {"lr": 0.1})
    assert records(tmp_path)[-1]["loss"] is None  # JSON has no NaN


def test_views_become_a_grid(tmp_path):
    made = logger(tmp_path)
    made.views(1, [torch.rand(10, 3, 16, 16), torch.rand(10, 3, 8, 8)], [0.5] * 3, [0.25] * 3)
    from PIL import Image

    with Image.open(tmp_path / "views.png") as image:
        assert image.size == (2 * 18 + 2, 8 * 18 + 2)  # 8 images, 2 views, 2 pixels between


def test_without_a_key_wandb_is_off(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert log._start_wandb(log.LogConfig(wandb="auto"), tmp_path, {}, {}) is None


def test_an_offline_wandb_run_has_the_same_id_after_a_resume(tmp_path):
    path = tiny.config(tmp_path)
    for steps in (2, 2):
        train(config.load(path, ["log.wandb=offline"]), torch.device("cpu"), steps)
    ids = {checkpoint.verify(found)["wandb_id"] for found in checkpoint.checkpoints(tmp_path / "run")}
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(ids) == 1 and len(folders) == 2
    assert {folder.name.rpartition("-")[2] for folder in folders} == ids
    assert "api_key" not in (tmp_path / "run" / "config.yaml").read_text()
