"""What goes wrong on clusters, planted in real runs of several processes; the end is that of the run nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from ssl_pretrain import checkpoint

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).parent / "faulty.py"
pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
MORE = ["checkpoint.every_epochs=1", "epochs=4"]  # 12 steps


def start(path, run, ranks=3, fault="none@0:0", *overrides):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAULT": fault, "FAULT_DONE": str(path.parent / "fault")}
    alone = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*alone, str(FAULTY), str(path), f"output={run}", *MORE, *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def ended(process, seconds=240):
    """(exit status, what it said)."""
    said = process.communicate(timeout=seconds)[0]
    return process.returncode, said


def weights(run):
    return checkpoint.read(checkpoint.newest(run))


def same(run, expected):
    manifest, tensors = weights(run)
    assert manifest["step"] == 12
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    status, said = ended(start(tiny.config(folder), folder / "run"))
    assert status == 0, said
    return weights(folder / "run")[1]


def test_a_killed_rank_ends_the_others_and_nothing_is_lost_but_steps(tmp_path, undisturbed):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    status, said = ended(start(path, run, 3, "kill@1:8"))
    assert status != 0 and "SIGKILL" in said
    assert [found.name for found in checkpoint.checkpoints(run)] == ["step_00000003", "step_00000006"]
    assert ended(start(path, run))[0] == 0
    same(run, undisturbed)


def test_an_unexpected_error_on_one_rank_ends_all_and_is_said(tmp_path, undisturbed):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    status, said = ended(start(path, run, 3, "raise@2:5"))
    assert status != 0 and "RuntimeError: planted" in said
    assert ended(start(path, run))[0] == 0
    same(run, undisturbed)


@pytest.mark.parametrize("kind", ["hang", "stop"])
def test_a_hung_rank_ends_the_run_within_the_time_given_with_stacks(tmp_path, undisturbed, kind):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    began = time.monotonic()
    process = start(path, run, 3, f"{kind}@1:8", "parallel.timeout_seconds=15")
    status, said = ended(process)
    assert status != 0 and time.monotonic() - began < 200
    assert "Timeout (" in said or "imed out" in said, said[-3000:]
    if kind == "hang":
        assert "Timeout (" in said and "faulty.py" in said  # where it hung
    assert ended(start(path, run))[0] == 0
    same(run, undisturbed)


def test_a_slow_rank_is_no_failure(tmp_path, undisturbed):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    assert ended(start(path, run, 3, "slow@1:2"))[0] == 0
    same(run, undisturbed)


def test_a_rank_that_starts_with_other_weights_gets_those_of_rank_0(tmp_path, undisturbed):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    assert ended(start(path, run, 3, "differ@2:0"))[0] == 0
    same(run, undisturbed)


def test_another_part_size_after_a_resume_goes_on_to_rounding(tmp_path):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    more = ["parallel.bn_group_images=8"]
    assert ended(start(path, tmp_path / "straight", 1, "none@0:0", *more))[0] == 0
    process = start(path, run, 1, "none@0:0", *more, "--stop-after", "5")
    assert ended(process)[0] == 0
    status, said = ended(start(path, run, 1, "none@0:0", *more, "local_batch_size=8"))
    assert status == 0 and "local_batch_size 24 then, 8 now" in said
    for name, value in weights(tmp_path / "straight")[1].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights(run)[1][name], value, rtol=1e-8, atol=1e-8)


def test_watching_changes_nothing(tmp_path, undisturbed):
    """k-NN and health inside the run draw from no generator that the training uses."""
    path, run = tiny.config(tmp_path), tmp_path / "run"
    assert ended(start(path, run, 3, "none@0:0", "online.knn_every_epochs=1", "online.max_train=40", "health.every_steps=1"))[0] == 0
    same(run, undisturbed)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    first = start(path, run, 1, "slow@0:1", "epochs=400")
    try:
        for line in first.stdout:
            if line.startswith("step"):
                break
        status, said = ended(start(path, run, 1))
        assert status == 2 and f"output: {run} is in use by process {first.pid}" in said
    finally:
        first.kill()
        first.wait()


def test_twenty_kills_at_random_moments_lose_nothing_saved(tmp_path):
    """The whole group at once, anywhere from the start of Python to the end of a save."""
    path, run, random_moments = tiny.config(tmp_path), tmp_path / "run", random.Random(0)
    arguments = ("checkpoint.every_epochs=0.34", "epochs=40", "log.wandb=off")
    status, said = ended(start(path, tmp_path / "straight", 1, "none@0:0", *arguments))
    assert status == 0, said
    reached = 0
    for _ in range(20):
        process = start(path, run, 1, "none@0:0", *arguments)
        for line in process.stdout:
            if line.startswith("step"):
                break
        time.sleep(random_moments.uniform(0, 0.6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = checkpoint.checkpoints(run)
        now = checkpoint.verify(checkpoint.newest(run))["step"] if found else 0
        assert now >= reached
        reached = now
    assert ended(start(path, run, 1, "none@0:0", *arguments))[0] == 0
    expected, (manifest, tensors) = weights(tmp_path / "straight")[1], weights(run)
    assert manifest["step"] == 120 and all(torch.equal(tensors[name], value) for name, value in expected.items())
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))
