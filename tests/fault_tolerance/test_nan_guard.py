"""Non-finite gradients: steps are skipped, recorded and rolled back, or the run ends."""

import json

import pytest
import tiny
import torch

from ssl_pretrain import replay
from ssl_pretrain.fault_tolerance.nan_guard import GuardConfig, NanGuard
from ssl_pretrain.train import main

pytestmark = pytest.mark.promise

NONFINITE_EMBEDDINGS = "z_a of rank 0 since step 5"
PROBLEM = (
    "3 steps in a row had a non-finite gradient; "
    f"embeddings that are not finite: {NONFINITE_EMBEDDINGS}"
)


def build_guard(run, roll_back):
    """Return a guard that checks every 2 steps and allows 3 skipped steps and 1 rollback."""
    callbacks = {
        "describe_nonfinite_embeddings": lambda: NONFINITE_EMBEDDINGS,
        "roll_back": roll_back,
    }
    return NanGuard(GuardConfig(3, 1), run, 2, seed=7, steps_per_epoch=3, **callbacks)


def check_steps(nan_guard, skipped_flags, first=1):
    for step, skipped in enumerate(skipped_flags, start=first):
        logs = {"skipped_steps": torch.tensor(float(skipped))}
        nan_guard.check(step, torch.tensor([10 * step, 10 * step + 1]), logs)


def test_skipped_steps_are_recorded_with_their_images_and_a_few_are_allowed(tmp_path):
    check_steps(build_guard(tmp_path, lambda: pytest.fail("too early")), [1, 1, 0, 1, 1, 0])
    records = {file.name: json.loads(file.read_text()) for file in (tmp_path / "skipped").iterdir()}
    assert sorted(records) == [f"step_0000000{step}.json" for step in (1, 2, 4, 5)]
    assert records["step_00000004.json"] == {"step": 4, "seed": 7, "epoch": 1, "indices": [40, 41]}


def test_too_many_skipped_steps_in_a_row_roll_back_and_then_end_the_run(tmp_path, capsys):
    calls = []
    nan_guard = build_guard(tmp_path, lambda: calls.append(1) or "step_00000002")
    check_steps(nan_guard, [0, 1, 1, 1])
    assert calls == [1]
    assert capsys.readouterr().out == (
        f"step 4: {PROBLEM}. Weights and optimizer were restored from step_00000002. "
        "Training continues with the next images\n"
    )
    with pytest.raises(FloatingPointError) as error:
        check_steps(nan_guard, [0, 1, 1, 1], first=5)
    assert str(error.value) == (
        f"step 8: {PROBLEM}. The weights are those of the last finite step. Lower optim.base_lr, "
        "lengthen optim.warmup_epochs, or train in float32. The same command resumes from the last "
        f"checkpoint. `python -m ssl_pretrain.replay {tmp_path} 8` repeats this step alone"
    )
    assert json.loads((tmp_path / "skipped" / "step_00000007.json").read_text()) == {
        "step": 7,
        "seed": 7,
        "epoch": 2,
        "rolled_back_after": 4,
        "rolled_back_to": 2,
        "indices": [70, 71],
    }


def test_without_a_checkpoint_the_run_ends(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^step 4: 4 steps in a row"):
        check_steps(build_guard(tmp_path, lambda: None), [1, 1, 1, 1])


def test_a_run_is_restored_from_its_checkpoint_and_ends_if_that_does_not_help(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    assert main([str(path), "checkpoint.every_epochs=1", "--stop-after", "4"]) == 0
    divergent_settings = [
        "optim.name=sgd",
        "optim.base_lr=1e30",
        "optim.lr_scaling=none",
        "optim.warmup_epochs=0",
        f"output={tmp_path / 'diverging'}",
    ]
    short_intervals = [
        "checkpoint.every_epochs=0.4",
        "guard.max_skipped_steps=2",
        "log.every_steps=2",
    ]
    assert main([str(path), *divergent_settings, *short_intervals]) == 2
    out, err = capsys.readouterr()
    assert "steps in a row had a non-finite gradient" in out
    assert "were restored from step_0000000" in out
    assert "repeats this step alone" in err
    assert list((tmp_path / "diverging" / "skipped").iterdir())


def test_a_replayed_step_equals_the_original(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    assert main([str(path), "checkpoint.every_epochs=1", "--stop-after", "6"]) == 0
    capsys.readouterr()
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records}
    lines = replay.replay(run, 5)
    assert lines[0] == f"step 5 of {run}, from step_00000003"
    assert lines[1] == f"  loss: {losses[5]:.6g}"
    assert "  first output that is not finite: none" in lines
    modules = {line.split()[3].rstrip(":") for line in lines if "gradient norm of" in line}
    assert modules == {"backbone", "projector"}
    assert replay.replay(run, 5, from_checkpoint=True)[1] != lines[1]
    assert replay.main([str(run), "2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {run}: no checkpoint before step 2 is left to start from; give a later step"
    )
