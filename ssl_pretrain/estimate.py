"""What a run would take of a machine: memory by part, seconds of a step by part, computed without that machine.

The step's real program is traced without memory (`trace`): the forward, the teacher and the backward of a part, the loss as one of
all ranks computes it, the optimizer. Each operation is priced by the machine's rates (`hardware`). What the trace does not hold
follows from the configuration: the gradients' all-reduce, batch norm's statistics, the loader. Not in it: the time of kernels that
share the device with collectives, what an allocator wastes, compilation.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from ssl_pretrain import backbones, batch_norm, distributed, optim, parallel, trace
from ssl_pretrain.backbones import BackboneConfig
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data.loader import Batch
from ssl_pretrain.hardware import Machine
from ssl_pretrain.losses import tiles
from ssl_pretrain.memory import GIB, ROOM
from ssl_pretrain.methods.base import Method
from ssl_pretrain.trace import Line, Shape, Trace
from ssl_pretrain.views import colour, recipe

BUCKET = 25 * 2**20  # bytes of DDP's last bucket, whose reduction nothing hides
RESERVED = 1.5 * GIB  # of a GPU, by the CUDA context and the workspaces of cuBLAS, cuDNN and NCCL; assumed
_AHEAD = 3  # batches of uint8 views on the device at once (data/threads.py)


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


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


def method_on_meta(run: RunConfig) -> Method:
    """The run's method without memory behind its parameters: to count them and to see their names."""
    with torch.device("meta"):
        return run.method.build(backbones.on_meta(run.backbone, recipe.each(run.views)[0].size))


class Program:
    """The step of a configuration on so many ranks of a machine. Nothing is traced before it is asked for.

    Args:
        like: the same model on another batch or other ranks, whose traces serve here too.
    """

    def __init__(self, run: RunConfig, ranks: int, machine: Machine, like: Program | None = None):
        self.run, self.ranks, self.machine = run, ranks, machine
        self.share = run.global_batch_size // ranks
        kind = torch.device("cpu" if machine.on_cpu else "cuda")
        self.precision = parallel.precision(run.parallel, kind)
        self.dtype = torch.float64 if self.precision == torch.float64 else torch.float32
        if like is not None:
            self.part, self.optimizer, self.views_seconds = like.part, like.optimizer, like.views_seconds

    @cached_property
    def part(self) -> Line:
        """Forward, targets and backward of any number of images."""
        few, more = (2, 4) if self.share > 1 else (1, 2)
        return Line(self._traced(few), self._traced(more), few, more)

    def on_meta(self) -> Method:
        method = method_on_meta(self.run)
        method.num_steps, method.steps_per_epoch = 1000, 10
        return method

    def _there(self, method: Method) -> Any:
        return trace.without_memory(method, self.dtype, self.run.parallel.channels_last)

    def _traced(self, images: int) -> Trace:
        method = self.on_meta()

        def made() -> Any:
            layout = torch.channels_last if self.run.parallel.channels_last else torch.contiguous_format
            sizes = [crop.size for crop in recipe.each(self.run.views)]
            views = [torch.zeros(images, 3, size, size, dtype=self.dtype).to(memory_format=layout) for size in sizes]
            numbers = torch.zeros(images, dtype=torch.int64)
            return self._there(method), Batch(views, numbers, numbers)

        def embed(there: Any, mark: Any) -> Any:
            method, batch = there
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
                mark("forward")
                embeddings = method(batch)
                mark("targets")
                targets = method.targets(batch)
            mark("backward")
            trained = [z for z in embeddings.values() if z.requires_grad]
            torch.autograd.backward(trained, [torch.ones_like(z) for z in trained])
            groups = {"embeddings": embeddings, "targets": targets}
            return {name: {key: trace.shape_of(z) for key, z in group.items()} for name, group in groups.items()}

        return trace.run(made, embed)

    @cache  # noqa: B019  # as long as the program
    def loss(self, images: int) -> Trace:
        """The loss of `images` of this rank against those of all ranks, and its gradient by the embeddings."""
        results, method = self.part.at(images).results, self.on_meta()

        def made() -> Any:
            return self._there(method), *(_tensors(results[name]) for name in ("embeddings", "targets"))

        def both(there: Any, mark: Any) -> None:
            method, embeddings, targets = there
            leaves = [z for z in embeddings.values() if z.requires_grad]
            loss, _ = method.loss(embeddings, targets)
            torch.autograd.grad(loss, leaves, allow_unused=True)

        with distributed.pretended(self.ranks), tiles.sized_for("cpu" if self.machine.on_cpu else "cuda"):
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
            optim.set_rates(optimizer, self.run.optim, 0.5, self.run.epochs, self.run.global_batch_size)
            _give_gradients(method)
            optim.guarded_step(optimizer)
            state_bytes = sum(z.nbytes for state in optimizer.state.values() for z in state.values() if isinstance(z, torch.Tensor))
            _give_gradients(method)
            return method, optimizer, *(_tensors(results[name]) for name in ("embeddings", "targets"))

        def step(there: Any, mark: Any) -> None:
            method, optimizer, embeddings, targets = there
            for group in (embeddings, targets):
                group.pop("logits", None)  # what DINO's loss has taken out
            optim.guarded_step(optimizer, self.run.optim.clip_norm, self.run.optim.clip_by)
            method.after_step(0.5, {name: z.detach() for name, z in embeddings.items()}, targets)

        with distributed.pretended(self.ranks):
            traced = trace.run(made, step)
        return traced, state_bytes

    @cached_property
    def views_seconds(self) -> float:
        """Of one image's colours on the device; on a CPU the loader has made them."""
        if self.machine.on_cpu:
            return 0.0
        images = 64
        bounds = 0.0
        for number, crop in enumerate(recipe.each(self.run.views)):
            parameters = colour.draw(crop, 0, 0, np.arange(images), number)

            def made(size: int = crop.size) -> Any:
                return torch.zeros(images, 3, size, size, dtype=torch.uint8)

            def colours(pixels: Any, mark: Any, crop: Any = crop, parameters: Any = parameters) -> None:
                colour.apply_in_batches(pixels, parameters, crop, self.run.views.mean, self.run.views.std)

            bounds += sum(self.machine.bounds(trace.run(made, colours)))
        return bounds / self.machine.attained / images

    def memory(self, images: int) -> dict[str, float]:
        """Bytes on each GPU at the step's peak, by part, when `images` are fed at once."""
        method = self.on_meta()
        teacher = sum(self._bytes(p) for name, p in method.named_parameters() if name.startswith("teacher."))
        pixels = sum(3 * crop.size**2 for crop in recipe.each(self.run.views))
        return {
            "parameters": sum(self._bytes(p) for p in method.parameters()) - teacher,
            "DDP's buckets": self.gradient_bytes if self.ranks > 1 else 0.0,
            "optimizer": self.optimizer[1],
            "teacher": teacher,
            "buffers": sum(self._bytes(buffer) for buffer in method.buffers()),
            "views": pixels * self.share * (self.dtype.itemsize + (0 if self.machine.on_cpu else _AHEAD)),
            "the step's peak": self.peak(images),
            "reserved": 0.0 if self.machine.on_cpu else RESERVED,
        }

    def activations(self, images: int) -> float:
        """Bytes that the forward leaves for the backward."""
        return float(self.part.at(images).phase("forward").held[-1])

    def peak(self, images: int) -> float:
        """Most bytes that forward, loss, backward and optimizer hold at once, the gradients among them."""
        whole = not self.two_passes(images)  # the loss is computed while a part's activations are there
        loss = self.loss(images if whole else self.share)
        at_loss = loss.peak + (self.activations(images) if whole else 0.0)
        return max(float(self.part.at(images).peak), at_loss, float(self.gradient_bytes + self.optimizer[0].peak))

    def _bytes(self, tensor: torch.Tensor) -> int:
        return tensor.numel() * (self.dtype.itemsize if tensor.is_floating_point() else tensor.element_size())

    def two_passes(self, images: int) -> bool:
        accumulation = self.run.parallel.accumulation
        couples = self.on_meta().couples_batch
        return images < self.share and (accumulation == "two_passes" or (accumulation == "auto" and couples))

    def largest(self) -> tuple[int, str]:
        """Images that a rank can feed at once at most, 0 for none; and why no more, or what would do."""
        room = ROOM * self.machine.memory
        group = parallel.group_images(self.run.parallel, self.run.global_batch_size)
        normed = bool(batch_norm.statistics(self.on_meta()))
        smallest = min(group, self.share) if normed else 1
        sizes = [images for images in range(smallest, self.share + 1, smallest) if self.share % images == 0]
        count = bisect_left(sizes, True, key=lambda images: sum(self.memory(images).values()) > room)
        if count:
            return sizes[count - 1], f"of its share of {self.share:,}"
        why = f"batch norm over {group:,} images takes {smallest:,} at once" if normed else "not even one image fits"
        return 0, f"{why}, {sum(self.memory(smallest).values()) / GIB:.1f} GiB of {room / GIB:.1f}; more GPUs, or a smaller group, would do"

    def step(self, cluster: Cluster, images: int) -> Step:
        """One optimizer step with `images` fed at once."""
        machine, part, parts = self.machine, self.part.at(images), self.share // images
        forward, targets, backward = (part.phase(name) for name in ("forward", "targets", "backward"))
        two = self.two_passes(images)
        passes = [forward, targets, backward] + ([forward] if two else [])
        loss = self.loss(self.share if two else images)
        losses = 1 if two or parts == 1 else parts
        bounds = np.array([machine.bounds(phase) for phase in passes])
        compute = parts * sum(machine.seconds(phase) for phase in passes)
        colours = self.share * self.views_seconds
        loss_seconds, optimizer = losses * machine.seconds(loss), machine.seconds(self.optimizer[0])
        exposed, hidden = self._communication(cluster, images, loss, losses, machine.seconds(backward))
        busy = compute + colours + loss_seconds + optimizer + exposed
        workers = self.run.data.num_workers
        decoding = self.share / (machine.decoded_per_core * max(1, workers)) if machine.decoded_per_core else 0.0
        return Step(
            compute, colours, loss_seconds, optimizer, exposed, hidden, max(0.0, decoding - busy),
            float(bounds[:, 0].sum() / bounds.sum()), parts * sum(float(phase.flops.sum()) for phase in (forward, targets, backward)),
        )  # fmt: skip

    def _communication(self, cluster: Cluster, images: int, loss: Trace, losses: int, backward: float) -> tuple[float, float]:
        if self.ranks == 1:
            return 0.0, 0.0
        sent = losses * sum(self.travel(cluster, *one, self.ranks) for one in loss.sent)
        sent += sum(self.travel(cluster, *one, self.ranks) for one in self.optimizer[0].sent)
        sent += sum(self.travel(cluster, *one) for one in self.batch_norm_messages(images))
        gradients = self.travel(cluster, "allreduce", self.gradient_bytes, self.ranks)
        last = self.travel(cluster, "allreduce", min(BUCKET, self.gradient_bytes), self.ranks)
        exposed = max(last, gradients - backward)
        return sent + exposed, gradients - exposed

    @cached_property
    def gradient_bytes(self) -> int:
        return sum(self._bytes(parameter) for parameter in self.on_meta().parameters() if parameter.requires_grad)

    def batch_norm_messages(self, images: int) -> list[tuple[str, int, int]]:
        """What batch norms whose groups span ranks send: two sums a channel and a count each way."""
        ranks = parallel.group_images(self.run.parallel, self.run.global_batch_size) // images
        if ranks <= 1:
            return []
        size, norms = self.dtype.itemsize, self.part.few.norms
        gathers = [("allgather", (2 * channels + 1) * size * ranks, ranks) for channels in norms["forward"]]
        return gathers + [("allreduce", 2 * channels * size, ranks) for channels in norms["backward"]]

    def travel(self, cluster: Cluster, collective: str, size: int, ranks: int) -> float:
        """Seconds of one collective whose result is `size` bytes: a ring's, whose slowest link is its speed, and a tree's latency."""
        within = ranks <= cluster.gpus_per_node
        bandwidth = self.machine.intra_node if within else min(self.machine.intra_node, self.machine.inter_node)
        trips = 2 if collective == "allreduce" else 1
        return trips * (ranks - 1) / ranks * size / bandwidth + math.ceil(math.log2(ranks)) * self.machine.latency_seconds


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
        return trace.without_memory(backbone), torch.zeros(images, 3, size, size).to(memory_format=torch.channels_last)

    def step(there: Any, mark: Any) -> None:
        network, views = there
        mark("forward")
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            features = network(views)
        mark("backward")
        features.float().mean().backward()

    return trace.run(made, step)
