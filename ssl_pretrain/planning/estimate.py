"""Estimate the memory and the time of an optimizer step on GPUs that this machine does not have.

The real code of a step is traced on fake tensors (`step_trace`). The time of each operation follows
from the rates of the GPU (`hardware`). The time of communication and of the loader follows from the
configuration. The estimate leaves out memory that the allocator wastes, compilation, and the
slowdown of kernels that run at the same time as collectives.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from ssl_pretrain.config import RunConfig, build_method_on_meta
from ssl_pretrain.methods.base import Method
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel.execution import Execution, bn_group_images
from ssl_pretrain.parallel.memory import GIB, USABLE_FRACTION
from ssl_pretrain.planning import communication, step_trace
from ssl_pretrain.planning.communication import Cluster, Message, Overlap, Unit
from ssl_pretrain.planning.hardware import Machine
from ssl_pretrain.planning.step_trace import NUM_COLORED, MicroBatch
from ssl_pretrain.planning.trace import Trace
from ssl_pretrain.views import recipe

# Assumed size of the CUDA context and the workspaces of cuBLAS, cuDNN and NCCL.
RESERVED_BYTES = 1.5 * GIB
NUM_UPLOADED = 3  # number of uint8 batches of views on the device at a time (data/native)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by component."""

    compute: float  # all passes of the student and the teacher, over all micro-batches
    views: float  # color augmentation
    loss: float
    optimizer: float  # includes the updates after the step, such as the teacher's
    exposed: float  # communication that no computation hides
    hidden: float  # communication during the backward pass
    data: float  # time spent waiting for the loader
    arithmetic: float  # share of `compute` that is limited by arithmetic and not by memory
    flops: float  # number of floating-point operations of the model on this rank

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.views + self.loss + self.optimizer + self.exposed + self.data

    @property
    def bound(self) -> str:
        """Name of the resource that takes the most time."""
        seconds = {
            "arithmetic": self.compute * self.arithmetic,
            "memory": self.compute * (1 - self.arithmetic) + self.views,
            "communication": self.exposed,
            "data": self.data,
            "loss": self.loss,
            "optimizer": self.optimizer,
        }
        return max(seconds, key=seconds.__getitem__)


@dataclass
class Estimate:
    """Memory and time of one optimizer step on a cluster of GPUs.

    Each trace takes about a second and is only made when it is needed.
    """

    run: RunConfig
    cluster: Cluster
    machine: Machine

    @cached_property
    def execution(self) -> Execution:
        """Device, number formats and memory layout of the run on a GPU."""
        return Execution.resolve(self.run.parallel, torch.device("cuda"))

    @cached_property
    def method(self) -> Method:
        """The method on the meta device."""
        return build_method_on_meta(self.run)

    @cached_property
    def micro_batch(self) -> MicroBatch:
        """Trace of the forward and backward pass, for any number of images."""
        sizes = (2, 4) if self.share > 1 else (1, 2)
        return step_trace.trace_micro_batch(self.run, self.method, self.execution, sizes)

    @cached_property
    def loss(self) -> Callable[[int], Trace]:
        """Function that traces the loss for a number of images on this rank."""

        def trace_loss(images: int) -> Trace:
            results = self.micro_batch.results_for(images)
            return step_trace.trace_loss(self.method, self.execution, results, self.cluster.ranks)

        return cache(trace_loss)

    @cached_property
    def optimizer(self) -> tuple[Trace, int]:
        """Trace of the optimizer's step, and the bytes of the optimizer's state."""
        results, ranks = self.micro_batch.results_for(self.share), self.cluster.ranks
        return step_trace.trace_optimizer(self.run, self.method, self.execution, results, ranks)

    @cached_property
    def color_seconds(self) -> float:
        """Seconds of the color augmentation per image."""
        seconds = sum(self.machine.bounds(step_trace.trace_coloring(self.run)))
        return seconds / self.machine.attained / NUM_COLORED

    @property
    def share(self) -> int:
        """Number of images of the global batch on one rank."""
        return self.run.global_batch_size // self.cluster.ranks

    @property
    def num_shards(self) -> int:
        """Number of ranks that each weight is sharded over, which is 1 under DDP."""
        return communication.num_shards(self.run.parallel, self.cluster)

    @cached_property
    def units(self) -> list[Unit]:
        """Groups of weights that FSDP gathers together."""
        return communication.units(self.method, self.micro_batch.backbone_calls, self.num_shards)

    @cached_property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all trained parameters, before sharding."""
        return sum(self._bytes(p) for p in self.method.parameters() if p.requires_grad)

    def memory(self, images: int) -> dict[str, float]:
        """Return the bytes on each GPU at the peak of a step, by component.

        Args:
            images: Micro-batch size.
        """
        method, itemsize = self.method, self.execution.dtype.itemsize
        weights = sum(self._bytes(p) for p in method.parameters())
        teacher = sum(
            self._bytes(p) for name, p in method.named_parameters() if name.startswith("teacher.")
        )
        # FSDP gathers the next unit before it frees the current one.
        sizes = sorted(unit.num_weights for unit in self.units)
        num_gathered = sum(sizes[-2:]) if self.num_shards > 1 else 0
        is_replicated = self.cluster.ranks > 1 and self.num_shards == 1
        pixels = sum(3 * crop.size**2 for crop in recipe.expand_counts(self.run.views))
        return {
            "parameters": (weights - teacher) / self.num_shards,
            "DDP buckets": self.gradient_bytes if is_replicated else 0.0,
            "gathered weights": num_gathered * itemsize,
            "optimizer": self.optimizer[1] / self.num_shards,
            "teacher": teacher / self.num_shards,
            "buffers": sum(self._bytes(buffer) for buffer in method.buffers()),
            "views": pixels * self.share * (itemsize + NUM_UPLOADED),
            "peak of the step": self.peak(images),
            "reserved": RESERVED_BYTES,
        }

    def activations(self, images: int) -> float:
        """Return the bytes that the forward pass keeps for the backward pass."""
        return float(self.micro_batch.trace_for(images).phase("forward").bytes_held[-1])

    def peak(self, images: int) -> float:
        """Return the peak of the bytes for activations, gradients, the loss and the optimizer."""
        if self.two_passes(images):
            loss_bytes = float(self.loss(self.share).peak)
        else:  # the micro-batch's activations stay in memory during the loss
            loss_bytes = self.loss(images).peak + self.activations(images)
        bytes_on_other_ranks = self.gradient_bytes * (1 - 1 / self.num_shards)
        pass_bytes = self.micro_batch.trace_for(images).peak - bytes_on_other_ranks
        optimizer_bytes = (self.gradient_bytes + self.optimizer[0].peak) / self.num_shards
        return max(pass_bytes, loss_bytes, optimizer_bytes)

    def _bytes(self, tensor: torch.Tensor) -> int:
        dtype = self.execution.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.numel() * dtype.itemsize

    def two_passes(self, images: int) -> bool:
        """Return True if each micro-batch is embedded twice."""
        accumulation = self.run.parallel.accumulation
        is_coupled = accumulation == "auto" and self.method.couples == "embeddings"
        return images < self.share and (accumulation == "two_passes" or is_coupled)

    def largest_micro_batch(self) -> tuple[int, str]:
        """Return the largest micro-batch size that fits, or 0 if none does, and an explanation."""
        usable_bytes = USABLE_FRACTION * self.machine.memory
        group_images = bn_group_images(self.run.parallel, self.run.global_batch_size)
        has_batch_norm = bool(batch_norm.statistics(self.method))
        smallest = min(group_images, self.share) if has_batch_norm else 1
        multiples = range(smallest, self.share + 1, smallest)
        sizes = [images for images in multiples if self.share % images == 0]

        def too_large(images: int) -> bool:
            return sum(self.memory(images).values()) > usable_bytes

        num_fitting = bisect_left(sizes, True, key=too_large)
        if num_fitting:
            return sizes[num_fitting - 1], f"of its share of {self.share:,}"
        smallest_text = "one image takes"
        if has_batch_norm:
            smallest_text = (
                f"batch norm over {group_images:,} images needs {smallest:,} at once, which take"
            )
        needed_bytes = sum(self.memory(smallest).values())
        return 0, (
            f"{smallest_text} {needed_bytes / GIB:.1f} GiB, more than the usable "
            f"{usable_bytes / GIB:.1f} GiB; use more GPUs or a smaller group"
        )

    def step_time(self, images: int) -> StepTime:
        """Return the time of one optimizer step with a micro-batch of `images`."""
        machine, num_micro_batches = self.machine, self.share // images
        trace = self.micro_batch.trace_for(images)
        phases = [trace.phase(name) for name in ("forward", "targets", "backward")]
        forward, targets, backward = (machine.seconds(phase) for phase in phases)
        two_passes = self.two_passes(images)
        passes = [*phases, phases[0]] if two_passes else phases
        bounds = np.array([machine.bounds(phase) for phase in passes])
        compute = sum(machine.seconds(phase) for phase in passes) * num_micro_batches
        loss = self.loss(self.share if two_passes else images)
        num_losses = 1 if two_passes else num_micro_batches
        loss_seconds = num_losses * machine.seconds(loss)
        optimizer = machine.seconds(self.optimizer[0])
        exposed, hidden = (0.0, 0.0)
        if self.cluster.ranks > 1:
            exposed, hidden = communication.exposed_and_hidden(
                machine,
                self.cluster,
                self._messages(images, num_losses * loss.collectives),
                self._overlaps(images, forward + targets, backward),
            )
        views = self.share * self.color_seconds
        busy_seconds = compute + views + loss_seconds + optimizer + exposed
        decoded_per_second = machine.decoded_per_core * max(1, self.run.data.num_workers)
        decoding_seconds = self.share / decoded_per_second if decoded_per_second else 0.0
        return StepTime(
            compute,
            views,
            loss_seconds,
            optimizer,
            exposed,
            hidden,
            data=max(0.0, decoding_seconds - busy_seconds),
            arithmetic=float(bounds[:, 0].sum() / bounds.sum()),
            flops=num_micro_batches * sum(float(phase.flops.sum()) for phase in phases),
        )

    def _messages(self, images: int, loss_collectives: list[tuple[str, int]]) -> list[Message]:
        """Return the messages during which the GPU waits."""
        ranks = self.cluster.ranks
        group = bn_group_images(self.run.parallel, self.run.global_batch_size) // images
        norms, itemsize = self.micro_batch.traces.small.norms, self.execution.dtype.itemsize
        return [
            *(Message(*collective, ranks) for collective in loss_collectives),
            *(Message(*collective, ranks) for collective in self.optimizer[0].collectives),
            *communication.batch_norm_messages(norms, group, itemsize),
        ]

    def _overlaps(self, images: int, forward: float, backward: float) -> list[Overlap]:
        """Return the messages of weights and gradients, with the computation that hides them."""
        settings, dtype, cluster = self.run.parallel, self.execution.dtype, self.cluster
        if settings.strategy == "ddp":
            is_halved = settings.gradients == "bfloat16" and dtype == torch.float32
            num_bytes = self.gradient_bytes / (2 if is_halved else 1)
            return [communication.ddp_overlap(num_bytes, cluster.ranks, backward)]
        gathers, reductions = communication.weight_messages(
            self.units, settings, cluster, self.execution.autocast, dtype.itemsize
        )
        num_forwards = 2 if self.two_passes(images) else 1
        overlaps = [
            *num_forwards * [Overlap(gathers, forward, gathers[:1])],
            Overlap(reductions, backward, reductions[-1:]),
        ]
        return self.share // images * overlaps
