"""The loss of every step of a head's or a detector's training, checked and printed."""

import numpy as np
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval import results


class TrainingLoss:
    """The losses of a training, averaged over the ranks.

    Args:
        num_steps: Steps of the training.
        lr: Learning rate that the error message names.
        steps_per_line: Steps per progress line.

    Attributes:
        values: Loss of every step so far.
    """

    def __init__(self, num_steps: int, lr: float, steps_per_line: int):
        self._num_steps, self._lr, self._steps_per_line = num_steps, lr, steps_per_line
        self.values: list[float] = []

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step on this rank, and print the mean of the newest now and then.

        Raises:
            ValueError: If the loss is not finite on some rank.
        """
        total = collectives.reduce_sum(loss.detach()).item()
        self.values.append(total / process_group.world_size())
        step = len(self.values)
        if not np.isfinite(self.values[-1]):
            raise ValueError(
                f"--lr {self._lr:g}: the loss of step {step} is not finite; give a smaller"
                " learning rate"
            )
        if step % self._steps_per_line == 0 or step == self._num_steps:
            mean_loss = np.mean(self.values[-self._steps_per_line :])
            results.print_progress(f"  step {step} of {self._num_steps}: loss {mean_loss:.3f}")
