"""Predict the messages that a step sends between ranks and their time on a cluster's links."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ssl_pretrain.models import backbones, components
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel.execution import ParallelConfig
from ssl_pretrain.planning.hardware import Machine

BUCKET_BYTES = 25 * 2**20  # size of DDP's last bucket, which is reduced after the computation


@dataclass(frozen=True)
class Cluster:
    """Number of nodes and of GPUs per node."""

    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """Number of GPUs over all nodes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Message:
    """A collective that runs once or several times."""

    collective: str  # allgather, reduce_scatter or allreduce
    size: float  # bytes of all ranks' shards together
    ranks: int
    times: int = 1  # number of repetitions
    across: bool = False  # True if the ranks are on different nodes even if they would fit on one

    @property
    def sent(self) -> float:
        """Bytes that each rank sends over a ring in all repetitions."""
        rounds = 2 if self.collective == "allreduce" else 1
        return rounds * (self.ranks - 1) / self.ranks * self.size * self.times


@dataclass(frozen=True)
class Overlap:
    """Messages that are sent while a GPU computes."""

    messages: list[Message]
    compute_seconds: float
    uncovered: list[Message]  # messages that cannot overlap with the computation


def seconds(machine: Machine, cluster: Cluster, messages: Iterable[Message]) -> float:
    """Return the time of consecutive collectives.

    The time of a collective is that of a ring over its slowest link, plus the latency of a tree.
    """
    total = 0.0
    for message in messages:
        if message.ranks == 1:
            continue
        bandwidth = machine.intra_node
        if message.across or message.ranks > cluster.gpus_per_node:
            bandwidth = min(bandwidth, machine.inter_node)
        latency = math.ceil(math.log2(message.ranks)) * machine.latency_seconds
        total += message.sent / bandwidth + message.times * latency
    return total


def exposed_and_hidden(
    machine: Machine, cluster: Cluster, blocking: list[Message], overlaps: list[Overlap]
) -> tuple[float, float]:
    """Return the seconds of communication that lengthen a step, and those that overlap with it."""
    exposed, hidden = seconds(machine, cluster, blocking), 0.0
    for overlap in overlaps:
        total = seconds(machine, cluster, overlap.messages)
        uncovered = seconds(machine, cluster, overlap.uncovered)
        visible = max(uncovered, total - overlap.compute_seconds)
        exposed += visible
        hidden += total - visible
    return exposed, hidden


def ddp_overlap(size: float, ranks: int, backward_seconds: float) -> Overlap:
    """Return the all-reduce of `size` bytes of gradients, with the last bucket as uncovered."""
    gradients = Message("allreduce", size, ranks)
    last_bucket = Message("allreduce", min(size, BUCKET_BYTES), ranks)
    return Overlap([gradients], backward_seconds, [last_bucket])


def batch_norm_messages(norms: dict[str, list[int]], ranks: int, itemsize: int) -> list[Message]:
    """Return the messages of batch norms whose groups span several ranks.

    Args:
        norms: Number of channels of each batch norm, by pass ("forward" or "backward").
        ranks: Ranks per group.
        itemsize: Bytes per number.
    """
    forward = [  # each message has two sums per channel and a count
        Message("allgather", (2 * channels + 1) * itemsize * ranks, ranks)
        for channels in norms["forward"]
    ]
    backward = [
        Message("allreduce", 2 * channels * itemsize, ranks) for channels in norms["backward"]
    ]
    return forward + backward


def num_shards(config: ParallelConfig, cluster: Cluster) -> int:
    """Return the number of ranks over which each weight is sharded, which is 1 for DDP."""
    return {"ddp": 1, "fsdp": cluster.ranks, "hybrid": cluster.gpus_per_node}[config.strategy]


@dataclass(frozen=True)
class Unit:
    """Weights of a block, of the rest of a backbone, or all others, which FSDP gathers together."""

    num_weights: int  # includes the padding to equal shards
    num_trained: int  # number of weights with a gradient, with the same padding
    num_calls: int  # number of calls per forward pass
    is_student: bool
    is_block: bool
    has_batch_norm: bool  # weights of batch norm stay in full precision


def units(method: nn.Module, calls: dict[str, int], shards: int) -> list[Unit]:
    """Divide a method's weights into the units that FSDP gathers.

    Args:
        method: The method on the meta device.
        calls: Number of calls per step of each backbone, by name.
        shards: Number of ranks over which each weight is sharded.
    """
    rest = _sizes(method, shards)
    result = []
    for name, network in method.named_modules():
        if not isinstance(network, components.Backbone):
            continue
        rest_of_network = _sizes(network, shards)
        rest = _difference(rest, rest_of_network)
        num_calls, is_student = calls.get(name, 1), name == "backbone"
        for _, block in backbones.blocks(network):
            sizes = _sizes(block, shards)
            rest_of_network = _difference(rest_of_network, sizes)
            has_norm = bool(batch_norm.statistics(block))
            result.append(Unit(*sizes, num_calls, is_student, True, has_norm))
        has_norm = bool(batch_norm.statistics(network))
        result.append(Unit(*rest_of_network, num_calls, is_student, False, has_norm))
    return [*result, Unit(*rest, 1, False, False, bool(batch_norm.statistics(method)))]


def weight_messages(
    units: list[Unit], config: ParallelConfig, cluster: Cluster, low_precision: bool, itemsize: int
) -> tuple[list[Message], list[Message]]:
    """Return FSDP's messages in the forward pass and in the backward pass.

    Args:
        units: Units of the method.
        config: Parallel settings.
        cluster: Numbers of nodes and GPUs.
        low_precision: True if weights are sent in bfloat16, except in units with batch norm.
        itemsize: Bytes per number in full precision.
    """
    ranks = num_shards(config, cluster)
    forward, backward = [], []
    for unit in units:
        size = unit.num_weights * (2 if low_precision and not unit.has_batch_norm else itemsize)
        gradient_size = unit.num_trained * (2 if config.gradients == "bfloat16" else itemsize)
        times = unit.num_calls if unit.is_block else 1
        forward.append(Message("allgather", size, ranks, unit.num_calls))
        if unit.is_student and config.reshard_after_forward:
            backward.append(Message("allgather", size, ranks, times))
        backward.append(Message("reduce_scatter", gradient_size, ranks, times))
        if ranks < cluster.ranks:
            # Nodes with copies of the same shards reduce their gradients.
            backward.append(
                Message("allreduce", gradient_size / ranks, cluster.nodes, times, across=True)
            )
    return forward, [message for message in backward if message.size]


def _sizes(module: nn.Module, shards: int) -> tuple[int, int]:
    """Return the number of weights and the number of trained weights, both padded."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _padded(module.parameters(), shards), _padded(trained, shards)


def _difference(total: tuple[int, int], subset: tuple[int, int]) -> tuple[int, int]:
    return total[0] - subset[0], total[1] - subset[1]


def _padded(parameters: Iterable[Tensor], shards: int) -> int:
    """Return the number of weights, with first dimensions padded to multiples of `shards`."""
    return sum(
        -(-len(p) // shards) * (p.numel() // len(p)) * shards for p in parameters if p.numel()
    )
