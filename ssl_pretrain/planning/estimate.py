"""What a run would take of a machine: memory by part, seconds of a step by part, computed without that machine.

The step's real program is traced without memory (`trace`): the forward, the teacher and the backward of a part, the loss as one of
all ranks computes it, the optimizer. Each operation is priced by the machine's rates (`hardware`). What the trace does not hold
follows from the configuration: the gradients' all-reduce, batch norm's statistics, the loader. Not in it: the time of kernels that
share the device with collectives, what an allocator wastes, compilation.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from ssl_pretrain.config import RunConfig, method_on_meta
from ssl_pretrain.distributed import process_group
from ssl_pretrain.losses.backend import BACKENDS, use_backend
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.models.backbones import BackboneConfig
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import batch_norm, compile_and_checkpoint, parallel_config
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.memory import GIB, ROOM
from ssl_pretrain.planning import communication, trace
from ssl_pretrain.planning.communication import Cluster, Message, Unit
from ssl_pretrain.planning.hardware import Machine
from ssl_pretrain.planning.trace import Line, Shape, Trace
from ssl_pretrain.views import color_torch, recipe
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.color_parameters import draw_colors

RESERVED = (
    1.5 * GIB
)  # of a GPU, by the CUDA context and the workspaces of cuBLAS, cuDNN and NCCL; assumed
HALFWAY = Progress(500, 1000, 10)  # the step that is traced
_AHEAD = 3  # batches of uint8 views on the device at once (data/threads.py)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step by part; `total` is its length. arithmetic, memory: the shares of compute that each bounds."""

    compute: float  # forward, teacher and backward of all parts
    views: float  # colours, on the device
    loss: float
    optimizer: float  # and what moves after it
    exposed: float  # communication that no computation hides
    hidden: float  # communication behind the backward
    data: float  # the wait for the loader, beyond all of these
    arithmetic: float
    flops: float  # of the model, for this rank

    @property
    def total(self) -> float:
        return self.compute + self.views + self.loss + self.optimizer + self.exposed + self.data

    @property
    def bound(self) -> str:
        """What the largest part of the step waits for."""
        parts = {
            "arithmetic": self.compute * self.arithmetic, "memory": self.compute * (1 - self.arithmetic) + self.views,
            "communication": self.exposed, "data": self.data, "loss": self.loss, "optimizer": self.optimizer,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


class Program:
    """The step of a configuration on a cluster of one machine. Nothing is traced before it is asked for.

    Args:
        like: the same model on another batch or other ranks, whose traces serve here too.
    """

    def __init__(
        self, run: RunConfig, cluster: Cluster, machine: Machine, like: Program | None = None
    ):
        self.run, self.cluster, self.machine, self.ranks = run, cluster, machine, cluster.ranks
        self.share = run.global_batch_size // self.ranks
        self.calls: dict[str, int] = {}  # of each backbone, in a forward and the targets
        kind = torch.device("cpu" if machine.on_cpu else "cuda")
        self.execution = Execution.resolve(run.parallel, kind)
        self.dtype = self.execution.dtype
        if like is not None:
            self.counted, self.part, self.calls = like.counted, like.part, like.calls
            self.optimizer, self.views_seconds = like.optimizer, like.views_seconds

    @cached_property
    def part(self) -> Line:
        """Forward, targets and backward of any number of images."""
        few, more = (2, 4) if self.share > 1 else (1, 2)
        return Line(self._traced(few), self._traced(more), few, more)

    @cached_property
    def counted(self) -> Method:
        """The method, to be counted."""
        return method_on_meta(self.run)

    def on_meta(self) -> Method:
        """The method, to be traced once."""
        return copy.deepcopy(self.counted)  # a tenth of what building it takes

    def _there(self, method: Method) -> Any:
        return trace.without_memory(method, self.dtype, self.run.parallel.channels_last)

    def _traced(self, images: int) -> Trace:
        method = self.on_meta()

        def made() -> Any:
            layout = (
                torch.channels_last if self.run.parallel.channels_last else torch.contiguous_format
            )
            sizes = [crop.size for crop in recipe.expand_counts(self.run.views)]
            views = [
                torch.zeros(images, 3, size, size, dtype=self.dtype).to(memory_format=layout)
                for size in sizes
            ]
            numbers = torch.zeros(images, dtype=torch.int64)
            self.calls.clear()
            there = self._there(method)
            for name, module in there.named_modules():
                if isinstance(module, backbones.Backbone):
                    module.register_forward_pre_hook(
                        lambda *_, name=name: self.calls.update({name: self.calls.get(name, 0) + 1})
                    )
            compile_and_checkpoint.recompute_activations(
                there, self.run.parallel.activation_checkpointing
            )
            return there, Batch(views, numbers, numbers)

        def embed(there: Any, mark: Any) -> Any:
            method, batch = there
            with torch.autocast("cpu", torch.bfloat16, enabled=self.execution.autocast):
                mark("forward")
                embeddings = method(batch)
                mark("targets")
                targets = method.targets(batch)
            mark("backward")
            trained = [z for z in embeddings.values() if z.requires_grad]
            torch.autograd.backward(trained, [torch.ones_like(z) for z in trained])
            groups = {"embeddings": embeddings, "targets": targets}
            return {
                name: {key: trace.shape_of(z) for key, z in group.items()}
                for name, group in groups.items()
            }

        return trace.run(made, embed)

    @cache  # noqa: B019  # as long as the program
    def loss(self, images: int) -> Trace:
        """The loss of `images` of this rank against those of all ranks, and its gradient by the embeddings."""
        results, method = self.part.at(images).results, self.on_meta()

        def made() -> Any:
            return self._there(method), *(
                _tensors(results[name]) for name in ("embeddings", "targets")
            )

        def both(there: Any, mark: Any) -> None:
            method, embeddings, targets = there
            leaves = [z for z in embeddings.values() if z.requires_grad]
            loss, _ = method.loss(embeddings, targets)
            torch.autograd.grad(loss, leaves, allow_unused=True)

        tiles = BACKENDS["cpu" if self.machine.on_cpu else "cuda"]
        with (
            process_group.fake_process_group(self.ranks),
            use_backend(replace(tiles, fused=False)),
        ):
            return trace.run(made, both)

    @cached_property
    def optimizer(self) -> tuple[Trace, int]:
        """The optimizer's step with what moves after it, and the bytes of its state."""
        results, method = self.part.at(self.share).results, self.on_meta()
        state_bytes = 0

        def made() -> Any:
            nonlocal state_bytes
            self._there(method)
            optimizer = optim.build(self.run.optim, method)
            optim.set_rates(
                optimizer, self.run.optim, HALFWAY, self.run.epochs, self.run.global_batch_size
            )
            _give_gradients(method)
            optim.guarded_step(optimizer)
            state_bytes = sum(
                z.nbytes
                for state in optimizer.state.values()
                for z in state.values()
                if isinstance(z, torch.Tensor)
            )
            _give_gradients(method)
            return (
                method,
                optimizer,
                *(_tensors(results[name]) for name in ("embeddings", "targets")),
            )

        def step(there: Any, mark: Any) -> None:
            method, optimizer, embeddings, targets = there
            for group in (embeddings, targets):
                for name in method.transient:
                    group.pop(name, None)
            optim.guarded_step(optimizer, self.run.optim.clip_norm, self.run.optim.clip_by)
            method.after_step(
                HALFWAY, {name: z.detach() for name, z in embeddings.items()}, targets
            )

        with process_group.fake_process_group(self.ranks):
            traced = trace.run(made, step)
        return traced, state_bytes

    @cached_property
    def views_seconds(self) -> float:
        """Of one image's colours on the device; on a CPU the loader has made them."""
        if self.machine.on_cpu:
            return 0.0
        images = 64
        bounds = 0.0
        for number, crop in enumerate(recipe.expand_counts(self.run.views)):
            parameters = draw_colors(crop, 0, 0, np.arange(images), number)

            def made(size: int = crop.size) -> Any:
                return torch.zeros(images, 3, size, size, dtype=torch.uint8)

            def colours(
                pixels: Any, mark: Any, crop: Any = crop, parameters: Any = parameters
            ) -> None:
                color_torch.apply(pixels, parameters, crop, self.run.views.mean, self.run.views.std)

            bounds += sum(self.machine.bounds(trace.run(made, colours)))
        return bounds / self.machine.attained / images

    def memory(self, images: int) -> dict[str, float]:
        """Bytes on each GPU at the step's peak, by part, when `images` are fed at once."""
        method = self.counted
        teacher = sum(
            self._bytes(p) for name, p in method.named_parameters() if name.startswith("teacher.")
        )
        pixels = sum(3 * crop.size**2 for crop in recipe.expand_counts(self.run.views))
        largest = (
            sorted(unit.numbers for unit in self.units)[-2:] if self.shards > 1 else []
        )  # the next is gathered before this one goes
        return {
            "parameters": (sum(self._bytes(p) for p in method.parameters()) - teacher)
            / self.shards,
            "DDP's buckets": self.gradient_bytes if self.ranks > 1 and self.shards == 1 else 0.0,
            "gathered weights": sum(largest) * self.dtype.itemsize,
            "optimizer": self.optimizer[1] / self.shards,
            "teacher": teacher / self.shards,
            "buffers": sum(self._bytes(buffer) for buffer in method.buffers()),
            "views": pixels
            * self.share
            * (self.dtype.itemsize + (0 if self.machine.on_cpu else _AHEAD)),
            "the step's peak": self.peak(images),
            "reserved": 0.0 if self.machine.on_cpu else RESERVED,
        }

    def activations(self, images: int) -> float:
        """Bytes that the forward leaves for the backward."""
        return float(self.part.at(images).phase("forward").held[-1])

    def peak(self, images: int) -> float:
        """Most bytes that forward, loss, backward and optimizer hold at once, the gradients among them."""
        whole = not self.two_passes(
            images
        )  # the loss is computed while a part's activations are there
        loss = self.loss(images if whole else self.share)
        at_loss = loss.peak + (self.activations(images) if whole else 0.0)
        elsewhere = self.gradient_bytes * (1 - 1 / self.shards)  # of the gradients, on other ranks
        at_step = (self.gradient_bytes + self.optimizer[0].peak) / self.shards
        return max(float(self.part.at(images).peak) - elsewhere, at_loss, at_step)

    def _bytes(self, tensor: torch.Tensor) -> int:
        return tensor.numel() * (
            self.dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
        )

    def two_passes(self, images: int) -> bool:
        accumulation = self.run.parallel.accumulation
        couples = self.counted.couples == "embeddings"
        return images < self.share and (
            accumulation == "two_passes" or (accumulation == "auto" and couples)
        )

    def largest(self) -> tuple[int, str]:
        """Images that a rank can feed at once at most, 0 for none; and why no more, or what would do."""
        room = ROOM * self.machine.memory
        group = parallel_config.bn_group_images(self.run.parallel, self.run.global_batch_size)
        normed = bool(batch_norm.statistics(self.counted))
        smallest = min(group, self.share) if normed else 1
        sizes = [
            images
            for images in range(smallest, self.share + 1, smallest)
            if self.share % images == 0
        ]
        count = bisect_left(
            sizes, True, key=lambda images: sum(self.memory(images).values()) > room
        )
        if count:
            return sizes[count - 1], f"of its share of {self.share:,}"
        why = (
            f"batch norm over {group:,} images takes {smallest:,} at once"
            if normed
            else "not even one image fits"
        )
        return (
            0,
            f"{why}, {sum(self.memory(smallest).values()) / GIB:.1f} GiB of {room / GIB:.1f}; more GPUs, or a smaller group, would do",
        )

    def step(self, images: int) -> Step:
        """One optimizer step with `images` fed at once."""
        machine, part, parts = self.machine, self.part.at(images), self.share // images
        forward, targets, backward = (
            part.phase(name) for name in ("forward", "targets", "backward")
        )
        two = self.two_passes(images)
        passes = [forward, targets, backward] + ([forward] if two else [])
        loss = self.loss(self.share if two else images)
        losses = 1 if two or parts == 1 else parts
        bounds = np.array([machine.bounds(phase) for phase in passes])
        compute = parts * sum(machine.seconds(phase) for phase in passes)
        colours = self.share * self.views_seconds
        loss_seconds, optimizer = losses * machine.seconds(loss), machine.seconds(self.optimizer[0])
        times = machine.seconds(forward) + machine.seconds(targets), machine.seconds(backward)
        exposed, hidden = self._communication(images, loss, losses, 2 if two else 1, *times)
        busy = compute + colours + loss_seconds + optimizer + exposed
        workers = self.run.data.num_workers
        decoding = (
            self.share / (machine.decoded_per_core * max(1, workers))
            if machine.decoded_per_core
            else 0.0
        )
        return Step(
            compute, colours, loss_seconds, optimizer, exposed, hidden, max(0.0, decoding - busy),
            float(bounds[:, 0].sum() / bounds.sum()), parts * sum(float(phase.flops.sum()) for phase in (forward, targets, backward)),
        )  # fmt: skip

    def _communication(
        self, images: int, loss: Trace, losses: int, forwards: int, forward: float, backward: float
    ) -> tuple[float, float]:
        """Seconds that nothing hides, and those behind the forward and the backward of a part."""
        if self.ranks == 1:
            return 0.0, 0.0
        cluster, settings = self.cluster, self.run.parallel
        traced = [*(losses * loss.sent), *self.optimizer[0].sent]
        open_ = [Message(name, size, self.ranks) for name, size in traced]
        ranks = parallel_config.bn_group_images(settings, self.run.global_batch_size) // images
        open_ += communication.of_batch_norm(self.part.few.norms, ranks, self.dtype.itemsize)
        if settings.strategy == "ddp":
            size = self.gradient_bytes / (
                2 if settings.gradients == "bfloat16" and self.dtype == torch.float32 else 1
            )
            gradients, last = (
                Message("allreduce", min(size, most), self.ranks)
                for most in (math.inf, communication.BUCKET)
            )
            behind = [([gradients], backward, [last])]
        else:
            low = self.execution.autocast
            there, back = communication.of_weights(
                self.units, settings, cluster, low, self.dtype.itemsize
            )
            parts = self.share // images
            behind = parts * [
                *(forwards * [(there, forward, there[:1])]),
                (back, backward, back[-1:]),
            ]
        exposed = self.time_of(open_)
        hidden = 0.0
        for (
            messages,
            computing,
            first,
        ) in behind:  # the first or last of them meets nothing to hide behind
            took = self.time_of(messages)
            exposed += max(self.time_of(first), took - computing)
            hidden += took - max(self.time_of(first), took - computing)
        return exposed, hidden

    def time_of(self, messages: list[Message]) -> float:
        return communication.seconds(self.machine, self.cluster, messages)

    @cached_property
    def units(self) -> list[Unit]:
        return communication.units(self.counted, self.calls, self.shards)

    @property
    def shards(self) -> int:
        return communication.shards(self.run.parallel, self.cluster)

    @cached_property
    def gradient_bytes(self) -> int:
        return sum(
            self._bytes(parameter)
            for parameter in self.counted.parameters()
            if parameter.requires_grad
        )


def _tensors(shapes: dict[str, Shape]) -> dict[str, torch.Tensor]:
    return {name: shape.like() for name, shape in shapes.items()}


def _give_gradients(method: Method) -> None:
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def backbone_step(name: str, size: int, images: int, bfloat16: bool) -> Trace:
    """Forward and backward of a timm backbone alone, on views of `size` pixels."""
    backbone = backbones.on_meta(BackboneConfig(name=name), size)

    def made() -> Any:
        return trace.without_memory(backbone), torch.zeros(images, 3, size, size).to(
            memory_format=torch.channels_last
        )

    def step(there: Any, mark: Any) -> None:
        network, views = there
        mark("forward")
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            features = network(views)
        mark("backward")
        features.float().mean().backward()

    return trace.run(made, step)
