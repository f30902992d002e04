"""A queue of past embeddings, the same on all ranks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives


class Queue(nn.Module):
    """The last rows that all ranks pushed, in the order of the global batch.

    The oldest rows are overwritten first.

    Args:
        size: Number of rows.
        shape: Shape of a row.
        random: Start with random rows of unit length, as MoCo and NNCLR do. Else with zeros, as
            SwAV does.
    """

    rows: Tensor  # (size, *shape)
    position: Tensor  # index of the oldest row
    filled: Tensor  # number of rows that came from images

    def __init__(self, size: int, *shape: int, random: bool = True):
        super().__init__()
        rows = F.normalize(torch.randn(size, *shape), dim=-1) if random else None
        self.register_buffer("rows", torch.zeros(size, *shape) if rows is None else rows)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor, stepped: Tensor | float) -> None:
        """Replace the oldest rows by those of all ranks.

        Args:
            rows: This rank's rows, shape (local_batch, *shape).
            stepped: 1 to push, 0 to change nothing. May be a tensor, which is not read by the host.
        """
        new = collectives.gather(rows.detach().to(self.rows.dtype))
        check_queue(len(self.rows), len(new))
        places = torch.arange(len(new), device=new.device) + self.position
        is_pushed = torch.as_tensor(stepped, device=new.device) > 0
        rows_after = torch.where(is_pushed, new, self.rows.index_select(0, places))
        self.rows.index_copy_(0, places, rows_after)
        self.position.copy_((self.position + len(new) * is_pushed) % len(self.rows))
        self.filled.copy_((self.filled + len(new) * is_pushed).clamp(max=len(self.rows)))


def check_queue(queue_size: int, global_batch_size: int) -> None:
    """Raise ValueError unless whole global batches fill the queue exactly."""
    if queue_size < 1 or queue_size % global_batch_size:
        below = queue_size // global_batch_size * global_batch_size
        nearest = (
            f"the nearest that are {below} and {below + global_batch_size}"
            if below
            else f"the smallest is {global_batch_size}"
        )
        raise ValueError(
            f"method.queue_size: {queue_size} is not a multiple of global_batch_size "
            f"{global_batch_size}; {nearest}"
        )
