"""Running sums of exponentials of logits, to which tiles are added one at a time."""

import torch
from torch import Tensor

# Up to this logit, no maximum is subtracted, because exp(40) and a sum of 2**30 such terms are
# normal float32 numbers.
LARGEST_SAFE_LOGIT = 40.0


class RunningSums:
    """Sums of exponentials, one per row or one per column of the logits.

    Args:
        num_sums: Number of rows or columns.
        like: Tensor with the dtype and the device of the sums.
        exp_is_safe: True if the logits are small enough for exp without subtracting the maximum.
    """

    def __init__(self, num_sums: int, like: Tensor, exp_is_safe: bool):
        smallest = torch.finfo(like.dtype).min
        self.sum = like.new_zeros(num_sums)
        self.maximum = None if exp_is_safe else like.new_full((num_sums,), smallest)

    def add(self, rows: slice, logits: Tensor) -> None:
        """Add each row of a tile to one of the sums, and overwrite `logits` with exponentials.

        Args:
            rows: Indices of the sums.
            logits: Tile of shape (num_rows, num_columns). For sums per column, its transpose.
        """
        if self.maximum is None:
            self.sum[rows] += logits.exp_().sum(1)
            return
        old_maximum = self.maximum[rows].clone()
        new_maximum = torch.maximum(old_maximum, logits.amax(1))
        exponentials = logits.sub_(new_maximum[:, None]).exp_()
        rescaled_sum = self.sum[rows] * torch.exp(old_maximum - new_maximum)
        self.sum[rows] = rescaled_sum + exponentials.sum(1)
        self.maximum[rows] = new_maximum

    def log(self) -> Tensor:
        """Return the logarithm of each sum."""
        return self.sum.log() if self.maximum is None else self.sum.log() + self.maximum
