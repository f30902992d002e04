"""Divide the rows of a data set among the ranks, and put their results back in order.

Ranks take whole batches, so the batches, and the results, are the same for any number of ranks.
"""

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group


def rank_rows(num_rows: int, batch_size: int, rank: int | None = None) -> np.ndarray:
    """Return the rows of a rank, by default this one: every world_size-th batch."""
    rank = process_group.rank() if rank is None else rank
    rows = np.arange(num_rows)
    return rows[rows // batch_size % process_group.world_size() == rank]


def gather_in_order(results: Tensor, num_rows: int, batch_size: int) -> Tensor:
    """Return the results of all rows in order, the same on every rank.

    Args:
        results: Results of this rank's rows, (len(rank_rows(num_rows, batch_size)), ...).
        num_rows: Number of rows of the data set.
        batch_size: Rows per batch.
    """
    world_size = process_group.world_size()
    if world_size == 1:
        return results
    gathered = [rank_rows(num_rows, batch_size, rank) for rank in range(world_size)]
    order = torch.from_numpy(np.argsort(np.concatenate(gathered)))
    return gather_rows(results)[order.to(results.device)]


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks. Ranks may have different numbers of rows."""
    if process_group.world_size() == 1:
        return rows
    shapes = collectives.gather_objects(tuple(rows.shape))
    longest = max(shape[0] for shape in shapes)
    row_shape = next(shape[1:] for shape in shapes if shape[0])
    padded_rows = rows.new_zeros(longest, *row_shape)
    padded_rows[: len(rows)] = rows.view(len(rows), *row_shape)
    rows_by_rank = collectives.gather(padded_rows).split(longest)
    return torch.cat([padded[: shape[0]] for padded, shape in zip(rows_by_rank, shapes)])
