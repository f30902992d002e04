"""Whole runs: ranks equal one process, and resumed runs equal uninterrupted ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from conftest import run_ranks
from networks import largest_difference
from safetensors.torch import load_file

from ssl_pretrain import config
from ssl_pretrain.build import build_method
from ssl_pretrain.checkpoint import state
from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from ssl_pretrain.checkpoint.manifest import verify_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.distributed import process_group
from ssl_pretrain.train import main, train

pytestmark = pytest.mark.promise

ROOT = Path(__file__).parents[1]


def _train(path, overrides=(), stop_after=None):
    """Train in this process or rank and return the steps done and the final weights."""
    settings = config.load(path, overrides)
    device = torch.device("cpu")
    step = train(settings, device, stop_after)
    return step, read_checkpoint(newest_checkpoint(settings.output))[1]


def _run_command(path, *arguments, output=None):
    """Run the train command in this process and return the weights that it saved."""
    output = output or config.load(path).output
    assert main([str(path), *arguments, f"output={output}"]) == 0
    return read_checkpoint(newest_checkpoint(output))[1]


def _run_torchrun(path, ranks, *arguments):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(ranks), "-m", "ssl_pretrain.train"]
    return subprocess.run(
        [*command, str(path), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280
    )


@pytest.mark.full
def test_two_ranks_under_torchrun_end_with_the_weights_of_one(tmp_path):
    path, float64 = tiny.write_config(tmp_path), "parallel.precision=float64"
    _, one_process = _train(path, [float64, f"output={tmp_path / 'one'}"], stop_after=20)
    result = _run_torchrun(path, 2, float64, f"output={tmp_path / 'two'}", "--stop-after", "20")
    assert result.returncode == 0, result.stderr[-3000:]
    manifest, two_ranks = read_checkpoint(newest_checkpoint(tmp_path / "two"))
    assert manifest["step"] == 20 and manifest["machine"]["world_size"] == 2
    assert one_process.keys() == two_ranks.keys()
    for name, value in one_process.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                two_ranks[name],
                value,
                rtol=1e-9,
                atol=1e-9,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_ranks_end_with_the_weights_of_one_process_by_default(tmp_path):
    """Take only two steps. In the third, rounding moves some activations across a ReLU's zero.

    The precision is that of the CPU. Ranks may differ from one process by the rounding of bfloat16,
    which is measured against float64.
    """
    path = tiny.write_config(tmp_path)
    _, one_process = _train(path, [f"output={tmp_path / 'one'}"], stop_after=2)
    settings = ["parallel.precision=float64", f"output={tmp_path / 'exact'}"]
    _, exact = _train(path, settings, stop_after=2)
    rounding = max(1e-4, largest_difference(one_process, exact))
    for _, weights in run_ranks(_train, path, [f"output={tmp_path / 'three'}"], 2, world_size=3):
        assert largest_difference(weights, one_process) < rounding


@pytest.mark.full
def test_three_ranks_resumed_twice_within_an_epoch_equal_an_uninterrupted_run_bit_for_bit(tmp_path):
    path = tiny.write_config(tmp_path)
    uninterrupted = run_ranks(
        _train, path, [f"output={tmp_path / 'uninterrupted'}"], 9, world_size=3
    )
    for steps in (4, 1, 4):  # epochs have 3 steps, so both stops are within the second epoch
        resumed = run_ranks(_train, path, [f"output={tmp_path / 'stopped'}"], steps, world_size=3)
    assert resumed[0][0] == uninterrupted[0][0] == 9
    for rank in range(3):
        for name, value in uninterrupted[rank][1].items():
            assert torch.equal(resumed[rank][1][name], value), name
    optimizers = [
        load_file(newest_checkpoint(tmp_path / run) / "optimizer.safetensors")
        for run in ("uninterrupted", "stopped")
    ]
    assert optimizers[0].keys() == optimizers[1].keys()
    assert all(torch.equal(optimizers[0][key], optimizers[1][key]) for key in optimizers[0])
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("uninterrupted", "stopped")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 9


@pytest.mark.parametrize("omitted", ["method.safetensors", "optimizer.safetensors"])
def test_the_comparison_notices_a_checkpoint_that_lacks_a_file(tmp_path, omitted, monkeypatch):
    """Check the comparison itself: it must fail after a resume that lost a state."""
    path = tiny.write_config(tmp_path)
    _, uninterrupted = _train(path, [f"output={tmp_path / 'uninterrupted'}"], stop_after=6)
    _train(path, stop_after=3)
    original_load_file = state.load_file
    monkeypatch.setattr(
        state,
        "load_file",
        lambda file: {} if str(file).endswith(omitted) else original_load_file(file),
    )
    if omitted == "method.safetensors":
        monkeypatch.setattr(
            torch.nn.Module, "load_state_dict", lambda self, tensors, strict=True: None
        )
    train(config.load(path), torch.device("cpu"), 3)
    monkeypatch.undo()
    resumed = read_checkpoint(newest_checkpoint(config.load(path).output))[1]
    assert not all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())


@pytest.mark.parametrize(
    ("precision", "steps", "tolerance"), [("float32", 1, 1e-4), ("float64", 3, 1e-9)]
)
def test_a_run_resumed_on_another_world_size_sees_the_same_batches(
    tmp_path, precision, steps, tolerance
):
    path, setting = tiny.write_config(tmp_path), f"parallel.precision={precision}"
    _, one_process = _train(path, [setting, f"output={tmp_path / 'one'}"], stop_after=2 * steps)
    run_ranks(_train, path, [setting, f"output={tmp_path / 'resumed'}"], steps, world_size=2)
    with pytest.warns(
        UserWarning,
        match="resuming is exact up to rounding, not bit for bit: world_size was 2 and is now 1",
    ):
        _, resumed = _train(path, [setting, f"output={tmp_path / 'resumed'}"], stop_after=steps)
    for name, value in one_process.items():
        if value.is_floating_point():
            torch.testing.assert_close(resumed[name], value, rtol=tolerance, atol=tolerance)


def test_restarting_a_finished_run_changes_nothing(tmp_path):
    path = tiny.write_config(tmp_path)
    _, first = _train(path, ["epochs=1"])
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    step, restarted = _train(path, ["epochs=1"])
    assert step == 3 and all(torch.equal(first[name], restarted[name]) for name in first)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == records


TRAIN_WITH_A_SLOW_SAVE = """
import sys, time
from ssl_pretrain import train
from ssl_pretrain.checkpoint import tensor_files
original_save_file = tensor_files.save_file
def save_slowly(tensors, path):
    original_save_file(tensors, path)
    if "step_00000006" in str(path) and path.name == sys.argv[2]:
        path.write_bytes(path.read_bytes()[:1000])  # half written
        print("writing", flush=True)
        time.sleep(60)
tensor_files.save_file = save_slowly
train.main([sys.argv[1], "checkpoint.every_epochs=1"])
"""


@pytest.mark.parametrize(
    "file", [pytest.param("method.safetensors", marks=pytest.mark.full), "optimizer.safetensors"]
)
def test_sigkill_during_a_save_loses_only_the_steps_since_the_last_checkpoint(tmp_path, file):
    path = tiny.write_config(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN_WITH_A_SLOW_SAVE, str(path), file],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "writing":
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000003"]
    assert list(folder.glob(".writing-*"))
    resumed = _run_command(path, "checkpoint.every_epochs=1", "--stop-after", "6")
    assert newest_checkpoint(tmp_path / "run").name == "step_00000009" and not list(
        folder.glob(".writing-*")
    )
    uninterrupted = _run_command(
        path, "checkpoint.every_epochs=1", "--stop-after", "9", output=tmp_path / "uninterrupted"
    )
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())


def test_a_signal_makes_a_run_save_and_stop(tmp_path):
    path = tiny.write_config(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ssl_pretrain.train", str(path), "epochs=100000"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.terminate()
    process.stdout.read()
    assert process.wait(60) == 75
    assert verify_checkpoint(newest_checkpoint(tmp_path / "run"))["step"] >= 1


def test_no_worker_process_remains_after_training(tmp_path):
    path = tiny.write_config(tmp_path)
    _train(path, ["data.num_workers=2"], stop_after=2)
    time.sleep(0.5)
    import multiprocessing

    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float64"])
def test_every_precision_trains_to_finite_weights(tmp_path, precision):
    path = tiny.write_config(tmp_path)
    _, weights = _train(path, [f"parallel.precision={precision}"], stop_after=3)
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


def test_the_run_folder_has_records_and_pictures(tmp_path):
    path = tiny.write_config(tmp_path)
    _train(path, ["epochs=2", "online.knn_every_epochs=1", "online.k=5"])
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert {
        "loss",
        "lr",
        "images_per_second",
        "data_wait",
        "gradient_norm",
        "nt_xent",
        "positive_cosine",
    } <= records[0].keys()
    assert [record["step"] for record in records if "knn" in record] == [3, 6]
    assert [record["step"] for record in records if "rankme" in record] == [2, 4, 6]
    assert (run / "views.png").stat().st_size > 1000 and (run / "config.yaml").exists()


def test_a_run_can_start_from_the_weights_of_another(tmp_path):
    path = tiny.write_config(tmp_path)
    _, first = _train(path, stop_after=2)
    second = config.load(
        path, [f"backbone.init={tmp_path / 'run'}", f"output={tmp_path / 'second'}"]
    )
    initial = build_method(second).state_dict()
    backbone = [name for name in first if name.startswith("backbone.")]
    assert backbone and all(
        torch.equal(initial[name], first[name].to(initial[name].dtype)) for name in backbone
    )
    other_backbone = [
        f"backbone.init={tmp_path / 'run'}",
        "backbone.name=test_resnet",
        "backbone.args={channels: [8, 8, 8, 8]}",
    ]
    with pytest.raises(
        ValueError,
        match=r"not the weights of this backbone: .* Nothing was loaded; set backbone.name",
    ):
        build_method(config.load(path, other_backbone))


def test_a_run_no_longer_than_its_warmup_is_trained_with_a_warning(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    warning = (
        "warning: optim.warmup_epochs: 2.5 takes the whole run of epochs: 1, so the learning rate "
        "only rises; give a shorter warm-up, such as optim.warmup_epochs=0.1"
    )
    assert main([str(path), "epochs=1", "optim.warmup_epochs=2.5", "--plan"]) == 0
    assert warning in capsys.readouterr().out.splitlines()
    assert main([str(path), "epochs=1", "optim.warmup_epochs=2.5"]) == 0
    assert capsys.readouterr().err.splitlines().count(warning) == 1
    for warmup in ("0", "0.1"):
        assert main([str(path), "epochs=1", f"optim.warmup_epochs={warmup}", "--plan"]) == 0
        assert "warning" not in capsys.readouterr().out


def test_a_diverged_run_stops_with_advice(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    sgd = ["optim.name=sgd", "optim.lr_scaling=none", "optim.warmup_epochs=0"]
    assert main([str(path), *sgd, "optim.base_lr=1e300"]) == 2
    message = capsys.readouterr().err
    assert "had a non-finite gradient" in message
    assert "Lower optim.base_lr, lengthen optim.warmup_epochs" in message


def test_main_leaves_no_process_group_behind(tmp_path):
    path = tiny.write_config(tmp_path)
    assert main([str(path), "--stop-after", "1"]) == 0
    assert process_group.world_size() == 1
