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
from ssl_pretrain.parallel import batch_norm, weight_casts
from ssl_pretrain.parallel.execution import Execution, bn_group_images
from ssl_pretrain.parallel.memory import GIB, USABLE_FRACTION
from ssl_pretrain.planning import communication, step_trace
from ssl_pretrain.planning.communication import Cluster, Message, Overlap, Unit
from ssl_pretrain.planning.hardware import Machine
from ssl_pretrain.planning.step_trace import MicroBatchTraces
from ssl_pretrain.planning.trace import Trace
from ssl_pretrain.views import recipe

# Assumed size of the CUDA context and the workspaces of cuBLAS, cuDNN and NCCL.
RESERVED_BYTES = 1.5 * GIB
NUM_UPLOADED_BATCHES = 3  # uint8 batches of views on the device at a time (data/native)


@dataclass(frozen=True)
class StepTime:
    """Time of one optimizer step, by component."""

    compute_seconds: float  # all passes of the student and the teacher, over all micro-batches
    color_seconds: float
    loss_seconds: float
    optimizer_seconds: float  # includes the updates after the step, such as the teacher's
    exposed_seconds: float  # communication that no computation hides
    hidden_seconds: float  # communication during the forward and backward pass
    loader_seconds: float  # waiting for the loader
    arithmetic_share: float  # share of `compute_seconds` limited by arithmetic and not by memory
    num_flops: float  # floating-point operations of the model on this rank

    @property
    def total_seconds(self) -> float:
        """Time of the whole step. Hidden communication adds nothing to it."""
        return sum(
            (
                self.compute_seconds,
                self.color_seconds,
                self.loss_seconds,
                self.optimizer_seconds,
                self.exposed_seconds,
                self.loader_seconds,
            )
        )

    @property
    def bottleneck(self) -> str:
        """Name of the resource that takes the most time."""
        seconds = {
            "arithmetic": self.compute_seconds * self.arithmetic_share,
            "memory": self.compute_seconds * (1 - self.arithmetic_share) + self.color_seconds,
            "communication": self.exposed_seconds,
            "data": self.loader_seconds,
            "loss": self.loss_seconds,
            "optimizer": self.optimizer_seconds,
        }
        return max(seconds, key=seconds.__getitem__)


@dataclass
class Estimate:
    """Memory and time of one optimizer step on a cluster of GPUs.

    Each trace takes about a second, so it is only recorded when it is needed.
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
    def micro_batch_traces(self) -> MicroBatchTraces:
        """Traces of the forward and backward pass, for any number of images."""
        sizes = (2, 4) if self.local_batch_size > 1 else (1, 2)
        return step_trace.trace_micro_batch(self.run, self.method, self.execution, sizes)

    @cached_property
    def loss_trace(self) -> Callable[[int], Trace]:
        """Function that returns the trace of the loss for a number of images on this rank."""

        def trace_loss(num_images: int) -> Trace:
            specs, num_ranks = self.micro_batch_traces.specs_for(num_images), self.cluster.num_ranks
            return step_trace.trace_loss(self.method, self.execution, specs, num_ranks)

        return cache(trace_loss)

    @cached_property
    def optimizer_trace_and_bytes(self) -> tuple[Trace, int]:
        """Trace of the optimizer's step, and the bytes of the optimizer's state."""
        specs = self.micro_batch_traces.specs_for(self.local_batch_size)
        return step_trace.trace_optimizer(
            self.run, self.method, self.execution, specs, self.cluster.num_ranks
        )

    @cached_property
    def color_seconds_per_image(self) -> float:
        """Time of the color augmentation of all views of an image."""
        itemsize = self.execution.view_dtype.itemsize
        num_bytes = step_trace.coloring_bytes_per_image(self.run, itemsize)
        return num_bytes / self.machine.memory_bandwidth / self.machine.color_share

    @property
    def local_batch_size(self) -> int:
        """Number of images of the global batch on one rank."""
        return self.run.global_batch_size // self.cluster.num_ranks

    @property
    def num_shards(self) -> int:
        """Number of ranks that each weight is sharded over, which is 1 under DDP."""
        return communication.num_shards(self.run.parallel, self.cluster)

    @cached_property
    def units(self) -> list[Unit]:
        """Units of weights that FSDP gathers together."""
        num_calls = self.micro_batch_traces.backbone_calls
        return communication.divide_into_units(self.method, num_calls, self.num_shards)

    @cached_property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all trained parameters, before sharding."""
        return sum(self._bytes(p) for p in self.method.parameters() if p.requires_grad)

    def memory_by_component(self, micro_batch_size: int) -> dict[str, float]:
        """Return the bytes on each GPU at the peak of a step, by component."""
        method, itemsize = self.method, self.execution.dtype.itemsize
        parameter_bytes = sum(self._bytes(p) for p in method.parameters())
        teacher_bytes = sum(
            self._bytes(p) for name, p in method.named_parameters() if name.startswith("teacher.")
        )
        keeps_copies = self.execution.autocast and self.num_shards == 1
        copy_bytes = weight_casts.count_copy_bytes(method) if keeps_copies else 0
        # FSDP gathers the next unit before it frees the current one.
        sizes = sorted(unit.num_weights for unit in self.units)
        num_gathered = sum(sizes[-2:]) if self.num_shards > 1 else 0
        is_replicated = self.cluster.num_ranks > 1 and self.num_shards == 1
        num_pixels = sum(crop.num_pixels for crop in recipe.crop_per_view(self.run.views))
        values_per_image = self.run.views.num_channels * num_pixels
        return {
            "parameters": (parameter_bytes - teacher_bytes) / self.num_shards,
            "DDP buckets": self.gradient_bytes if is_replicated else 0.0,
            "gathered weights": num_gathered * itemsize,
            "optimizer": self.optimizer_trace_and_bytes[1] / self.num_shards,
            "teacher": teacher_bytes / self.num_shards + copy_bytes,
            "buffers": sum(self._bytes(buffer) for buffer in method.buffers()),
            "views": values_per_image * self.local_batch_size * (itemsize + NUM_UPLOADED_BATCHES),
            "peak of the step": self.peak_bytes(micro_batch_size),
            "reserved": RESERVED_BYTES,
        }

    def activation_bytes(self, micro_batch_size: int) -> float:
        """Return the bytes that the forward pass keeps for the backward pass."""
        trace = self.micro_batch_traces.trace_for(micro_batch_size)
        return float(trace.phase("forward").bytes_held[-1])

    def peak_bytes(self, micro_batch_size: int) -> float:
        """Return the peak memory of activations, gradients, the loss and the optimizer."""
        if self.takes_two_passes(micro_batch_size):
            loss_bytes = float(self.loss_trace(self.local_batch_size).peak_bytes)
        else:  # the micro-batch's activations stay in memory during the loss
            loss_bytes = self.loss_trace(micro_batch_size).peak_bytes
            loss_bytes += self.activation_bytes(micro_batch_size)
        bytes_on_other_ranks = self.gradient_bytes * (1 - 1 / self.num_shards)
        trace = self.micro_batch_traces.trace_for(micro_batch_size)
        pass_bytes = trace.peak_bytes - bytes_on_other_ranks
        optimizer_trace, _ = self.optimizer_trace_and_bytes
        optimizer_bytes = (self.gradient_bytes + optimizer_trace.peak_bytes) / self.num_shards
        return max(pass_bytes, loss_bytes, optimizer_bytes)

    def _bytes(self, tensor: torch.Tensor) -> int:
        dtype = self.execution.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.numel() * dtype.itemsize

    def takes_two_passes(self, micro_batch_size: int) -> bool:
        """Return True if each micro-batch is embedded twice."""
        accumulation = self.run.parallel.accumulation
        compares_embeddings = self.method.couples == "embeddings" or bool(self.method.compared)
        is_coupled = accumulation == "auto" and compares_embeddings
        is_split = micro_batch_size < self.local_batch_size
        return is_split and (accumulation == "two_passes" or is_coupled)

    def largest_micro_batch(self) -> tuple[int, str]:
        """Return the largest micro-batch size that fits, or 0 if none does, and an explanation."""
        usable_bytes = USABLE_FRACTION * self.machine.memory_bytes
        group_images = bn_group_images(self.run.parallel, self.run.global_batch_size)
        has_batch_norm = bool(batch_norm.statistics(self.method))
        smallest = min(group_images, self.local_batch_size) if has_batch_norm else 1
        multiples = range(smallest, self.local_batch_size + 1, smallest)
        sizes = [size for size in multiples if self.local_batch_size % size == 0]

        def is_too_large(size: int) -> bool:
            return sum(self.memory_by_component(size).values()) > usable_bytes

        num_fitting = bisect_left(sizes, True, key=is_too_large)
        if num_fitting:
            return sizes[num_fitting - 1], f"of the {self.local_batch_size:,} images per rank"
        smallest_text = "one image takes"
        if has_batch_norm:
            smallest_text = (
                f"batch norm over {group_images:,} images needs {smallest:,} at once, which take"
            )
        needed_bytes = sum(self.memory_by_component(smallest).values())
        return 0, (
            f"{smallest_text} {needed_bytes / GIB:.1f} GiB, more than the usable "
            f"{usable_bytes / GIB:.1f} GiB; use more GPUs or a smaller group"
        )

    def step_time(self, micro_batch_size: int) -> StepTime:
        """Return the time of one optimizer step, given the size of its micro-batches."""
        machine, num_micro_batches = self.machine, self.local_batch_size // micro_batch_size
        trace = self.micro_batch_traces.trace_for(micro_batch_size)
        phases = [trace.phase(name) for name in ("forward", "targets", "backward")]
        forward, targets, backward = (machine.trace_seconds(phase) for phase in phases)
        two_passes = self.takes_two_passes(micro_batch_size)
        passes = [*phases, phases[0]] if two_passes else phases
        bounds = np.array([machine.bound_seconds(phase) for phase in passes])
        compute_seconds = sum(map(machine.trace_seconds, passes)) * num_micro_batches
        loss_trace = self.loss_trace(self.local_batch_size if two_passes else micro_batch_size)
        num_losses = 1 if two_passes else num_micro_batches
        loss_seconds = num_losses * machine.trace_seconds(loss_trace)
        optimizer_seconds = machine.trace_seconds(self.optimizer_trace_and_bytes[0])
        exposed_seconds, hidden_seconds = (0.0, 0.0)
        if self.cluster.num_ranks > 1:
            exposed_seconds, hidden_seconds = communication.exposed_and_hidden_seconds(
                machine,
                self.cluster,
                self._blocking_messages(micro_batch_size, num_losses * loss_trace.collectives),
                self._overlaps(micro_batch_size, forward + targets, backward),
            )
        color_seconds = self.local_batch_size * self.color_seconds_per_image
        busy_seconds = (
            compute_seconds + color_seconds + loss_seconds + optimizer_seconds + exposed_seconds
        )
        decoded_per_second = machine.decoded_per_core * max(1, self.run.data.num_workers)
        decoding_seconds = self.local_batch_size / decoded_per_second if decoded_per_second else 0.0
        return StepTime(
            compute_seconds,
            color_seconds,
            loss_seconds,
            optimizer_seconds,
            exposed_seconds,
            hidden_seconds,
            loader_seconds=max(0.0, decoding_seconds - busy_seconds),
            arithmetic_share=float(bounds[:, 0].sum() / bounds.sum()),
            num_flops=num_micro_batches * sum(float(phase.flops.sum()) for phase in phases),
        )

    def _blocking_messages(
        self, micro_batch_size: int, loss_collectives: list[tuple[str, int]]
    ) -> list[Message]:
        """Return the messages during which the GPU waits."""
        group_images = bn_group_images(self.run.parallel, self.run.global_batch_size)
        collectives = [*loss_collectives, *self.optimizer_trace_and_bytes[0].collectives]
        return [
            *(Message(*collective, self.cluster.num_ranks) for collective in collectives),
            *communication.batch_norm_messages(
                self.micro_batch_traces.traces.small.batch_norm_channels,
                group_images // micro_batch_size,
                self.execution.dtype.itemsize,
            ),
        ]

    def _overlaps(self, micro_batch_size: int, forward: float, backward: float) -> list[Overlap]:
        """Return the messages of weights and gradients, with the computation that hides them."""
        settings, dtype, cluster = self.run.parallel, self.execution.dtype, self.cluster
        if settings.strategy == "ddp":
            is_halved = settings.gradients == "bfloat16" and dtype == torch.float32
            num_bytes = self.gradient_bytes / (2 if is_halved else 1)
            return [communication.ddp_overlap(num_bytes, cluster.num_ranks, backward)]
        gathers, reductions = communication.weight_messages(
            self.units, settings, cluster, self.execution.autocast, dtype.itemsize
        )
        num_forwards = 2 if self.takes_two_passes(micro_batch_size) else 1
        overlaps = [
            *num_forwards * [Overlap(gathers, forward, gathers[:1])],
            Overlap(reductions, backward, reductions[-1:]),
        ]
        return self.local_batch_size // micro_batch_size * overlaps
