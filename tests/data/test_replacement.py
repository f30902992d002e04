"""Replacements are distinct images outside the batch, and the same for any number of ranks."""

import numpy as np
import pytest

from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.data.replacement import find_spare


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize(
    ("num_images", "batch_size", "num_bad"),
    [(400, 12, 4), (400, 12, 300), (30, 24, 3), (25, 24, 1), (200, 100, 90), (13, 6, 5)],
)
def test_replacements_are_distinct_images_outside_the_batch(
    num_images, batch_size, num_bad, window
):
    for seed in range(20):
        bad = set(np.random.default_rng(seed).permutation(num_images)[:num_bad].tolist())
        plan = BatchPlan(seed, num_images, batch_size, window_size=window)
        for step in range(plan.steps_per_epoch + 1):  # one step of the second epoch too
            images = plan.indices(step).tolist()
            rows = [row for row, number in enumerate(images) if number in bad]
            spares = [
                find_spare(plan, step, row, lambda number, bad=bad: number not in bad)
                for row in rows
            ]
            replacements = [number for number in spares if number is not None]
            available = set(range(num_images)) - set(images) - bad
            assert set(replacements) <= available and len(set(replacements)) == len(replacements)
            # A row has no replacement only if no image is left.
            assert len(replacements) == min(len(rows), len(available))


def test_ranks_agree_with_one_process():
    bad = {3, 5, 8, 13, 21, 34}
    for step in range(4):
        one_rank = [
            find_spare(BatchPlan(7, 40, 12), step, row, lambda number: number not in bad)
            for row in range(12)
        ]
        three_ranks = [
            find_spare(BatchPlan(7, 40, 12, rank, 3), step, row, lambda number: number not in bad)
            for rank in range(3)
            for row in range(4)
        ]
        assert one_rank == three_ranks


def test_usually_one_image_is_read():
    calls = []
    find_spare(BatchPlan(0, 100_000, 4096), 3, 17, lambda number: calls.append(number) or True)
    assert len(calls) == 1
