"""Each collective's value and true (summed) gradient, on ranks with different data."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from conftest import run_ranks

from ssl_pretrain.distributed import collectives, process_group, stop_request

pytestmark = pytest.mark.promise


def _gathered_gradient():
    rank, world = process_group.rank(), process_group.world_size()
    x = (torch.arange(6.0, dtype=torch.float64).view(2, 3) + 10 * rank).requires_grad_()
    weights = torch.arange(1.0, 1 + 6 * world, dtype=torch.float64).view(2 * world, 3) * (
        rank + 1
    )  # each rank's loss differs
    everyone = collectives.gather(x)
    (everyone * weights).sum().backward()
    return everyone.detach(), x.grad


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gather_concatenates_and_sums_gradients_of_all_ranks(world_size):
    results = run_ranks(_gathered_gradient, world_size=world_size)
    expected = torch.cat(
        [
            torch.arange(6.0, dtype=torch.float64).view(2, 3) + 10 * rank
            for rank in range(world_size)
        ]
    )
    base = torch.arange(1.0, 1 + 6 * world_size, dtype=torch.float64).view(2 * world_size, 3)
    total = base * sum(rank + 1 for rank in range(world_size))
    for rank, (everyone, gradient) in enumerate(results):
        torch.testing.assert_close(everyone, expected)
        torch.testing.assert_close(gradient, total[2 * rank : 2 * rank + 2])


def _summed_gradient():
    rank = process_group.rank()
    x = torch.tensor([1.0 + rank, 2.0], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    total = collectives.reduce_sum(x)
    (
        (total + b) * (rank + 1)
    ).sum().backward()  # b shares the incoming gradient: reducing it in place would change b's
    return total.detach(), x.grad, b.grad


def test_reduce_sum_has_the_summed_backward_and_leaves_others_gradients_alone():
    results = run_ranks(_summed_gradient, world_size=3)
    for rank, (total, gradient, neighbour) in enumerate(results):
        assert total.tolist() == [6.0, 6.0]
        assert gradient.tolist() == [6.0, 6.0]  # 1 + 2 + 3
        assert neighbour.tolist() == [rank + 1.0, rank + 1.0]


def _objects():
    return collectives.gather_objects({"rank": process_group.rank()}), collectives.broadcast_object(
        f"from {process_group.rank()}"
    )


def test_objects_travel():
    for gathered, broadcast in run_ranks(_objects, world_size=2):
        assert gathered == [{"rank": 0}, {"rank": 1}]
        assert broadcast == "from 0"


def _stop_on_one_rank():
    stop = stop_request.StopRequest()
    answers = []
    for step in range(4):
        if step == 1 and process_group.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        answers.append(stop.agreed())
    stop.close()
    return answers


def test_a_signal_on_one_rank_stops_all_at_the_same_step():
    assert run_ranks(_stop_on_one_rank, world_size=3) == [[False, False, True, True]] * 3


def test_one_process_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert collectives.gather(x) is x
    assert collectives.reduce_sum(x) is x
    assert (process_group.rank(), process_group.world_size(), collectives.gather_objects(1)) == (
        0,
        1,
        [1],
    )
