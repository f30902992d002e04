"""Which images each step takes: a pure function of (seed, epoch, step), the same for any number of ranks and workers.

The random order is one permutation of all images. The quasi-random one is for data sets larger than memory: blocks of 64
neighbours are permuted, as many as fill a window are read, and the images of a window are permuted among themselves. A
disk then reads whole blocks, memory holds one window and the next, and still every epoch shows each image once.
"""

import functools
from dataclasses import dataclass

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose

BLOCK = 64  # neighbours on the disk: 4 MB at 60 KB an image, where a disk loses little by seeking


@dataclass(frozen=True)
class Plan:
    """The order of one run on one rank. `window`: images of the quasi-random order that are mixed; 0: the random order."""

    seed: int
    num_images: int
    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    window: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.num_images, self.global_batch_size)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """What this rank reads in one step of the run: int64 (local_batch,)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        n, batch = self.num_images, self.global_batch_size
        return local_indices(
            self.seed, epoch, step_in_epoch, n, batch, self.rank, self.world_size, self.window
        )

    def order(self, step: int) -> tuple[np.ndarray, int]:
        """The order of all images in the step's epoch, int64 (num_images,), and where the step's global batch begins in it."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return _permutation(
            self.seed, epoch, self.num_images, self.window
        ), step_in_epoch * self.global_batch_size

    def blocks_after(self, step: int) -> np.ndarray:
        """The first image of each block of the window after the one in which `step` begins; empty in the random order, and at the end."""
        if not 0 < self.window < self.num_images:
            return np.zeros(0, np.int64)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        size = _blocks_in(self.window)
        blocks = _block_order(self.seed, epoch, self.num_images)
        images = np.minimum(BLOCK, self.num_images - blocks * BLOCK).cumsum()
        now = np.searchsorted(images, step_in_epoch * self.global_batch_size, side="right") // size
        return blocks[(now + 1) * size : (now + 2) * size] * BLOCK


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Whole global batches in one pass over n images; the images left over wait for another epoch's order.

    Raises:
        ValueError: there is not one whole batch.
    """
    if global_batch_size < 1:
        raise ValueError(
            f"global_batch_size: {global_batch_size} is too small; give a whole number >= 1"
        )
    if n < global_batch_size:
        raise ValueError(
            f"global_batch_size: {global_batch_size} is more than the {n} images of the data set; give at most {n}"
        )
    return n // global_batch_size


def global_indices(
    seed: int, epoch: int, step_in_epoch: int, n: int, global_batch_size: int, window: int = 0
) -> np.ndarray:
    """The images of one global batch: int64 (global_batch_size,), all different, and in no other step of this epoch."""
    start = step_in_epoch * global_batch_size
    assert 0 <= step_in_epoch < steps_per_epoch(n, global_batch_size), "the epoch has no such step"
    return _permutation(seed, epoch, n, window)[start : start + global_batch_size]


def local_indices(
    seed: int,
    epoch: int,
    step_in_epoch: int,
    n: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    window: int = 0,
) -> np.ndarray:
    """One rank's part of the global batch, (global_batch_size / world_size,): those of all ranks, one after the other, are the whole.

    Raises:
        ValueError: the batch does not divide over the ranks.
    """
    check_divides(global_batch_size, world_size)
    local_batch = global_batch_size // world_size
    return global_indices(seed, epoch, step_in_epoch, n, global_batch_size, window)[
        rank * local_batch : (rank + 1) * local_batch
    ]


def check_divides(global_batch_size: int, world_size: int) -> None:
    """Nothing if every rank gets as many images, else ValueError with the nearest sizes that would do."""
    if global_batch_size % world_size == 0:
        return
    below = global_batch_size // world_size * world_size
    nearest = (
        f"the nearest that do are {below} and {below + world_size}"
        if below
        else f"the nearest that does is {world_size}"
    )
    raise ValueError(
        f"global_batch_size: {global_batch_size} does not divide over {world_size} ranks; {nearest}"
    )


@functools.lru_cache(
    maxsize=2
)  # sorting a million keys takes a tenth of a second, and every step of an epoch asks
def _permutation(seed: int, epoch: int, n: int, window: int) -> np.ndarray:
    order = rng.permutation(seed, epoch, n)
    if 0 < window < n:
        blocks = _block_order(seed, epoch, n)
        window_of = np.empty(len(blocks), np.int64)
        window_of[blocks] = np.arange(len(blocks)) // _blocks_in(window)
        order = order[np.argsort(window_of[order // BLOCK], kind="stable")]
    order.flags.writeable = False
    return order


def _blocks_in(window: int) -> int:
    return max(1, window // BLOCK)


def _block_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return rng.permutation(seed, epoch, -(-n // BLOCK), Purpose.BLOCK_ORDER)
