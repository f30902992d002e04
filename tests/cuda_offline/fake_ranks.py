"""Pretend to be one of many ranks on GPUs, whose collectives send nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import fake_step
import graph_backward
import torch
import torch.distributed as dist
from fake_cuda import pretend_cuda
from torch import nn
from traffic import Traffic

from ssl_pretrain.distributed import process_group
from ssl_pretrain.parallel import wrap

NUM_RANKS = 64
BUCKET_BYTES = [2**20, 25 * 2**20]  # DDP's first bucket and the others


class ReplicatedModel(nn.Module):
    """Stand-in for DistributedDataParallel, whose reducer does not take fake tensors.

    After a backward pass it sends the gradients in the buckets that DDP's own function chooses.
    """

    def __init__(self, module: nn.Module, **_: object) -> None:
        super().__init__()
        self.module = module
        self._sends_gradients = True
        graph_backward.callbacks.append(self._send_gradients)

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._sends_gradients = False
        try:
            yield
        finally:
            self._sends_gradients = True

    def _send_gradients(self) -> None:
        if not self._sends_gradients:
            return
        trained = [p for p in self.module.parameters() if p.requires_grad]
        buckets, _ = dist._compute_bucket_assignment_by_size(trained[::-1], BUCKET_BYTES)
        for bucket in buckets:
            dist.all_reduce(torch.cat([trained[::-1][k].grad.flatten() for k in bucket]))


@contextmanager
def pretend_ranks(num_ranks: int) -> Iterator[None]:
    """Pretend to be rank 0 of `num_ranks` GPUs."""
    with (
        process_group.fake_process_group(num_ranks),
        pretend_cuda(),
        mock.patch.object(wrap, "DistributedDataParallel", ReplicatedModel),
        mock.patch.object(wrap, "warm_up", lambda *_: None),  # only DDP's reducer needs it
        mock.patch.object(graph_backward, "callbacks", []),
    ):
        yield


@cache
def traffic_per_step(stem: str) -> Traffic:
    """Return what one of `NUM_RANKS` ranks sends in a step. Host waits raise an error."""
    with pretend_ranks(NUM_RANKS):
        return fake_step.count_traffic(*fake_step.build(fake_step.load(stem)))
