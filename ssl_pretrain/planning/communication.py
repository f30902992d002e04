"""Messages that a step sends between ranks, and the time they take over a cluster's links."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ssl_pretrain.models import backbones
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel.parallel_config import ParallelConfig
from ssl_pretrain.planning.hardware import Machine

BUCKET = 25 * 2**20  # bytes of DDP's last bucket, whose reduction nothing hides


@dataclass(frozen=True)
class Cluster:
    """Number of GPUs and how they are spread over nodes."""

    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """Number of GPUs over all nodes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Message:
    """A collective that is sent once or several times."""

    collective: str  # allgather, reduce_scatter or allreduce
    size: float  # bytes of all ranks' shards together
    ranks: int
    times: int = 1
    across: bool = False  # between nodes even if the ranks would fit in one

    @property
    def sent(self) -> float:
        """Bytes that each rank sends over a ring."""
        rounds = 2 if self.collective == "allreduce" else 1
        return rounds * (self.ranks - 1) / self.ranks * self.size * self.times


@dataclass(frozen=True)
class Overlap:
    """Messages sent while a GPU computes for some seconds. Nothing hides the uncovered ones."""

    messages: list[Message]
    compute_seconds: float
    uncovered: list[Message]


def seconds(machine: Machine, cluster: Cluster, messages: Iterable[Message]) -> float:
    """Return the time of consecutive collectives.

    Each takes the ring bandwidth of its slowest link plus the latency of a tree.
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
    """Return the seconds of communication that lengthen a step, and those that are hidden."""
    exposed, hidden = seconds(machine, cluster, blocking), 0.0
    for overlap in overlaps:
        total = seconds(machine, cluster, overlap.messages)
        uncovered = seconds(machine, cluster, overlap.uncovered)
        visible = max(uncovered, total - overlap.compute_seconds)
        exposed += visible
        hidden += total - visible
    return exposed, hidden


def ddp_overlap(size: float, ranks: int, backward_seconds: float) -> Overlap:
    """Return the all-reduce of `size` bytes of gradients. Nothing hides its last bucket."""
    gradients = Message("allreduce", size, ranks)
    last_bucket = Message("allreduce", min(size, BUCKET), ranks)
    return Overlap([gradients], backward_seconds, [last_bucket])


def batch_norm_messages(norms: dict[str, list[int]], ranks: int, itemsize: int) -> list[Message]:
    """Return the messages of batch norms whose groups span several ranks.

    Args:
        norms: Channels of each batch norm, run forward and backward.
        ranks: Ranks per group.
        itemsize: Bytes of a number.
    """
    forward = [  # two sums per channel and a count
        Message("allgather", (2 * channels + 1) * itemsize * ranks, ranks)
        for channels in norms["forward"]
    ]
    backward = [
        Message("allreduce", 2 * channels * itemsize, ranks) for channels in norms["backward"]
    ]
    return forward + backward


def num_shards(config: ParallelConfig, cluster: Cluster) -> int:
    """Return the number of ranks among which each weight is split, 1 under DDP."""
    return {"ddp": 1, "fsdp": cluster.ranks, "hybrid": cluster.gpus_per_node}[config.strategy]


@dataclass(frozen=True)
class Unit:
    """Weights that FSDP gathers together: a block, the rest of a backbone, or everything else."""

    numbers: int  # weights, padded to equal shards
    trained: int  # those with a gradient
    calls: int  # uses per forward pass
    student: bool
    block: bool
    normed: bool  # has batch norm, whose weights stay in full precision


def units(method: nn.Module, calls: dict[str, int], shards: int) -> list[Unit]:
    """Return the units of a method.

    Args:
        method: The method on the meta device.
        calls: Calls of each backbone in a step, by its name.
        shards: Ranks among which each weight is split.
    """
    rest = _sizes(method, shards)
    result = []
    for name, network in method.named_modules():
        if not isinstance(network, backbones.Backbone):
            continue
        left = _sizes(network, shards)
        rest = _difference(rest, left)
        student, times = name == "backbone", calls.get(name, 1)
        for _, block in backbones.blocks(network):
            sizes = _sizes(block, shards)
            left = _difference(left, sizes)
            normed = bool(batch_norm.statistics(block))
            result.append(Unit(*sizes, times, student, block=True, normed=normed))
        normed = bool(batch_norm.statistics(network))
        result.append(Unit(*left, times, student, block=False, normed=normed))
    normed = bool(batch_norm.statistics(method))
    return [*result, Unit(*rest, 1, student=False, block=False, normed=normed)]


def weight_messages(
    units: list[Unit], config: ParallelConfig, cluster: Cluster, low_precision: bool, itemsize: int
) -> tuple[list[Message], list[Message]]:
    """Return the messages of FSDP in the forward pass and in the backward pass.

    Args:
        units: Weights gathered together.
        config: How the ranks compute.
        cluster: The GPUs.
        low_precision: Weights travel in bfloat16 unless their unit has batch norm.
        itemsize: Bytes of a number otherwise.
    """
    ranks = num_shards(config, cluster)
    forward, backward = [], []
    for unit in units:
        size = unit.numbers * (2 if low_precision and not unit.normed else itemsize)
        times = unit.calls if unit.block else 1
        forward.append(Message("allgather", size, ranks, unit.calls))
        if unit.student and config.reshard_after_forward:
            backward.append(Message("allgather", size, ranks, times))
        backward += _reductions(unit, config, cluster, itemsize, times)
    return forward, [message for message in backward if message.size]


def _reductions(
    unit: Unit, config: ParallelConfig, cluster: Cluster, itemsize: int, times: int
) -> Iterator[Message]:
    """Yield the messages of a unit's gradients, within shards and between copies of a shard."""
    ranks = num_shards(config, cluster)
    size = unit.trained * (2 if config.gradients == "bfloat16" else itemsize)
    yield Message("reduce_scatter", size, ranks, times)
    if ranks < cluster.ranks:
        yield Message("allreduce", size / ranks, cluster.nodes, times, across=True)


def _sizes(module: nn.Module, shards: int) -> tuple[int, int]:
    """Return the numbers of weights and of trained weights."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _padded(module.parameters(), shards), _padded(trained, shards)


def _difference(total: tuple[int, int], subset: tuple[int, int]) -> tuple[int, int]:
    return total[0] - subset[0], total[1] - subset[1]


def _padded(parameters: Iterable[Tensor], shards: int) -> int:
    """Return the numbers of parameters cut along their first dimension into equal shards."""
    return sum(
        -(-len(p) // shards) * (p.numel() // len(p)) * shards for p in parameters if p.numel()
    )
