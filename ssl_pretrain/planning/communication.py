"""What a step sends between ranks, and how long that takes over a cluster's links: for a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ssl_pretrain.models import backbones
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel.parallel_config import ParallelConfig
from ssl_pretrain.planning.hardware import Machine

BUCKET = 25 * 2**20  # bytes of DDP's last bucket, whose reduction nothing hides


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Message:
    """allgather, reduce_scatter or allreduce among `ranks`; size: bytes of all their parts together. times: so many of it."""

    collective: str
    size: float
    ranks: int
    times: int = 1
    across: bool = False  # between nodes even where the ranks would fit into one

    @property
    def sent(self) -> float:
        """Bytes that a ring sends from each rank."""
        return (
            (2 if self.collective == "allreduce" else 1)
            * (self.ranks - 1)
            / self.ranks
            * self.size
            * self.times
        )


def seconds(machine: Machine, cluster: Cluster, messages: Iterable[Message]) -> float:
    """Of collectives one after the other: a ring, as fast as its slowest link, and a tree's latency."""
    total = 0.0
    for message in messages:
        if message.ranks > 1:
            within = message.ranks <= cluster.gpus_per_node and not message.across
            bandwidth = (
                machine.intra_node if within else min(machine.intra_node, machine.inter_node)
            )
            total += (
                message.sent / bandwidth
                + message.times * math.ceil(math.log2(message.ranks)) * machine.latency_seconds
            )
    return total


def of_batch_norm(norms: dict[str, list[int]], ranks: int, itemsize: int) -> list[Message]:
    """Of batch norms whose groups are so many ranks, by their channels: two sums each way, and a count."""
    forward = [
        Message("allgather", (2 * channels + 1) * itemsize * ranks, ranks)
        for channels in norms["forward"]
    ]
    return forward + [
        Message("allreduce", 2 * channels * itemsize, ranks) for channels in norms["backward"]
    ]


def shards(config: ParallelConfig, cluster: Cluster) -> int:
    """Ranks among which each weight is split; 1 under DDP."""
    return {"ddp": 1, "fsdp": cluster.ranks, "hybrid": cluster.gpus_per_node}[config.strategy]


@dataclass(frozen=True)
class Unit:
    """What FSDP gathers at once: numbers of its weights and of those trained, padded to equal shards; how often a forward uses it."""

    numbers: int
    trained: int
    calls: int
    student: bool
    block: bool
    normed: bool


def units(method: nn.Module, calls: dict[str, int], num_shards: int) -> list[Unit]:
    """Each block, the rest of each backbone, and the rest. calls: of each backbone in a step, by its name."""
    found, left, left_trained = (
        [],
        _padded(method.parameters(), num_shards),
        _padded(_trained(method), num_shards),
    )
    for name, network in method.named_modules():
        if not isinstance(network, backbones.Backbone):
            continue
        own, own_trained = (
            _padded(network.parameters(), num_shards),
            _padded(_trained(network), num_shards),
        )
        left, left_trained = left - own, left_trained - own_trained
        student, times = name == "backbone", calls.get(name, 1)
        for _, block in backbones.blocks(network):
            numbers, trained = (
                _padded(block.parameters(), num_shards),
                _padded(_trained(block), num_shards),
            )
            found.append(
                Unit(numbers, trained, times, student, True, bool(batch_norm.statistics(block)))
            )
            own, own_trained = own - numbers, own_trained - trained
        found.append(
            Unit(own, own_trained, times, student, False, bool(batch_norm.statistics(network)))
        )
    return [*found, Unit(left, left_trained, 1, False, False, bool(batch_norm.statistics(method)))]


def of_weights(
    each: list[Unit], config: ParallelConfig, cluster: Cluster, low: bool, itemsize: int
) -> tuple[list[Message], list[Message]]:
    """FSDP's, in the forward and in the backward. low: weights travel in bfloat16 where a unit has no batch norm."""
    ranks = shards(config, cluster)
    gradient_size = 2 if config.gradients == "bfloat16" else itemsize
    forward, backward = [], []
    for unit in each:
        size = unit.numbers * (2 if low and not unit.normed else itemsize)
        forward.append(Message("allgather", size, ranks, unit.calls))
        if unit.student and config.reshard_after_forward:
            backward.append(Message("allgather", size, ranks, unit.calls if unit.block else 1))
        reduced = unit.trained * gradient_size
        times = unit.calls if unit.block else 1
        backward.append(Message("reduce_scatter", reduced, ranks, times))
        if ranks < cluster.ranks:
            backward.append(
                Message("allreduce", reduced / ranks, cluster.nodes, times, across=True)
            )
    return forward, [message for message in backward if message.size]


def _trained(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _padded(parameters: Iterable[Tensor], num_shards: int) -> int:
    """Numbers of these parameters, each cut along its first dimension into equal parts, rounded up."""
    return sum(
        -(-len(p) // num_shards) * (p.numel() // len(p)) * num_shards
        for p in parameters
        if p.numel()
    )
