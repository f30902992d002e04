"""The order of training images in an evaluation, as a function of the seed alone."""

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.distributed import process_group


class TrainingOrder:
    """Images in the order of the batch slots of all steps, shuffled anew in every epoch.

    Args:
        num_images: Number of images.
        seed: Seed of the order.
    """

    def __init__(self, num_images: int, seed: int):
        self._num_images, self._seed = num_images, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)  # cached order of one epoch

    def image(self, slot: int) -> tuple[int, int]:
        """Return the epoch of a slot and the index of its image."""
        epoch, position = divmod(slot, self._num_images)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, rng.permutation(self._seed, epoch, self._num_images)
        return epoch, int(self._order[position])


def batch_slots(step: int, batch_size: int) -> range:
    """Return this rank's slots in the sequence of all training images.

    Args:
        step: Number of the step, from 0.
        batch_size: Images per step over all ranks.
    """
    start = step * batch_size
    return range(start + process_group.rank(), start + batch_size, process_group.world_size())
