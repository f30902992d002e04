"""A rank dies, hangs, is slow or diverges in a run of three ranks.

Each run is resumed and must end with exactly the tensors of the reference run.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import time

import pytest
import ranks
import tiny
import torch
from ranks import Ranks
from reference_run import OVERRIDES, paths, reference, resume, saved_steps

from ssl_pretrain import replay
from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from ssl_pretrain.checkpoint.manifest import verify_checkpoint

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


def read_records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may truncate a line


def wait_for_fault(path):
    deadline = time.monotonic() + 300
    while not (path.parent / "fault_done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_finite(tensors):
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())


@pytest.mark.case(1)
def test_a_killed_rank_ends_the_others_and_only_steps_are_lost(paths, resume, observe):
    path, run = paths
    group = Ranks(path, *OVERRIDES, fault="kill@1:8")
    group.processes[1].join(120)
    start = time.monotonic()
    statuses = group.wait(30)
    seconds = time.monotonic() - start
    assert statuses[1] == -signal.SIGKILL and statuses[0] > 0 and statuses[2] > 0
    assert saved_steps(run) == [3, 6]
    resume()
    observe(
        f"the others ended {seconds:.1f} s later, statuses {statuses}; resumed from step 6: "
        "the same bits"
    )


@pytest.mark.case(1)
def test_an_unexpected_error_on_one_rank_is_printed_and_ends_all_ranks(paths, resume, observe):
    statuses, output = ranks.run(paths[0], *OVERRIDES, fault="raise@2:5")
    assert all(status > 0 for status in statuses)
    assert "RuntimeError: injected" in output
    resume()
    observe("an unexpected error: printed, all ended; the same bits")


@pytest.mark.case(2)
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments_lose_no_checkpoint(tmp_path, observe):
    """All ranks are killed at once, anywhere from their start to the end of a save.

    A checkpoint is saved at nearly every step.
    """
    path, run, rng = tiny.write_config(tmp_path), tmp_path / "run", random.Random(0)
    overrides = ("checkpoint.every_epochs=0.34", "epochs=100", OVERRIDES[2])
    uninterrupted = Ranks(path, *overrides, f"output={tmp_path / 'uninterrupted'}")
    overrides = (*overrides, f"output={run}")
    last_saved = max_repeated_steps = 0
    for number in range(20):
        group = Ranks(path, *overrides)
        is_starting = number % 4 == 0
        if not is_starting:
            group.wait_for_text("step ")
        time.sleep(rng.uniform(0, 1.5 if is_starting else 2.0))
        group.send(signal.SIGKILL)
        group.wait(10)
        saved_step = (
            verify_checkpoint(newest_checkpoint(run))["step"] if list_checkpoints(run) else 0
        )
        log_records = read_records(run) if (run / "metrics.jsonl").exists() else []
        assert saved_step >= last_saved
        max_repeated_steps = max(
            max_repeated_steps, (log_records[-1]["step"] if log_records else 0) - saved_step
        )
        last_saved = saved_step
    assert last_saved > 0
    statuses, output = ranks.run(path, *overrides)
    assert statuses == [0, 0, 0] and uninterrupted.wait(300) == [0, 0, 0], output
    expected, tensors = ranks.load_tensors(tmp_path / "uninterrupted"), ranks.load_tensors(run)
    assert saved_steps(run)[-1] == 300
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert [record["step"] for record in read_records(run)] == list(range(1, 301))
    observe(
        f"20 of 20 resumed; step {last_saved} reached by then, at most {max_repeated_steps} steps "
        "repeated; the same bits, no step logged twice"
    )


@pytest.mark.case(21)
@pytest.mark.parametrize("kind", ["hang", "stop"])
def test_a_hung_rank_ends_the_run_within_the_timeout_with_stacks(paths, resume, observe, kind):
    group = Ranks(paths[0], *OVERRIDES, "parallel.timeout_seconds=15", fault=f"{kind}@1:8")
    wait_for_fault(paths[0])
    start = time.monotonic()
    for rank in (0, 2) if kind == "stop" else (0, 1, 2):
        group.processes[rank].join(90)
        assert not group.processes[rank].is_alive()
    seconds = time.monotonic() - start
    output = group.output()
    group.send(signal.SIGKILL)  # a stopped process does not receive a scheduler's SIGTERM
    statuses = group.wait(10)
    assert all(statuses[rank] > 0 for rank in (0, 2))
    assert "no sign of life for 15 s" in output or "imed out" in output, output[-3000:]
    for rank in (0, 2):
        missing = rf"rank 1 on {socket.gethostname()} has not arrived at collective operation \d+; "
        last_line = group.output(rank).splitlines()[-1]
        assert re.search(rf"{missing}it has begun \d+ and was last in ", last_line), last_line
    result = "stopped: the others report that they waited in vain"
    if kind == "hang":
        hung_output = group.output(1)
        assert "while training step 8" in hung_output and "faulty.py" in hung_output
        result = "hung: its stack names the line"
    resume()
    observe(f"{result}; ended after {seconds:.0f} s with a timeout of 15 s; the same bits")


@pytest.mark.case(21)
def test_suspending_a_rank_for_two_seconds_changes_nothing(paths, resume, observe):
    group = Ranks(paths[0], *OVERRIDES, "parallel.timeout_seconds=60", fault="stop@1:8")
    wait_for_fault(paths[0])
    time.sleep(2)
    group.send(signal.SIGCONT, 1)
    assert group.wait() == [0, 0, 0]
    resume()
    observe("SIGCONT after 2 s: no failure, the same bits")


@pytest.mark.case(22)
def test_a_slow_rank_is_recorded_and_does_not_fail_the_run(paths, resume, observe):
    path, run = paths
    statuses, output = ranks.run(path, *OVERRIDES, fault="slow@1:2")
    assert statuses == [0, 0, 0], output
    waits = [(record["straggler"], record["straggler_seconds"]) for record in read_records(run)[1:]]
    seconds = sorted(wait for rank, wait in waits if rank == 1)
    median = seconds[len(seconds) // 2]
    assert len(seconds) >= 9 and median > 0.15, waits  # the machine itself delays other ranks
    resume()
    observe(
        f"rank 1 named in {len(seconds)} of {len(waits)} steps, others waited {median:.2f} s of "
        "its 0.25; the same bits"
    )


@pytest.mark.case(23)
def test_a_rank_out_of_memory_ends_all_ranks_with_advice(paths, resume, observe):
    """The injected error has the class and message of torch's. tests/gpu has a real one."""
    path, run = paths
    statuses, output = ranks.run(path, *OVERRIDES, fault="oom@1:8")
    assert statuses[1] == 2 and all(status > 0 for status in statuses)
    assert (
        "error: rank 1: CUDA out of memory. Tried to allocate 2.00 GiB. Set micro_batch_size=auto, "
        "which finds the largest micro-batch that fits and trains with the gradient of the whole "
        "batch, or use smaller crops or more ranks. Then start the run again\n"
    ) in output
    assert saved_steps(run) == [3, 6]
    resume()
    observe(f"injected on rank 1: statuses {statuses}, advice printed; resumed: the same bits")


@pytest.mark.case(23)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="running out of GPU memory needs a GPU")
def test_a_gpu_out_of_memory_ends_the_run_with_advice(paths, observe):
    statuses, output = ranks.run(paths[0], *OVERRIDES, "global_batch_size=2400000", size=1)
    assert statuses == [2]
    assert "Set micro_batch_size=auto, which finds the largest micro-batch that fits" in output


@pytest.mark.case(27)
def test_wrong_clocks_do_not_change_the_run(paths, resume, observe):
    path, run = paths
    statuses, output = ranks.run(path, *OVERRIDES, "--stop-after", "8", fault="clock@0:4")
    assert statuses == [0] * 3, output
    for days, folder in zip((3, -1, -2), list_checkpoints(run)):
        date = time.time() + 86400 * days
        for file in [*folder.iterdir(), folder]:
            os.utime(file, (date, date))
    assert "after step 8" in resume()
    observe(
        "rank 0's clock set back a day at step 4, checkpoints dated -2 to +3 days: resumed from "
        "the highest step, the same bits"
    )


@pytest.mark.case(33)
def test_a_rank_that_starts_with_different_weights_gets_those_of_rank_0(paths, resume, observe):
    statuses, output = ranks.run(paths[0], *OVERRIDES, fault="differ@2:0")
    assert statuses == [0, 0, 0], output
    resume()
    observe("at the start: rank 0's were used, the same bits")


@pytest.mark.case(33)
def test_weights_that_diverge_on_one_rank_are_not_saved(paths, resume, observe):
    path, run = paths
    statuses, output = ranks.run(path, *OVERRIDES, fault="flip@2:5")
    assert all(status > 0 for status in statuses)
    assert "rank 2: the weights differ from those of rank 0, first in backbone." in output
    assert "Nothing was saved; start the run again to resume" in output
    assert saved_steps(run) == [3]
    resume()
    observe(
        "a weight of rank 2 changed at step 5: named at the save of step 6, which was not written; "
        "resumed from 3: the same bits"
    )


@pytest.mark.case(16)
def test_deleting_the_images_ends_all_ranks_with_an_error_that_names_the_folder(paths, observe):
    path, run = paths
    group = Ranks(path, "checkpoint.every_epochs=1", "epochs=4000", OVERRIDES[2])
    group.wait_for_step(run, 5)
    shutil.rmtree(path.parent / "images")
    start = time.monotonic()
    statuses = group.wait(60)
    seconds = time.monotonic() - start
    assert all(status > 0 for status in statuses)
    output = group.output()
    assert str(path.parent / "images" / "train") in output, output[-3000:]
    verify_checkpoint(newest_checkpoint(run))
    observe(
        f"the images of three ranks deleted: folder named, all ended {seconds:.1f} s later, "
        "checkpoint intact"
    )


@pytest.mark.case(19)
def test_nan_images_on_one_rank_skip_the_step_on_all_and_are_recorded(paths, observe):
    path, run = paths
    statuses, output = ranks.run(path, *OVERRIDES, "log.every_steps=2", fault="nan@1:5")
    assert statuses == [0, 0, 0], output
    skipped_records = [json.loads(file.read_text()) for file in (run / "skipped").iterdir()]
    (record,) = skipped_records
    assert (record["step"], record["seed"], record["epoch"]) == (5, 0, 1)
    assert len(record["indices"]) == 24
    assert {record["step"]: record["skipped_steps"] for record in read_records(run)}[6] == 1
    assert_finite(ranks.load_tensors(run))
    lines = replay.replay(run, 5)
    assert lines[0].endswith("from step_00000003")
    assert lines[1] == (
        "  skipped by the run in epoch 1; its 24 images match the record in skipped/"
    )
    # The images on disk are good, so the step is good when it is repeated alone.
    assert "  first output that is not finite: none" in lines
    observe(
        "rank 1's images NaN at step 5: step skipped on all, 24 images recorded, replayed alone "
        "from step 3 and found good"
    )


@pytest.mark.case(19)
def test_a_diverging_run_rolls_back_then_ends_and_its_replay_diverges_too(paths, observe):
    path, run = paths
    assert ranks.run(path, *OVERRIDES, "--stop-after", "4")[0] == [0] * 3
    diverging_run = run.with_name("run_diverging")
    overrides = [
        "optim.name=sgd",
        "optim.base_lr=1e30",
        "optim.lr_scaling=none",
        "optim.warmup_epochs=0",
        "guard.max_skipped_steps=2",
        "log.every_steps=2",
        "checkpoint.every_epochs=0.4",
        f"output={diverging_run}",
    ]
    statuses, output = ranks.run(path, "epochs=8", *overrides)
    assert statuses == [2, 2, 2]
    assert "were restored from step_0000000" in output and "repeats this step alone" in output
    files = (diverging_run / "skipped").iterdir()
    skipped_records = {int(file.stem[5:]): json.loads(file.read_text()) for file in files}
    last_step = max(skipped_records)
    lines = replay.replay(diverging_run, last_step)
    start = int(lines[0].rpartition("step_")[2])
    assert skipped_records[last_step]["rolled_back_to"] <= start < last_step, lines
    assert "  first output that is not finite: none" not in lines
    observe(
        f"{len(skipped_records)} steps skipped, one rollback, then status 2; replay of step "
        f"{last_step} breaks at `{lines[-2].strip()[:60]}`"
    )


@pytest.mark.case(20)
def test_a_step_with_an_infinite_gradient_under_autocast_is_skipped(paths, observe):
    path, run = paths
    overrides = (*OVERRIDES, "parallel.precision=bfloat16", "log.every_steps=1")
    statuses, output = ranks.run(path, *overrides, fault="inf@1:5")
    assert statuses == [0, 0, 0], output
    num_skipped = {record["step"]: record["skipped_steps"] for record in read_records(run)}
    assert num_skipped[5] == 1 and sum(num_skipped.values()) == 1
    assert_finite(ranks.load_tensors(run))
    observe(
        "bfloat16, rank 1's gradient infinite at step 5: only that step skipped, weights finite"
    )


@pytest.mark.case(30)
@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_a_failure_of_knn_on_one_rank_warns_or_stops_the_run(paths, resume, observe, policy):
    path, run = paths
    overrides = ("online.knn_every_epochs=1", "online.max_train=40", "online.k=5")
    overrides = (*overrides, f"online.on_failure={policy}")
    statuses, output = ranks.run(path, *OVERRIDES, *overrides, fault="knn@1:0")
    assert "online k-NN failed on rank 1: RuntimeError: injected into k-NN" in output
    if policy == "warn":
        assert statuses == [0, 0, 0]
        assert [record["step"] for record in read_records(run) if "knn" in record] == [6, 9, 12]
    else:
        assert all(status > 0 for status in statuses)
    resume(*overrides)
    observe(f"{policy}: statuses {statuses}, the same bits")


@pytest.mark.case(30)
def test_monitors_do_not_change_the_run(paths, resume, observe):
    """Online k-NN and collapse metrics do not use the run's random number generators."""
    resume("online.knn_every_epochs=1", "online.max_train=40", "health.every_steps=1")
    observe("k-NN every epoch and health every step: the same bits")
