"""Predict the messages that a step sends between ranks and their time on a cluster's links."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ssl_pretrain.models import backbones, components
from ssl_pretrain.models.transformer import TransformerBlocks
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel.execution import ParallelConfig
from ssl_pretrain.planning.hardware import Machine

BUCKET_BYTES = 25 * 2**20  # size of DDP's last bucket, which is reduced after the computation


@dataclass(frozen=True)
class Cluster:
    """Number of nodes and of GPUs per node."""

    num_nodes: int
    gpus_per_node: int

    @property
    def num_ranks(self) -> int:
        """Number of GPUs over all nodes."""
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class Message:
    """A collective, and how often it runs."""

    collective: str  # allgather, reduce_scatter, allreduce, or send to a neighbor
    num_bytes: float  # bytes of all ranks' shards together, or of what one rank sends
    num_ranks: int
    num_repeats: int = 1
    crosses_nodes: bool = False  # True if the ranks are on different nodes, however few they are

    @property
    def bytes_sent(self) -> float:
        """Bytes that each rank sends over a ring, in all repeats together."""
        if self.collective == "send":
            return self.num_bytes * self.num_repeats
        rounds = 2 if self.collective == "allreduce" else 1
        share_sent = (self.num_ranks - 1) / self.num_ranks
        return rounds * share_sent * self.num_bytes * self.num_repeats


@dataclass(frozen=True)
class Overlap:
    """Messages that are sent during a computation."""

    messages: list[Message]
    compute_seconds: float
    uncovered_messages: list[Message]  # messages that cannot overlap with the computation


def message_seconds(machine: Machine, cluster: Cluster, messages: Iterable[Message]) -> float:
    """Return the time of consecutive collectives.

    The time of a collective is that of a ring over its slowest link, plus the latency of a tree.
    """
    total = 0.0
    for message in messages:
        if message.num_ranks == 1:
            continue
        bandwidth = machine.intra_node_bandwidth
        if message.crosses_nodes or message.num_ranks > cluster.gpus_per_node:
            bandwidth = min(bandwidth, machine.inter_node_bandwidth)
        latency_seconds = math.ceil(math.log2(message.num_ranks)) * machine.latency_seconds
        total += message.bytes_sent / bandwidth + message.num_repeats * latency_seconds
    return total


def exposed_and_hidden_seconds(
    machine: Machine, cluster: Cluster, blocking: list[Message], overlaps: list[Overlap]
) -> tuple[float, float]:
    """Return the seconds of communication that lengthen a step, and those that overlap with it."""
    exposed, hidden = message_seconds(machine, cluster, blocking), 0.0
    for overlap in overlaps:
        total = message_seconds(machine, cluster, overlap.messages)
        uncovered = message_seconds(machine, cluster, overlap.uncovered_messages)
        visible = max(uncovered, total - overlap.compute_seconds)
        exposed += visible
        hidden += total - visible
    return exposed, hidden


def ddp_overlap(num_bytes: float, num_ranks: int, backward_seconds: float) -> Overlap:
    """Return the overlap of the gradients' all-reduce with the backward pass.

    The last bucket cannot overlap with it.
    """
    gradients = Message("allreduce", num_bytes, num_ranks)
    last_bucket = Message("allreduce", min(num_bytes, BUCKET_BYTES), num_ranks)
    return Overlap([gradients], backward_seconds, [last_bucket])


def batch_norm_messages(
    batch_norm_channels: dict[str, list[int]], ranks_per_group: int, itemsize: int
) -> list[Message]:
    """Return the messages of batch norms whose groups span several ranks.

    Args:
        batch_norm_channels: Channels of each batch norm, by pass ("forward" or "backward").
        ranks_per_group: Ranks that share statistics.
        itemsize: Bytes per number.
    """
    forward = [  # each message has two sums per channel and a count
        Message("allgather", (2 * channels + 1) * itemsize * ranks_per_group, ranks_per_group)
        for channels in batch_norm_channels["forward"]
    ]
    backward = [
        Message("allreduce", 2 * channels * itemsize, ranks_per_group)
        for channels in batch_norm_channels["backward"]
    ]
    return forward + backward


def num_shards(config: ParallelConfig, cluster: Cluster) -> int:
    """Return the number of ranks over which each weight is sharded, which is 1 for DDP."""
    return {"ddp": 1, "fsdp": cluster.num_ranks, "hybrid": cluster.gpus_per_node}[config.strategy]


@dataclass(frozen=True)
class Unit:
    """Weights that FSDP gathers together: a block, the rest of a backbone, or all others."""

    num_weights: int  # includes the padding to equal shards
    num_trained: int  # number of weights with a gradient, with the same padding
    num_calls: int  # number of calls per forward pass
    is_student: bool
    is_block: bool
    has_batch_norm: bool  # weights of batch norm stay in full precision


def divide_into_units(method: nn.Module, num_calls: dict[str, int], num_shards: int) -> list[Unit]:
    """Divide a method's weights into the units that FSDP gathers.

    Args:
        method: The method on the meta device.
        num_calls: Number of calls per step of each backbone, by name.
        num_shards: Number of ranks over which each weight is sharded.
    """
    rest = _count_weights(method, num_shards)
    result = []
    for name, network in method.named_modules():
        if isinstance(network, TransformerBlocks):  # a predictor or decoder after the student
            rest = _difference(rest, _count_weights(network, num_shards))
            num_network_calls = num_calls.get("backbone", 1)
            result += [
                Unit(*_count_weights(block, num_shards), num_network_calls, True, True, False)
                for _, block in backbones.blocks(network)
            ]
        if not isinstance(network, components.Backbone):
            continue
        rest_of_network = _count_weights(network, num_shards)
        rest = _difference(rest, rest_of_network)
        backbone_calls, is_student = num_calls.get(name, 1), name == "backbone"
        for _, block in backbones.blocks(network):
            sizes = _count_weights(block, num_shards)
            rest_of_network = _difference(rest_of_network, sizes)
            has_norm = bool(batch_norm.statistics(block))
            result.append(Unit(*sizes, backbone_calls, is_student, True, has_norm))
        has_norm = bool(batch_norm.statistics(network))
        result.append(Unit(*rest_of_network, backbone_calls, is_student, False, has_norm))
    return [*result, Unit(*rest, 1, False, False, bool(batch_norm.statistics(method)))]


def weight_messages(
    units: list[Unit], config: ParallelConfig, cluster: Cluster, in_bfloat16: bool, itemsize: int
) -> tuple[list[Message], list[Message]]:
    """Return FSDP's messages in the forward pass and in the backward pass.

    Args:
        units: Units of the method.
        config: Parallel settings.
        cluster: Numbers of nodes and GPUs.
        in_bfloat16: True if weights are sent in bfloat16, except in units with batch norm.
        itemsize: Bytes per number in full precision.
    """
    ranks_per_copy = num_shards(config, cluster)
    forward, backward = [], []
    for unit in units:
        weight_itemsize = 2 if in_bfloat16 and not unit.has_batch_norm else itemsize
        gradient_itemsize = 2 if config.gradients == "bfloat16" else itemsize
        weight_bytes = unit.num_weights * weight_itemsize
        gradient_bytes = unit.num_trained * gradient_itemsize
        num_repeats = unit.num_calls if unit.is_block else 1
        forward.append(Message("allgather", weight_bytes, ranks_per_copy, unit.num_calls))
        if unit.is_student and config.reshard_after_forward:
            backward.append(Message("allgather", weight_bytes, ranks_per_copy, num_repeats))
        backward.append(Message("reduce_scatter", gradient_bytes, ranks_per_copy, num_repeats))
        if ranks_per_copy < cluster.num_ranks:
            # Nodes with copies of the same shards reduce their gradients.
            backward.append(
                Message(
                    "allreduce",
                    gradient_bytes / ranks_per_copy,
                    cluster.num_nodes,
                    num_repeats,
                    crosses_nodes=True,
                )
            )
    return forward, [message for message in backward if message.num_bytes]


def _count_weights(module: nn.Module, num_shards: int) -> tuple[int, int]:
    """Return the number of weights and the number of trained weights, both padded."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _padded_size(module.parameters(), num_shards), _padded_size(trained, num_shards)


def _difference(total: tuple[int, int], subset: tuple[int, int]) -> tuple[int, int]:
    return total[0] - subset[0], total[1] - subset[1]


def _padded_size(parameters: Iterable[Tensor], num_shards: int) -> int:
    """Return the number of weights, with first dimensions padded to multiples of `num_shards`."""
    return sum(
        -(-len(p) // num_shards) * (p.numel() // len(p)) * num_shards
        for p in parameters
        if p.numel()
    )
