"""Evaluation over several ranks: each rank embeds its share of a split.

A share consists of whole batches, so that any number of ranks embeds the same batches.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, rows_of

Embed = Callable[..., tuple[Tensor, Tensor]]  # (split, offset) -> features (n, dim), labels (n,)


@contextmanager
def ranks(device: str) -> Iterator[str]:
    """Join the ranks that torchrun started and yield this rank's device.

    Without torchrun, `device` is yielded unchanged.

    Raises:
        ValueError: If several ranks are to run on the CPU of a machine with GPUs, because their
            messages would go over the GPUs.
    """
    if "RANK" not in os.environ:
        yield device
        return
    if device == "cpu" and torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--device cpu: several ranks on a CPU beside GPUs; hide the GPUs with"
            " CUDA_VISIBLE_DEVICES= torchrun ..."
        )
    rank_device = process_group.start()
    try:
        yield str(rank_device) if device == "auto" else device
    finally:
        process_group.stop()


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate every rank's rows on all ranks. Ranks may have different numbers of rows."""
    if process_group.world_size() == 1:
        return rows
    shapes = collectives.gather_objects(tuple(rows.shape))
    longest = max(shape[0] for shape in shapes)
    inner = next(shape[1:] for shape in shapes if shape[0])
    padded = rows.new_zeros(longest, *inner)
    padded[: len(rows)] = rows.view(len(rows), *inner)
    gathered = collectives.gather(padded).split(longest)
    return torch.cat([padded[: shape[0]] for padded, shape in zip(gathered, shapes)])


def embed_split(
    embed: Embed, split: EvaluationSplit, offset: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Return features and labels of a whole split in order, on every rank.

    Args:
        embed: Computes features and labels of a split.
        split: Split to embed.
        offset: Shift of the images in pixels.
    """
    world_size = process_group.world_size()
    if world_size == 1:
        return embed(split, offset)
    features, labels = (gather_rows(values) for values in embed(split.rank_share, offset))
    gathered_rows = np.concatenate([rows_of(rank, len(split)) for rank in range(world_size)])
    order = torch.from_numpy(np.argsort(gathered_rows)).to(features.device)
    return features[order], labels[order]


def merge_nearest(similarities: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merge the nearest neighbors that each rank found in its share of the bank.

    Args:
        similarities: Similarities of this rank's neighbors, (queries, at most k), nearest first.
        labels: Their labels, same shape.
        k: Number of neighbors to keep.

    Returns:
        Similarities and labels of the k nearest on any rank, each (queries, k), nearest first.
    """
    if process_group.world_size() == 1:
        return similarities, labels
    missing = k - similarities.shape[1]
    similarities = F.pad(similarities, (0, missing), value=-torch.inf)
    labels = F.pad(labels, (0, missing))

    def side_by_side(neighbors: Tensor) -> Tensor:
        gathered = collectives.gather(neighbors)
        return gathered.unflatten(0, (-1, len(neighbors))).transpose(0, 1).flatten(1)

    nearest, columns = side_by_side(similarities).topk(k, dim=1)
    return nearest, side_by_side(labels).gather(1, columns)
