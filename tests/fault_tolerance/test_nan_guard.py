"""Gradients that are not finite: skipped, recorded, rolled back, stopped; and the step repeated alone."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from ssl_pretrain import replay
from ssl_pretrain.fault_tolerance.nan_guard import Guard, GuardConfig
from ssl_pretrain.train import main

pytestmark = pytest.mark.promise

SKIPPED, TAKEN = {"skipped_steps": torch.tensor(1.0)}, {"skipped_steps": torch.tensor(0.0)}


def _guard(run, roll_back, rollbacks=1):
    return Guard(
        GuardConfig(3, rollbacks),
        run,
        2,
        lambda: "z_a of rank 0 since step 5",
        roll_back,
        {"seed": 7, "steps_per_epoch": 3},
    )


def _take(guard, flags, first=1):
    for step, flag in enumerate(flags, start=first):
        guard.after(step, torch.tensor([10 * step, 10 * step + 1]), SKIPPED if flag else TAKEN)


def test_skipped_steps_are_recorded_with_their_images_and_a_few_are_passed_over(tmp_path):
    _take(_guard(tmp_path, lambda: pytest.fail("too early")), [1, 1, 0, 1, 1, 0])
    found = {file.name: json.loads(file.read_text()) for file in (tmp_path / "skipped").iterdir()}
    assert sorted(found) == [f"step_0000000{step}.json" for step in (1, 2, 4, 5)]
    assert found["step_00000004.json"] == {"step": 4, "seed": 7, "epoch": 1, "indices": [40, 41]}


def test_too_many_in_a_row_roll_back_and_then_stop(tmp_path, capsys):
    calls = []
    guard = _guard(tmp_path, lambda: calls.append(1) or "step_00000002")
    _take(guard, [0, 1, 1, 1])
    assert calls == [1]
    assert capsys.readouterr().out == (
        "step 4: 3 steps in a row had a non-finite gradient; not finite embeddings: z_a of rank 0 since step 5; "
        "weights and optimizer went back to step_00000002, the data go on\n"
    )
    with pytest.raises(FloatingPointError) as error:
        _take(guard, [0, 1, 1, 1], first=5)
    assert str(error.value) == (
        "step 8: 3 steps in a row had a non-finite gradient; not finite embeddings: z_a of rank 0 since step 5; the weights are those of the "
        "last finite step. Lower optim.base_lr, lengthen optim.warmup_epochs, or train in float32; resuming goes on from the last "
        f"checkpoint. `python -m ssl_pretrain.replay {tmp_path} 8` repeats that step"
    )
    went_back = {"rolled_back_after": 4, "rolled_back_to": 2}
    assert json.loads((tmp_path / "skipped" / "step_00000007.json").read_text()) == {
        "step": 7, "seed": 7, "epoch": 2, **went_back, "indices": [70, 71],
    }  # fmt: skip


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^step 4: 4 steps in a row"):
        _take(_guard(tmp_path, lambda: None), [1, 1, 1, 1])


def test_a_run_goes_back_to_its_checkpoint_and_stops_when_that_does_not_help(tmp_path, capsys):
    path = tiny.config(tmp_path)
    assert main([str(path), "checkpoint.every_epochs=1", "--stop-after", "4"]) == 0
    wild = [
        "optim.name=sgd",
        "optim.base_lr=1e30",
        "optim.lr_scaling=none",
        "optim.warmup_epochs=0",
        f"output={tmp_path / 'wild'}",
    ]
    arguments = [
        str(path),
        *wild,
        "checkpoint.every_epochs=0.4",
        "guard.max_skipped_steps=2",
        "log.every_steps=2",
    ]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert (
        "steps in a row had a non-finite gradient" in said.out
        and "went back to step_0000000" in said.out
    )
    assert "repeats that step" in said.err
    assert list((tmp_path / "wild" / "skipped").iterdir())


def test_a_step_repeated_alone_is_the_step_that_was(tmp_path, capsys):
    path = tiny.config(tmp_path)
    assert main([str(path), "checkpoint.every_epochs=1", "--stop-after", "6"]) == 0
    capsys.readouterr()
    run = tmp_path / "run"
    losses = {
        r["step"]: r["loss"]
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    lines = replay.replay(run, 5)
    assert lines[0] == f"step 5 of {run}, from step_00000003"
    assert lines[1] == f"  loss: {losses[5]:.6g}"
    assert "  first output that is not finite: none" in lines
    assert {line.split()[3].rstrip(":") for line in lines if "gradient norm of" in line} == {
        "backbone",
        "projector",
    }
    assert replay.replay(run, 5, from_checkpoint=True)[1] != lines[1]
    assert replay.main([str(run), "2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {run}: no checkpoint before step 2; the oldest there is cannot have met that batch. Give a later step"
    )
