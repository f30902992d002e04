"""One rank's share of an evaluation under torchrun: whole batches of images, so that any number of ranks embeds the same batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.frozen.evaluation_split import BATCH, Part

Embed = Callable[..., tuple[Tensor, Tensor]]  # (part, offset) -> features (n, dim), labels (n,)


@contextmanager
def ranks(device: str) -> Iterator[str]:
    """Joins the ranks that torchrun started, and gives this one's device; without torchrun, `device` as it is.

    Raises:
        ValueError: the CPU is asked for on several ranks where there are GPUs, over which their messages would go.
    """
    if "RANK" not in os.environ:
        yield device
        return
    if device == "cpu" and torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--device cpu: several ranks on a CPU beside GPUs; hide those first: CUDA_VISIBLE_DEVICES= torchrun ..."
        )
    own = process_group.start()
    try:
        yield str(own) if device == "auto" else device
    finally:
        process_group.stop()


def rows_of(rank: int, n: int) -> np.ndarray:
    """Which of n images a rank embeds: every world_size-th batch, whole."""
    rows = np.arange(n)
    return rows[rows // BATCH % process_group.world_size() == rank]


def share(part: Part) -> Part:
    """This rank's images of a part; all of them where there is one rank. Make it once: it keeps its decoded views."""
    if process_group.world_size() == 1:
        return part
    return Part(part.run, part.source, part.numbers[rows_of(process_group.rank(), len(part))])


def gather_rows(x: Tensor) -> Tensor:
    """Every rank's rows, rank after rank, on all of them. Ranks may hold different numbers of rows, and none at all."""
    if process_group.world_size() == 1:
        return x
    shapes = collectives.gather_objects(tuple(x.shape))
    most = max(shape[0] for shape in shapes)
    inner = next(shape[1:] for shape in shapes if shape[0])
    padded = x.new_zeros(most, *inner)
    padded[: len(x)] = x.view(len(x), *inner)
    found = collectives.gather(padded).split(most)
    return torch.cat([rows[: shape[0]] for rows, shape in zip(found, shapes)])


def embedded(
    embed: Embed, part: Part, own: Part, offset: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Features and labels of all of `part` in its order, on every rank, each having embedded `own`, its share of it."""
    if process_group.world_size() == 1:
        return embed(part, offset)
    found, labels = (gather_rows(values) for values in embed(own, offset))
    order = np.concatenate([rows_of(rank, len(part)) for rank in range(process_group.world_size())])
    back = torch.from_numpy(np.argsort(order)).to(found.device)
    return found[back], labels[back]


def nearest(similarities: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of all ranks' (similarities, labels), each (queries, at most k): (queries, k), nearest first."""
    if process_group.world_size() == 1:
        return similarities, labels
    short = k - similarities.shape[1]
    similarities, labels = (
        F.pad(similarities, (0, short), value=-torch.inf),
        F.pad(labels, (0, short)),
    )

    def beside(x: Tensor) -> Tensor:
        return (
            collectives.gather(x)
            .view(process_group.world_size(), *x.shape)
            .transpose(0, 1)
            .flatten(1)
        )

    best, places = beside(similarities).topk(k, dim=1)
    return best, beside(labels).gather(1, places)
