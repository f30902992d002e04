"""Each collective's value and true (summed) gradient, on ranks with different data."""

import pytest
import torch
from conftest import run_ranks

from ssl_pretrain.distributed import collectives, process_group

pytestmark = pytest.mark.promise


def build_rows(rank):
    return torch.arange(6.0, dtype=torch.float64).view(2, 3) + 10 * rank


def build_weights(world_size):
    num_weights = 6 * world_size
    return torch.arange(1.0, 1 + num_weights, dtype=torch.float64).view(2 * world_size, 3)


def gather_with_gradient():
    rank, world_size = process_group.rank(), process_group.world_size()
    x = build_rows(rank).requires_grad_()
    gathered = collectives.gather(x)
    weights = build_weights(world_size) * (rank + 1)  # each rank has a different loss
    (gathered * weights).sum().backward()
    return gathered.detach(), x.grad


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gather_concatenates_and_sums_gradients_of_all_ranks(world_size):
    results = run_ranks(gather_with_gradient, world_size=world_size)
    expected = torch.cat([build_rows(rank) for rank in range(world_size)])
    gradients = build_weights(world_size) * sum(range(1, world_size + 1))
    for rank, (gathered, gradient) in enumerate(results):
        torch.testing.assert_close(gathered, expected)
        torch.testing.assert_close(gradient, gradients[2 * rank : 2 * rank + 2])


def sum_with_gradient():
    rank = process_group.rank()
    x = torch.tensor([1.0 + rank, 2.0], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    total = collectives.reduce_sum(x)
    # `bias` receives the same gradient tensor. Reducing it in place would change `bias.grad` too.
    ((total + bias) * (rank + 1)).sum().backward()
    return total.detach(), x.grad, bias.grad


def test_reduce_sum_sums_gradients_and_leaves_those_of_other_tensors_alone():
    for rank, (total, gradient, bias_gradient) in enumerate(
        run_ranks(sum_with_gradient, world_size=3)
    ):
        assert total.tolist() == [6.0, 6.0]
        assert gradient.tolist() == [6.0, 6.0]  # 1 + 2 + 3
        assert bias_gradient.tolist() == [rank + 1.0, rank + 1.0]


def exchange_objects():
    gathered = collectives.gather_objects({"rank": process_group.rank()})
    return gathered, collectives.broadcast_object(f"from {process_group.rank()}")


def test_objects_are_gathered_and_broadcast():
    for gathered, broadcast in run_ranks(exchange_objects, world_size=2):
        assert gathered == [{"rank": 0}, {"rank": 1}]
        assert broadcast == "from 0"


def test_collectives_of_one_process_are_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert collectives.gather(x) is x
    assert collectives.reduce_sum(x) is x
    assert collectives.gather_objects(1) == [1]
    assert (process_group.rank(), process_group.world_size()) == (0, 1)


def shift_rows():
    x = build_rows(process_group.rank())
    once = collectives.shift_around_ring(x.T)  # not contiguous
    back = x
    for _ in range(process_group.world_size()):
        back = collectives.shift_around_ring(back)
    return once, back


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_shift_moves_tensors_to_the_next_rank_and_around(world_size):
    for rank, (once, back) in enumerate(run_ranks(shift_rows, world_size=world_size)):
        torch.testing.assert_close(once, build_rows((rank - 1) % world_size).T)
        torch.testing.assert_close(back, build_rows(rank))


def largest_rows():
    return collectives.reduce_max(build_rows(process_group.rank()) * (-1) ** process_group.rank())


def test_reduce_max_returns_the_largest_of_each_entry():
    for largest in run_ranks(largest_rows, world_size=3):
        torch.testing.assert_close(largest, build_rows(2))
