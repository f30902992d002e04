"""A rank that is slow for long is named once, with its host and the activity that is slow."""

import contextlib
import io
import socket
import time

from conftest import run_ranks

from ssl_pretrain.distributed import process_group
from ssl_pretrain.distributed.straggler import StragglerMonitor
from ssl_pretrain.system.watchdog import watchdog


def take_steps(num_steps, seconds_late):
    monitor, records, stderr = StragglerMonitor(every_steps=1), [], io.StringIO()
    with contextlib.redirect_stderr(stderr):
        for step in range(1, num_steps + 1):
            watchdog.arm(100.0, f"waiting for the images of step {step}", "")
            time.sleep(0.1 + seconds_late * (process_group.rank() == 2))
            watchdog.arm(100.0, f"training step {step}", "")
            time.sleep(0.1)
            records.append(monitor.measure(step))
    watchdog.disarm()
    return records, stderr.getvalue()


def test_a_slow_rank_is_measured_and_named_once_with_host_and_activity():
    results = run_ranks(take_steps, 8, 0.4, world_size=3)
    for records, _ in results:
        assert [record["straggler"] for record in records[1:]] == [2] * 7
        assert all(record["straggler_seconds"] > 0.2 for record in records[1:]), records
    texts = [text for _, text in results]
    start, _, end = texts[0].partition(", last for ")
    assert start == (
        f"rank 2 on {socket.gethostname()} is slow: in 5 measurements in a row the others waited "
        "for it"
    )
    assert end.partition("%")[2] == (
        " of a step. It loses the time in 'waiting for the images of step'. metrics.jsonl has the "
        "waiting times under straggler_seconds\n"
    )
    assert texts[1:] == ["", ""]


def test_fewer_measurements_name_no_rank():
    assert [text for _, text in run_ranks(take_steps, 4, 0.4, world_size=3)] == ["", "", ""]


def test_only_every_nth_step_is_measured_and_one_rank_never():
    assert StragglerMonitor(every_steps=1).measure(1) == {}
    results = run_ranks(measure_every_other_step, world_size=2)
    assert results == [[False, True, False, True]] * 2


def measure_every_other_step():
    monitor = StragglerMonitor(every_steps=2)
    return ["straggler" in monitor.measure(step) for step in (1, 2, 3, 4)]
