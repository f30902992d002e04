"""Plan the size of a checkpoint, the host memory of a save, and the time to write it."""

from dataclasses import dataclass

from torch import nn

from ssl_pretrain.checkpoint.tensor_files import MAX_SHARD_FILE_BYTES
from ssl_pretrain.config import RunConfig
from ssl_pretrain.parallel.memory import GIB
from ssl_pretrain.planning.communication import Cluster

# Copies in memory of a file of shards that is being written. See checkpoint.tensor_files.
NUM_FILE_COPIES = 2


@dataclass(frozen=True)
class CheckpointPlan:
    """Bytes of a checkpoint on the disk and of its copies in the hosts' memory.

    Attributes:
        weight_bytes: Parameters of student and teacher.
        buffer_bytes: Statistics, queues and centers, which are never sharded.
        optimizer_bytes: State of the optimizer.
        num_shards: Number of ranks that a tensor is sharded over. 1 under DDP.
    """

    weight_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    num_shards: int

    @classmethod
    def build(cls, method: nn.Module, optimizer_bytes: int, num_shards: int) -> "CheckpointPlan":
        """Plan the checkpoints of a method, which may be on the meta device."""
        total_bytes = sum(tensor.nbytes for tensor in method.state_dict().values())
        weight_bytes = sum(parameter.nbytes for parameter in method.parameters())
        return cls(weight_bytes, total_bytes - weight_bytes, optimizer_bytes, num_shards)

    @property
    def disk_bytes(self) -> int:
        """Size of the checkpoint on the disk."""
        return self.weight_bytes + self.buffer_bytes + self.optimizer_bytes

    @property
    def host_bytes(self) -> float:
        """Peak host memory of a save, per rank that writes.

        It is freed when the checkpoint is on the disk.
        """
        if self.num_shards == 1:  # full tensors are written without another copy
            return self.disk_bytes
        own_bytes = (self.weight_bytes + self.optimizer_bytes) / self.num_shards + self.buffer_bytes
        return own_bytes + NUM_FILE_COPIES * min(own_bytes, MAX_SHARD_FILE_BYTES)


def describe(run: RunConfig, plan: CheckpointPlan, cluster: Cluster) -> list[str]:
    """Describe the checkpoint's size, the host memory of a save and the time to write it."""
    rate = run.plan.disk_gb_per_second
    savers = "on rank 0"
    if plan.num_shards > 1:
        node_bytes = plan.host_bytes * cluster.gpus_per_node
        savers = f"per rank, {node_bytes / GIB:.2f} GiB per node"
    waits = "training continues meanwhile" if run.checkpoint.asynchronous else "training waits"
    num_kept = max(1, run.checkpoint.keep_last)
    return [
        f"checkpoint: {plan.disk_bytes / GIB:.2f} GiB ({plan.weight_bytes / GIB:.2f} weights, "
        f"{plan.optimizer_bytes / GIB:.2f} optimizer, {plan.buffer_bytes / GIB:.2f} buffers); "
        f"the newest {num_kept} are kept, and one more while it is written",
        f"  host memory of a save: {plan.host_bytes / GIB:.2f} GiB {savers}",
        f"  written in {plan.disk_bytes / 1e9 / rate:,.1f} s at {rate:g} GB/s "
        f"(plan.disk_gb_per_second, for all ranks together); {waits}",
    ]
