"""A queue of past embeddings, the same on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives


class Queue(nn.Module):
    """The last `size` rows of shape `shape` that all ranks pushed, oldest overwritten first, in the global batch's order.

    Args:
        random: start with random unit rows (MoCo, NNCLR); else with zeros (SwAV).
    """

    rows: Tensor
    position: Tensor
    filled: Tensor

    def __init__(self, size: int, *shape: int, random: bool = True):
        super().__init__()
        self.register_buffer(
            "rows",
            F.normalize(torch.randn(size, *shape), dim=-1) if random else torch.zeros(size, *shape),
        )
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer(
            "filled", torch.zeros((), dtype=torch.int64)
        )  # rows that came from images

    @torch.no_grad()
    def push(self, rows: Tensor, stepped: Tensor | float) -> None:
        """Takes every rank's `rows` (local_batch, *shape), or nothing where `stepped` is 0: decided where the queue is."""
        new = collectives.gather(rows.detach().to(self.rows.dtype))
        check_queue(len(self.rows), len(new))
        place = torch.arange(len(new), device=new.device) + self.position
        taken = torch.as_tensor(stepped, device=new.device) > 0
        self.rows.index_copy_(0, place, torch.where(taken, new, self.rows.index_select(0, place)))
        self.position.copy_((self.position + len(new) * taken) % len(self.rows))
        self.filled.copy_((self.filled + len(new) * taken).clamp(max=len(self.rows)))


def check_queue(queue_size: int, global_batch_size: int) -> None:
    """Raises ValueError for a queue that whole global batches do not fill exactly."""
    if queue_size < 1 or queue_size % global_batch_size:
        below = queue_size // global_batch_size * global_batch_size
        near = (
            f"the nearest that are {below} and {below + global_batch_size}"
            if below
            else f"the smallest is {global_batch_size}"
        )
        raise ValueError(
            f"method.queue_size: {queue_size} is not a multiple of global_batch_size {global_batch_size}; {near}"
        )
