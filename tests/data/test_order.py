"""The order of images: whole, the same for any number of ranks, and the messages."""

import numpy as np
import pytest

from ssl_pretrain.data import order


def test_an_epoch_shows_each_image_once():
    seen = np.concatenate(
        [order.global_indices(0, 3, step, n=103, global_batch_size=10) for step in range(10)]
    )
    assert len(seen) == len(set(seen.tolist())) == 100
    assert seen.min() >= 0 and seen.max() < 103 and seen.dtype == np.int64


def test_seeds_and_epochs_have_orders_of_their_own():
    first, *others = (
        order.global_indices(seed, epoch, 0, 1000, 1000).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert all(other != first and sorted(other) == sorted(first) for other in others)
    assert order.global_indices(0, 0, 0, 1000, 1000).tolist() == first


def test_the_order_is_pinned():
    # moves only with `draws`, and every run with it
    assert order.global_indices(0, 0, 0, n=10, global_batch_size=10).tolist() == [
        8,
        7,
        3,
        5,
        6,
        2,
        9,
        4,
        0,
        1,
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_make_up_the_global_batch(world_size):
    parts = [order.local_indices(7, 2, 3, 100, 12, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {12 // world_size}
    np.testing.assert_array_equal(np.concatenate(parts), order.global_indices(7, 2, 3, 100, 12))


def test_nobody_can_write_to_the_order():
    with pytest.raises(ValueError, match="read-only"):
        order.global_indices(0, 0, 0, 10, 5)[0] = 1


def test_steps_per_epoch():
    assert [order.steps_per_epoch(n, 10) for n in (10, 19, 20, 103)] == [1, 1, 2, 10]


MESSAGES = {
    "global_batch_size: 8192 does not divide over 12 ranks; the nearest that do are 8184 and 8196": lambda: (
        order.check_divides(8192, 12)
    ),
    "global_batch_size: 9 does not divide over 4 ranks; the nearest that do are 8 and 12": lambda: (
        order.local_indices(0, 0, 0, 9, 9, 0, 4)
    ),
    "global_batch_size: 3 does not divide over 8 ranks; the nearest that does is 8": lambda: (
        order.check_divides(3, 8)
    ),
    "global_batch_size: 512 is more than the 99 images of the data set; give at most 99": lambda: (
        order.steps_per_epoch(99, 512)
    ),
    "global_batch_size: 0 is too small; give a whole number >= 1": lambda: order.steps_per_epoch(
        10, 0
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(message):
    with pytest.raises(ValueError) as caught:
        MESSAGES[message]()
    assert str(caught.value) == message


class TestQuasiRandom:
    """Mostly in the order of the disk, and still whole, exact and the same for all."""

    N, WINDOW, BATCH = 1000, 256, 30

    def epoch(self, seed: int = 0, epoch: int = 0) -> np.ndarray:
        steps = range(self.N // self.BATCH)
        return np.concatenate(
            [
                order.global_indices(seed, epoch, step, self.N, self.BATCH, self.WINDOW)
                for step in steps
            ]
        )

    def test_an_epoch_shows_each_image_once(self):
        seen = self.epoch()
        assert len(seen) == len(set(seen.tolist())) == 990 and seen.max() < self.N

    def test_a_window_holds_a_few_blocks_only(self):
        seen = self.epoch()
        for first in range(0, 768, 256):  # the last block is short, and its window with it
            assert len(set((seen[first : first + 200] // order.BLOCK).tolist())) <= 8
        assert len(set((seen // order.BLOCK).tolist())) == 16
        assert np.abs(np.diff(seen[:256])).mean() > order.BLOCK  # mixed within the window

    def test_seeds_and_epochs_have_orders_of_their_own(self):
        assert len({tuple(self.epoch(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4

    @pytest.mark.parametrize("world_size", [1, 2, 3, 5])
    def test_ranks_make_up_the_global_batch(self, world_size):
        plans = [
            order.Plan(7, self.N, self.BATCH, rank, world_size, self.WINDOW)
            for rank in range(world_size)
        ]
        for step in (0, 5, 40):
            whole = order.Plan(7, self.N, self.BATCH, window=self.WINDOW).indices(step)
            np.testing.assert_array_equal(
                np.concatenate([plan.indices(step) for plan in plans]), whole
            )

    def test_the_blocks_that_come_are_known_before(self):
        plan = order.Plan(7, self.N, self.BATCH, window=self.WINDOW)
        for step in range(plan.steps_per_epoch):
            expected = set((plan.blocks_after(step) // order.BLOCK).tolist())
            later = [
                set((plan.indices(after) // order.BLOCK).tolist())
                for after in range(step + 1, plan.steps_per_epoch)
            ]
            assert expected <= set().union(*later) if later else True
        assert (
            len(plan.blocks_after(0)) == 4 and len(plan.blocks_after(plan.steps_per_epoch - 1)) == 0
        )
        assert len(order.Plan(7, self.N, self.BATCH).blocks_after(0)) == 0

    def test_a_window_of_the_whole_data_set_is_the_random_order(self):
        whole = order.global_indices(0, 0, 0, 100, 100, window=100)
        np.testing.assert_array_equal(whole, order.global_indices(0, 0, 0, 100, 100))
