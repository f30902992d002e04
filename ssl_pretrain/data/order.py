"""Which images each step takes: a pure function of (seed, epoch, step), the same for any number of ranks and workers."""

import functools

import numpy as np

from ssl_pretrain import draws


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Whole global batches in one pass over n images; the images left over wait for another epoch's order.

    Raises:
        ValueError: there is not one whole batch.
    """
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size: {global_batch_size} is too small; give a whole number >= 1")
    if n < global_batch_size:
        raise ValueError(f"global_batch_size: {global_batch_size} is more than the {n} images of the data set; give at most {n}")
    return n // global_batch_size


def global_indices(seed: int, epoch: int, step_in_epoch: int, n: int, global_batch_size: int) -> np.ndarray:
    """The images of one global batch: int64 (global_batch_size,), all different, and in no other step of this epoch."""
    start = step_in_epoch * global_batch_size
    assert 0 <= step_in_epoch < steps_per_epoch(n, global_batch_size), "the epoch has no such step"
    return _permutation(seed, epoch, n)[start : start + global_batch_size]


def local_indices(seed: int, epoch: int, step_in_epoch: int, n: int, global_batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """One rank's part of the global batch, (global_batch_size / world_size,): those of all ranks, one after the other, are the whole.

    Raises:
        ValueError: the batch does not divide over the ranks.
    """
    check_divides(global_batch_size, world_size)
    local_batch = global_batch_size // world_size
    return global_indices(seed, epoch, step_in_epoch, n, global_batch_size)[rank * local_batch : (rank + 1) * local_batch]


def check_divides(global_batch_size: int, world_size: int) -> None:
    """Nothing if every rank gets as many images, else ValueError with the nearest sizes that would do."""
    if global_batch_size % world_size == 0:
        return
    below = global_batch_size // world_size * world_size
    nearest = f"the nearest that do are {below} and {below + world_size}" if below else f"the nearest that does is {world_size}"
    raise ValueError(f"global_batch_size: {global_batch_size} does not divide over {world_size} ranks; {nearest}")


@functools.lru_cache(maxsize=2)  # sorting a million keys takes a tenth of a second, and every step of an epoch asks
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    order = draws.permutation(seed, epoch, n)
    order.flags.writeable = False
    return order
