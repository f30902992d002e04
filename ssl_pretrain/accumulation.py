"""Helpers for steps in micro-batches: choice of the algorithm, row slices and batch norm."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_pretrain.methods.base import Embeddings, Method
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel.execution import ParallelConfig

Way = Literal["one_pass", "targets_first", "two_passes"]


def choose_way(method: Method, config: ParallelConfig) -> Way:
    """Return the algorithm that computes the gradient of a batch in micro-batches.

    `Stepper` has one method per algorithm.

    Raises:
        ValueError: If the configured way would change the loss.
    """
    check(method, config)
    if config.accumulation != "auto":
        return config.accumulation
    ways: dict[str, Way] = {
        "nothing": "one_pass",
        "targets": "targets_first",
        "embeddings": "two_passes",
    }
    return ways[method.couples]


def check(method: Method, config: ParallelConfig) -> None:
    """Raise ValueError if micro-batches would change the loss.

    Raises:
        ValueError: If `parallel.accumulation` is `one_pass`, but the loss combines embeddings or
            targets of different images.
    """
    if config.accumulation != "one_pass" or method.couples == "nothing":
        return
    name = method.config.name
    if method.couples == "targets":
        raise ValueError(
            f"parallel.accumulation: one_pass does not train {name}: this loss combines the "
            "targets of the whole batch. Combining those of each micro-batch would give other "
            "targets. Set auto, which computes all targets first, or two_passes"
        )
    raise ValueError(
        f"parallel.accumulation: one_pass does not train {name}: this loss "
        "compares images across the whole batch. Summing the losses of micro-batches would "
        "drop the pairs between them. Set auto or two_passes, which keep all pairs"
    )


def concatenate(outputs: Sequence[Embeddings]) -> Embeddings:
    """Concatenate the rows of all micro-batches under each name."""
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


def split(whole: Embeddings, outputs: Sequence[Embeddings]) -> list[Embeddings]:
    """Undo `concatenate`, with views of the tensors of `whole`.

    Args:
        whole: Tensors of all micro-batches. A tensor whose name is in no output is not divided, and
            every micro-batch gets it whole.
        outputs: The tensors that `concatenate` got. They give the number of rows of each
            micro-batch.
    """
    tensors_by_name: dict[str, Sequence[Tensor]] = {
        name: value.split([len(output[name]) for output in outputs])
        if name in outputs[0]
        else [value] * len(outputs)
        for name, value in whole.items()
    }
    return [
        {name: tensors[k] for name, tensors in tensors_by_name.items()} for k in range(len(outputs))
    ]


def as_leaves(embeddings: Embeddings) -> Embeddings:
    """Make the tensors, which have no graph, leaves whose gradient can be taken."""
    return {name: z.requires_grad_() for name, z in embeddings.items()}


def insert_rows(embeddings: Embeddings, compared: Sequence[Embeddings], k: int) -> Embeddings:
    """Put the rows of micro-batch k among those of all micro-batches, under the compared names.

    Other embeddings are returned unchanged.

    The gradient of the rows of micro-batch k is multiplied by the number of micro-batches. The step
    divides each loss by this number, which is right for a mean over images. But a comparison is
    whole in every micro-batch's loss, and only the rows of that micro-batch receive its gradient.

    Args:
        embeddings: Embeddings of micro-batch k, with a graph.
        compared: For each micro-batch, the embeddings that the loss compares, without a graph.
        k: Index of the micro-batch.
    """
    completed = dict(embeddings)
    for name in compared[k]:
        rows = [output[name] for output in compared]
        z = embeddings[name]
        if z.requires_grad:
            z = z.view_as(z)  # so that the hook is not on the embedding itself
            z.register_hook(lambda gradient: gradient * len(compared))
        rows[k] = z
        completed[name] = torch.cat(rows)
    return completed


def mean_of_logs(logs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each log over the micro-batches."""
    return {name: torch.stack([values[name] for values in logs]).mean() for name in logs[0]}


class ReplayError:
    """Largest difference between the embeddings of two passes over the same images."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    @torch.no_grad()
    def add(self, replayed: Embeddings, expected: Embeddings) -> None:
        """Compare the embeddings of a micro-batch under the names of `expected`."""
        for name, z in expected.items():
            difference = (replayed[name] - z).abs().max().float()
            self._largest = (
                difference if self._largest is None else torch.maximum(self._largest, difference)
            )

    def logs(self) -> dict[str, Tensor]:
        """Return the log `replay_error`, or none if nothing was compared."""
        return {} if self._largest is None else {"replay_error": self._largest}


class StatisticsAverage:
    """Average of batch norm's running statistics over the micro-batches of a pass.

    Every micro-batch starts from the same statistics. After the last one they are set to the mean
    of the values that the micro-batches have produced.
    """

    def __init__(self, module: nn.Module, num_micro_batches: int):
        self.num_micro_batches = num_micro_batches
        self.buffers = batch_norm.statistics(module)
        self.initial_values = [buffer.clone() for buffer in self.buffers]
        self.changes = [torch.zeros_like(buffer) for buffer in self.buffers]

    @torch.no_grad()
    def update(self, k: int) -> None:
        """Record the statistics after micro-batch k."""
        is_last = k == self.num_micro_batches - 1
        for buffer, initial, change in zip(self.buffers, self.initial_values, self.changes):
            change += buffer - initial
            buffer.copy_(initial + change / self.num_micro_batches if is_last else initial)
