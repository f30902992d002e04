"""The order of images: complete, the same for any number of ranks, and pinned."""

import numpy as np
import pytest

from ssl_pretrain.data import order
from ssl_pretrain.data.order import BatchPlan


def epoch_indices(plan: BatchPlan, epoch: int = 0) -> np.ndarray:
    """Return the indices of all steps of an epoch."""
    first_step = epoch * plan.steps_per_epoch
    return np.concatenate(
        [plan.indices(step) for step in range(first_step, first_step + plan.steps_per_epoch)]
    )


def test_an_epoch_has_each_image_once():
    indices = epoch_indices(BatchPlan(0, 103, 10), epoch=3)
    assert len(indices) == len(set(indices.tolist())) == 100
    assert indices.min() >= 0 and indices.max() < 103 and indices.dtype == np.int64


def test_each_seed_and_epoch_has_its_own_order():
    first, *others = (
        BatchPlan(seed, 1000, 1000).indices(epoch).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert all(other != first and sorted(other) == sorted(first) for other in others)
    assert BatchPlan(0, 1000, 1000).indices(0).tolist() == first


def test_the_order_is_pinned():
    # It changes only if `rng` changes, which changes every run.
    assert BatchPlan(0, 10, 10).indices(0).tolist() == [8, 7, 3, 5, 6, 2, 9, 4, 0, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_make_up_the_global_batch(world_size):
    step = 2 * 8 + 3
    ranks = [BatchPlan(7, 100, 12, rank, world_size).indices(step) for rank in range(world_size)]
    assert {len(indices) for indices in ranks} == {12 // world_size}
    np.testing.assert_array_equal(np.concatenate(ranks), BatchPlan(7, 100, 12).indices(step))


def test_the_order_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        BatchPlan(0, 10, 5).indices(0)[0] = 1


def test_an_incomplete_last_batch_is_dropped():
    assert [order.steps_per_epoch(n, 10) for n in (10, 19, 20, 103)] == [1, 1, 2, 10]


MESSAGES = {
    (
        8192,
        10_000,
        12,
    ): "global_batch_size: 8192 does not divide evenly over 12 ranks; give 8184 or 8196",
    (9, 9, 4): "global_batch_size: 9 does not divide evenly over 4 ranks; give 8 or 12",
    (3, 9, 8): "global_batch_size: 3 does not divide evenly over 8 ranks; give 8",
    (512, 99, 1): (
        "global_batch_size: 512 is more than the 99 images of the data set; give at most 99"
    ),
    (0, 10, 1): "global_batch_size: 0 is too small; give a whole number >= 1",
}


@pytest.mark.parametrize(("global_batch_size", "num_images", "world_size"), MESSAGES)
def test_an_impossible_global_batch_size_is_refused(global_batch_size, num_images, world_size):
    with pytest.raises(ValueError) as error:
        BatchPlan(0, num_images, global_batch_size, 0, world_size)
    assert str(error.value) == MESSAGES[global_batch_size, num_images, world_size]


class TestQuasiRandom:
    """The quasi-random order mostly follows the disk, and keeps the random order's promises."""

    N, WINDOW, BATCH = 1000, 256, 30

    def build_plan(self, seed: int = 0, rank: int = 0, world_size: int = 1) -> BatchPlan:
        return BatchPlan(seed, self.N, self.BATCH, rank, world_size, self.WINDOW)

    def test_an_epoch_has_each_image_once(self):
        indices = epoch_indices(self.build_plan())
        assert len(indices) == len(set(indices.tolist())) == 990 and indices.max() < self.N

    def test_a_window_has_only_a_few_blocks(self):
        indices = epoch_indices(self.build_plan())
        for first in range(0, 768, 256):  # the last block is short, and so is its window
            assert len(set((indices[first : first + 200] // order.BLOCK_SIZE).tolist())) <= 8
        assert len(set((indices // order.BLOCK_SIZE).tolist())) == 16
        assert np.abs(np.diff(indices[:256])).mean() > order.BLOCK_SIZE  # mixed within the window

    def test_each_seed_and_epoch_has_its_own_order(self):
        orders = {
            tuple(epoch_indices(self.build_plan(seed), epoch))
            for seed in range(2)
            for epoch in range(2)
        }
        assert len(orders) == 4

    @pytest.mark.parametrize("world_size", [1, 2, 3, 5])
    def test_ranks_make_up_the_global_batch(self, world_size):
        plans = [self.build_plan(7, rank, world_size) for rank in range(world_size)]
        for step in (0, 5, 40):
            np.testing.assert_array_equal(
                np.concatenate([plan.indices(step) for plan in plans]),
                self.build_plan(7).indices(step),
            )

    def test_the_next_blocks_are_known_in_advance(self):
        plan = self.build_plan(7)
        last = plan.steps_per_epoch - 1
        for step in range(last):
            later_indices = np.concatenate(
                [plan.indices(later_step) for later_step in range(step + 1, last + 1)]
            )
            blocks = set((plan.next_window_blocks(step) // order.BLOCK_SIZE).tolist())
            assert blocks <= set((later_indices // order.BLOCK_SIZE).tolist())
        assert len(plan.next_window_blocks(0)) == 4 and len(plan.next_window_blocks(last)) == 0
        assert len(BatchPlan(7, self.N, self.BATCH).next_window_blocks(0)) == 0

    def test_a_window_of_the_whole_data_set_gives_the_random_order(self):
        np.testing.assert_array_equal(
            BatchPlan(0, 100, 100, window_size=100).indices(0), BatchPlan(0, 100, 100).indices(0)
        )
