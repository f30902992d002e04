"""Choose the images of each step as a pure function of (seed, epoch, step).

The choice is the same for any number of ranks and workers. The random order is one permutation of
all images. The quasi-random order is for data sets larger than memory. It permutes blocks of 64
neighboring images, and then the images within each window of several blocks. The disk reads whole
blocks, memory keeps two windows, and an epoch still uses no image twice.
"""

import functools
from dataclasses import dataclass

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose

# Images per block. With 60 KB per image, a block has about 4 MB, so a disk loses little time by
# seeking.
BLOCK_SIZE = 64


@dataclass(frozen=True)
class BatchPlan:
    """The images of each step of a run on one rank.

    Attributes:
        seed: Seed of the run.
        num_images: Number of images in the data set.
        global_batch_size: Images per step over all ranks.
        rank: Number of this rank.
        world_size: Number of ranks.
        window_size: Number of images that the quasi-random order mixes, or 0 for the random order.

    Raises:
        ValueError: If the batch exceeds the data set, or does not divide evenly over the ranks.
    """

    seed: int
    num_images: int
    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    window_size: int = 0

    def __post_init__(self) -> None:
        check_batch_divides(self.global_batch_size, self.world_size)
        steps_per_epoch(self.num_images, self.global_batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole global batches in one pass over the images."""
        return steps_per_epoch(self.num_images, self.global_batch_size)

    @property
    def local_batch_size(self) -> int:
        """Images per step on this rank."""
        return self.global_batch_size // self.world_size

    def epoch(self, step: int) -> int:
        """Return the epoch that a step of the run belongs to, counted from 0."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """Return the indices of this rank's images in a step, int64 (local_batch,), read-only.

        The images of all ranks, in the order of the ranks, form the global batch. No image occurs
        twice in an epoch.
        """
        order, start = self.order(step)
        start += self.rank * self.local_batch_size
        return order[start : start + self.local_batch_size]

    def order(self, step: int) -> tuple[np.ndarray, int]:
        """Return the order of all images in a step's epoch, and the start of its global batch.

        The order is int64 (num_images,), read-only.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = _permutation(self.seed, epoch, self.num_images, self.window_size)
        return order, step_in_epoch * self.global_batch_size

    def next_window_blocks(self, step: int) -> np.ndarray:
        """Return the first image of each block in the window that follows a step's first image.

        The array is int64. It is empty for the random order and in the last window.
        """
        if not 0 < self.window_size < self.num_images:
            return np.zeros(0, np.int64)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        num_blocks = _num_blocks_per_window(self.window_size)
        blocks = _block_order(self.seed, epoch, self.num_images)
        block_ends = np.minimum(BLOCK_SIZE, self.num_images - blocks * BLOCK_SIZE).cumsum()
        start = step_in_epoch * self.global_batch_size
        window = np.searchsorted(block_ends, start, side="right") // num_blocks
        return blocks[(window + 1) * num_blocks : (window + 2) * num_blocks] * BLOCK_SIZE


def steps_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Return the number of whole global batches in one pass over the images.

    The remaining images are left out. Each epoch leaves out different images.

    Raises:
        ValueError: If the batch is empty or exceeds the data set.
    """
    if global_batch_size < 1:
        raise ValueError(
            f"global_batch_size: {global_batch_size} is too small; give a whole number >= 1"
        )
    if num_images < global_batch_size:
        raise ValueError(
            f"global_batch_size: {global_batch_size} is more than the {num_images} images of the "
            f"data set; give at most {num_images}"
        )
    return num_images // global_batch_size


def check_batch_divides(global_batch_size: int, world_size: int) -> None:
    """Raise ValueError, with the nearest valid sizes, unless the batch divides over the ranks."""
    if global_batch_size % world_size == 0:
        return
    smaller = global_batch_size // world_size * world_size
    valid_sizes = f"{smaller} or {smaller + world_size}" if smaller else str(world_size)
    raise ValueError(
        f"global_batch_size: {global_batch_size} does not divide evenly over {world_size} ranks; "
        f"give {valid_sizes}"
    )


# Sorting a million keys takes a tenth of a second, and every step of an epoch needs the order.
@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_images: int, window_size: int) -> np.ndarray:
    order = rng.permutation(seed, epoch, num_images)
    if 0 < window_size < num_images:
        blocks = _block_order(seed, epoch, num_images)
        window_of_block = np.empty(len(blocks), np.int64)
        window_of_block[blocks] = np.arange(len(blocks)) // _num_blocks_per_window(window_size)
        order = order[np.argsort(window_of_block[order // BLOCK_SIZE], kind="stable")]
    order.flags.writeable = False
    return order


def _num_blocks_per_window(window_size: int) -> int:
    return max(1, window_size // BLOCK_SIZE)


def _block_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return rng.permutation(seed, epoch, -(-num_images // BLOCK_SIZE), Purpose.BLOCK_ORDER)
