"""Ranks that die, hang, are slow, or go astray in a real run of three; resumed, the end is that of the run nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time

import pytest
import ranks
import tiny
import torch
from ranks import Ranks
from undisturbed import MORE, goes_on, place, undisturbed

from ssl_pretrain import replay
from ssl_pretrain.checkpoint import state as checkpoint

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


def saved(run):
    return [int(found.name[5:]) for found in checkpoint.checkpoints(run)]


def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last one


@pytest.mark.case(1)
def test_a_killed_rank_ends_the_others_and_nothing_is_lost_but_steps(place, goes_on, seen):
    killed = Ranks(place[0], *MORE, fault="kill@1:8")
    killed.processes[1].join(120)
    began = time.monotonic()
    statuses = killed.end(30)
    took = time.monotonic() - began
    assert statuses[1] == -signal.SIGKILL and statuses[0] > 0 and statuses[2] > 0
    assert saved(place[1]) == [3, 6]
    goes_on()
    seen(
        f"the others ended {took:.1f} s later, statuses {statuses}; resumed from step 6: the same bits"
    )


@pytest.mark.case(1)
def test_an_unexpected_error_on_one_rank_ends_all_and_is_said(place, goes_on, seen):
    statuses, said = ranks.run(place[0], *MORE, fault="raise@2:5")
    assert all(status > 0 for status in statuses) and "RuntimeError: planted" in said
    goes_on()
    seen("an unexpected error: said, all ended; the same bits")


@pytest.mark.case(2)
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments_lose_nothing_saved(tmp_path, seen):
    """The whole group at once, anywhere from its start to the end of a save; a save nearly every step."""
    path, run, moments = tiny.config(tmp_path), tmp_path / "run", random.Random(0)
    more = ("checkpoint.every_epochs=0.34", "epochs=100", MORE[2], f"output={run}")
    straight = Ranks(path, *more[:3], f"output={tmp_path / 'straight'}")
    reached, lost = 0, 0
    for number in range(20):
        killed = Ranks(path, *more)
        if number % 4:  # the others are killed while they start
            killed.until("step ")
        time.sleep(moments.uniform(0, 2.0 if number % 4 else 1.5))
        killed.send(signal.SIGKILL)
        killed.end(10)
        now = (
            checkpoint.verify(checkpoint.newest(run))["step"] if checkpoint.checkpoints(run) else 0
        )
        logged = (
            [record["step"] for record in records(run)] if (run / "metrics.jsonl").exists() else []
        )
        assert now >= reached
        lost = max(lost, (logged[-1] if logged else 0) - now)
        reached = now
    assert reached > 0
    statuses, said = ranks.run(path, *more)
    assert statuses == [0, 0, 0] and straight.end(300) == [0, 0, 0], said
    expected, tensors = ranks.weights(tmp_path / "straight"), ranks.weights(run)
    assert saved(run)[-1] == 300 and all(
        torch.equal(tensors[name], value) for name, value in expected.items()
    )
    assert [record["step"] for record in records(run)] == list(range(1, 301))
    seen(
        f"20 of 20 resumed; step {reached} reached by then, at most {lost} steps done again; the same bits, no step logged twice"
    )


@pytest.mark.case(21)
@pytest.mark.parametrize("kind", ["hang", "stop"])
def test_a_hung_rank_ends_the_run_within_the_time_given_with_stacks(place, goes_on, seen, kind):
    hung = Ranks(place[0], *MORE, "parallel.timeout_seconds=15", fault=f"{kind}@1:8")
    until = time.monotonic() + 300
    while not (place[0].parent / "fault_done").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    began = time.monotonic()
    for rank in (0, 2) if kind == "stop" else (0, 1, 2):
        hung.processes[rank].join(90)
        assert not hung.processes[rank].is_alive()
    took = time.monotonic() - began
    said = hung.said()
    hung.send(signal.SIGKILL)  # SIGTERM, as a scheduler's, is held back from a stopped one
    statuses = hung.end(10)
    assert all(statuses[rank] > 0 for rank in (0, 2)) and (
        "no sign of life for 15 s" in said or "imed out" in said
    ), said[-3000:]
    if kind == "hang":
        assert "while training step 8" in hung.said(1) and "faulty.py" in hung.said(
            1
        )  # where it hung
    goes_on()
    what = (
        "hung: its stack names the line"
        if kind == "hang"
        else "stopped: the others say that they waited in vain"
    )
    seen(f"{what}; ended after {took:.0f} s of 15 given; the same bits")


@pytest.mark.case(21)
def test_a_rank_continued_in_time_goes_on(place, goes_on, seen):
    stopped = Ranks(place[0], *MORE, "parallel.timeout_seconds=60", fault="stop@1:8")
    until = time.monotonic() + 300
    while not (place[0].parent / "fault_done").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(2)
    stopped.send(signal.SIGCONT, 1)
    assert stopped.end() == [0, 0, 0]
    goes_on()
    seen("SIGCONT after 2 s: no failure, the same bits")


@pytest.mark.case(22)
def test_a_slow_rank_is_named_and_is_no_failure(place, goes_on, seen):
    statuses, said = ranks.run(place[0], *MORE, fault="slow@1:2")
    assert statuses == [0, 0, 0], said
    late = [(record["straggler"], record["straggler_seconds"]) for record in records(place[1])[1:]]
    named = [seconds for rank, seconds in late if rank == 1]
    assert len(named) >= 9 and sorted(named)[len(named) // 2] > 0.15, (
        late
    )  # the machine itself is late now and then
    goes_on()
    seen(
        f"rank 1 named in {len(named)} of {len(late)} steps, others waited {sorted(named)[len(named) // 2]:.2f} s of its 0.25; the same bits"
    )


@pytest.mark.case(23)
def test_no_memory_on_one_rank_ends_all_with_advice(place, goes_on, seen):
    """The error is planted: it is torch's own class and words. On a GPU: tests/gpu."""
    statuses, said = ranks.run(place[0], *MORE, fault="oom@1:8")
    assert statuses[1] == 2 and all(status > 0 for status in statuses)
    assert (
        "error: rank 1: CUDA out of memory. Tried to allocate 2.00 GiB. Feed fewer images at once: micro_batch_size=auto takes the most that "
        "fits, with the gradient of the whole batch; or take smaller crops or more ranks, then start the run again\n"
    ) in said
    assert saved(place[1]) == [3, 6]
    goes_on()
    seen(f"planted on rank 1: statuses {statuses}, advice said; resumed: the same bits. Host: as 1")


@pytest.mark.case(23)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA itself running out needs a GPU")
def test_a_gpu_without_memory_ends_with_advice(place, seen):
    statuses, said = ranks.run(place[0], *MORE, "global_batch_size=2400000", size=1)
    assert statuses == [2] and "Feed fewer images at once" in said


@pytest.mark.case(27)
def test_clocks_do_not_matter(place, goes_on, seen):
    statuses, said = ranks.run(place[0], *MORE, "--stop-after", "8", fault="clock@0:4")
    assert statuses == [0] * 3, said
    now = time.time()
    for days, folder in zip((3, -1, -2), checkpoint.checkpoints(place[1])):
        for file in [*folder.iterdir(), folder]:
            os.utime(file, (now + 86400 * days, now + 86400 * days))
    assert "after step 8" in goes_on()
    seen(
        "rank 0's clock set back a day at step 4, checkpoints dated -2 to +3 days: resumed from the highest step, the same bits"
    )


@pytest.mark.case(33)
def test_a_rank_that_starts_with_other_weights_gets_those_of_rank_0(place, goes_on, seen):
    statuses, said = ranks.run(place[0], *MORE, fault="differ@2:0")
    assert statuses == [0, 0, 0], said
    goes_on()
    seen("at the start: rank 0's were used, the same bits")


@pytest.mark.case(33)
def test_a_rank_whose_weights_go_astray_is_found_before_anything_is_saved(place, goes_on, seen):
    statuses, said = ranks.run(place[0], *MORE, fault="flip@2:5")
    assert all(status > 0 for status in statuses)
    assert (
        "rank 2: the weights are no longer those of rank 0, first in backbone." in said
        and "nothing was saved, resume" in said
    )
    assert saved(place[1]) == [3]
    goes_on()
    seen(
        "a weight of rank 2 changed at step 5: named at the save of step 6, which was not written; resumed from 3: the same bits"
    )


@pytest.mark.case(16)
def test_data_that_vanish_in_a_run_end_all_ranks_and_are_named(place, seen):
    path, run = place
    going = Ranks(path, "checkpoint.every_epochs=1", "epochs=4000", MORE[2])
    going.until_step(run, 5)
    shutil.rmtree(path.parent / "images")
    began = time.monotonic()
    statuses = going.end(60)
    took = time.monotonic() - began
    assert all(status > 0 for status in statuses)
    assert str(path.parent / "images" / "train") in going.said(), going.said()[-3000:]
    checkpoint.verify(checkpoint.newest(run))
    seen(
        f"the images of three ranks deleted: folder named, all ended {took:.1f} s later, checkpoint whole"
    )


@pytest.mark.case(19)
def test_images_that_are_not_numbers_on_one_rank_move_nothing_and_are_noted(place, seen):
    path, run = place
    statuses, said = ranks.run(path, *MORE, "log.every_steps=2", fault="nan@1:5")
    assert statuses == [0, 0, 0], said
    notes = [json.loads(file.read_text()) for file in (run / "skipped").iterdir()]
    assert [
        (note["step"], note["seed"], note["epoch"], len(note["indices"])) for note in notes
    ] == [(5, 0, 1, 24)]
    assert {record["step"]: record["skipped_steps"] for record in records(run)}[6] == 1
    assert all(
        value.isfinite().all() for value in ranks.weights(run).values() if value.is_floating_point()
    )
    lines = replay.replay(run, 5)
    assert lines[
        1
    ] == "  skipped by the run; its 24 images as noted in skipped/, of epoch 1" and lines[
        0
    ].endswith("from step_00000003")
    assert (
        "  first output that is not finite: none" in lines
    )  # alone, with the images as they are on disk, the step is a good one
    seen(
        "rank 1's images NaN at step 5: step skipped on all, 24 images noted, replayed alone from step 3 and found good"
    )


@pytest.mark.case(19)
def test_skipping_rolling_back_and_stopping_with_a_replay_that_breaks_at_the_same_place(
    place, seen
):
    path, run = place
    assert ranks.run(path, *MORE, "--stop-after", "4")[0] == [0] * 3
    more = [
        "optim.name=sgd",
        "optim.base_lr=1e300",
        "optim.lr_scaling=none",
        "optim.warmup_epochs=0",
        f"output={run}_wild",
    ]
    more += ["guard.max_skipped_steps=2", "log.every_steps=2", "checkpoint.every_epochs=0.4"]
    statuses, said = ranks.run(path, "epochs=8", *more)
    assert (
        statuses == [2, 2, 2]
        and "went back to step_0000000" in said
        and "repeats that step" in said
    )
    wild = run.with_name("run_wild")
    notes = {
        int(file.stem[5:]): json.loads(file.read_text()) for file in (wild / "skipped").iterdir()
    }
    last = max(notes)
    assert "rolled_back_to" in notes[last]
    lines = replay.replay(wild, last)
    assert notes[last]["rolled_back_to"] <= int(lines[0].rpartition("step_")[2]) < last, lines
    assert not any(line == "  first output that is not finite: none" for line in lines), lines
    seen(
        f"{len(notes)} steps skipped, one rollback, then status 2; replay of step {last} breaks at `{lines[-2].strip()[:60]}`"
    )


@pytest.mark.case(20)
def test_an_infinite_gradient_under_autocast_is_skipped_and_counted(place, seen):
    path, run = place
    more = (*MORE, "parallel.precision=bfloat16", "log.every_steps=1")
    statuses, said = ranks.run(path, *more, fault="inf@1:5")
    assert statuses == [0, 0, 0], said
    skipped = {record["step"]: record["skipped_steps"] for record in records(run)}
    assert skipped[5] == 1 and sum(skipped.values()) == 1
    assert all(
        value.isfinite().all() for value in ranks.weights(run).values() if value.is_floating_point()
    )
    seen("bfloat16, rank 1's gradient infinite at step 5: that step alone skipped, weights finite")


@pytest.mark.case(30)
@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_a_knn_that_fails_on_one_rank(place, goes_on, seen, policy):
    path, run = place
    monitor = (
        "online.knn_every_epochs=1",
        "online.max_train=40",
        "online.k=5",
        f"online.on_failure={policy}",
    )
    statuses, said = ranks.run(path, *MORE, *monitor, fault="knn@1:0")
    assert "online k-NN failed on rank 1: RuntimeError: planted in k-NN" in said
    if policy == "warn":
        assert statuses == [0, 0, 0]
        assert [record["step"] for record in records(run) if "knn" in record] == [6, 9, 12]
    else:
        assert all(status > 0 for status in statuses)
    goes_on(*monitor)
    seen(f"{policy}: statuses {statuses}, the same bits")


@pytest.mark.case(30)
def test_watching_changes_nothing(place, goes_on, seen):
    """k-NN and health inside the run draw from no generator that the training uses."""
    goes_on("online.knn_every_epochs=1", "online.max_train=40", "health.every_steps=1")
    seen("k-NN every epoch and health every step: the same bits")
