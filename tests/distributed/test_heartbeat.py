"""A rank that hangs is named by the others, with host, last operation and activity."""

import inspect
import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import _context
from ranks import free_port

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.distributed.heartbeat import Beat, format_missing_ranks
from ssl_pretrain.system.watchdog import watchdog

HOST = socket.gethostname()


def sleep_forever():
    while True:
        time.sleep(1)


def train_and_hang(rank: int, port: int, log: Path, watchdog_seconds: float) -> None:
    """Take two steps on every rank. Rank 1 hangs in the third."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with collectives.explain_lost_ranks():
            process_group.start(num_threads=1, timeout_seconds=6.0)
            for step in (1, 2, 3):
                watchdog.arm(watchdog_seconds, f"training step {step}", "see the stacks")
                if step == 3 and rank == 1:
                    sleep_forever()
                collectives.gather(torch.ones(2))
                collectives.barrier()
    except collectives.LostRankError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)


LINE = inspect.getsourcelines(sleep_forever)[1] + 2
MISSING = (
    f"rank 1 on {HOST} has not arrived at collective operation 5; it has begun 4 and was last in "
    f"sleep_forever (test_heartbeat.py:{LINE}) while training step 3"
)


def run_three_ranks(folder: Path, watchdog_seconds: float) -> list[str]:
    """Return the last line that each rank prints to stderr, or "" if it prints nothing."""
    port, logs = free_port(), [folder / str(rank) for rank in range(3)]
    processes = [
        _context.Process(target=train_and_hang, args=(rank, port, log, watchdog_seconds))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    for rank in (0, 2, 1):
        processes[rank].join(5 if rank == 1 else 120)
        processes[rank].kill()
    return [(log.read_text().splitlines() or [""])[-1] for log in logs]


@pytest.mark.full
def test_ranks_that_wait_in_a_collective_name_the_rank_that_hangs(tmp_path):
    """The collective times out before the watchdog ends the process."""
    messages = run_three_ranks(tmp_path, watchdog_seconds=60.0)
    for rank in (0, 2):
        start, end = (
            f"error: rank {rank} of 3 on {HOST}: another rank ended or did not answer within 6 s "
            "(parallel.timeout_seconds) while training step 3: ",
            f"; {MISSING}; look for the first error among the outputs of all ranks, fix it, and "
            "start all ranks again. The run resumes from its newest checkpoint",
        )
        assert messages[rank].startswith(start) and messages[rank].endswith(end), messages[rank]


def test_the_watchdog_names_the_rank_that_hangs(tmp_path):
    """The first watchdog ends its rank. The others may notice that before their watchdogs do."""
    messages = run_three_ranks(tmp_path, watchdog_seconds=5.0)
    expected = [
        f"error: rank {rank} of 3 on {HOST}: no sign of life for 5 s (parallel.timeout_seconds) "
        f"while training step 3: {MISSING}; see the stacks"
        for rank in range(3)
    ]
    assert set(messages) & set(expected), messages
    assert all(f"{MISSING}; " in messages[rank] for rank in (0, 2)), messages


def build_beats(*counts: int) -> list[Beat]:
    return [
        Beat(rank, f"node{rank}", f"training step {count}", "f (x.py:1)", count)
        for rank, count in enumerate(counts)
    ]


def test_only_some_of_many_missing_ranks_are_listed():
    text = format_missing_ranks(build_beats(3, *[2] * 6))
    assert re.findall(r"rank (\d) on node\1", text) == ["1", "2", "3", "4"]
    assert text.endswith("; 2 more ranks have not arrived")


def test_if_all_ranks_have_arrived_a_connection_is_named_instead():
    assert format_missing_ranks(build_beats(7, 7)) == (
        "all ranks have begun collective operation 7, so a device or a connection between them "
        "does not answer"
    )
