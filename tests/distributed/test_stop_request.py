"""A stop request on one rank stops all ranks at the same step."""

import os
import signal

import pytest
from conftest import run_ranks

from ssl_pretrain.distributed import process_group
from ssl_pretrain.distributed.stop_request import StopRequest

pytestmark = pytest.mark.promise


def signal_rank_1():
    decisions = []
    with StopRequest() as stop:
        for step in range(4):
            if step == 1 and process_group.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR2)
            decisions.append(stop.exchange_flags())
    return decisions


def test_a_signal_on_one_rank_stops_all_ranks_at_the_same_step():
    assert run_ranks(signal_rank_1, world_size=3) == [[False, False, True, True]] * 3
