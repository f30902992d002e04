"""Trace the parts of one rank's step: micro-batch, loss and optimizer. Count color's bytes."""

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_pretrain.config import RunConfig, text_lengths
from ssl_pretrain.distributed import process_group
from ssl_pretrain.losses.backend import BACKENDS, use_backend
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones, components
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim import library
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel.activation_checkpointing import recompute_activations
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.planning.recorder import BeginPhase, make_fake, record_trace
from ssl_pretrain.planning.trace import LinearTrace, TensorSpec, Trace
from ssl_pretrain.schema.image_sizes import ImageSize, height_and_width
from ssl_pretrain.views import masks, recipe
from ssl_pretrain.views.batch import Batch, blank_texts

STAND_IN: Literal["lamb"] = "lamb"  # optimizer that is traced in place of some others
HALFWAY = Progress(500, 1000, 10)  # progress at the traced step

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class OutputSpecs:
    """Shapes of the embeddings and the targets of a micro-batch."""

    embeddings: dict[str, TensorSpec]
    targets: dict[str, TensorSpec]


@dataclass(frozen=True)
class MicroBatchTraces:
    """Traces of the forward pass, the targets and the backward pass for any number of images."""

    traces: LinearTrace
    small: OutputSpecs
    large: OutputSpecs
    backbone_calls: dict[str, int]  # forward passes of each backbone, by its name

    def trace_for(self, num_images: int) -> Trace:
        """Return the trace of a micro-batch with this many images."""
        return self.traces.trace_for(num_images)

    def specs_for(self, num_images: int) -> OutputSpecs:
        """Return the shapes of the outputs of a micro-batch with this many images."""
        return OutputSpecs(
            self.traces.specs_for(self.small.embeddings, self.large.embeddings, num_images),
            self.traces.specs_for(self.small.targets, self.large.targets, num_images),
        )


def trace_micro_batch(
    run: RunConfig, method: Method, execution: Execution, sizes: tuple[int, int]
) -> MicroBatchTraces:
    """Trace micro-batches of two sizes, which determine the traces of all sizes.

    Args:
        run: Configuration of the run.
        method: The method of the run, on the meta device.
        execution: Number formats and memory layout.
        sizes: Number of images in each of the two micro-batches, the smaller one first.
    """
    (small, small_specs, calls), (large, large_specs, _) = (
        _trace_images(run, method, execution, num_images) for num_images in sizes
    )
    return MicroBatchTraces(LinearTrace(small, large, *sizes), small_specs, large_specs, calls)


def _trace_images(
    run: RunConfig, method: Method, execution: Execution, num_images: int
) -> tuple[Trace, OutputSpecs, dict[str, int]]:
    network, calls = copy.deepcopy(method), Counter[str]()

    def prepare() -> tuple[Method, Batch]:
        make_fake(network, execution.dtype, execution.memory_format)
        for name, module in network.named_modules():
            if isinstance(module, components.Backbone):
                module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        recompute_activations(network, run.parallel.activation_checkpointing)
        views = [
            torch.zeros(
                num_images, run.views.num_channels, crop.height, crop.width, dtype=execution.dtype
            ).to(memory_format=execution.memory_format)
            for crop in recipe.crop_per_view(run.views)
        ]
        zeros = torch.zeros(num_images, dtype=torch.int64)
        mask_sets = masks.blank(run.views, num_images, "cpu")
        texts = blank_texts(text_lengths(run), num_images, "cpu")
        return network, Batch(views, zeros, zeros, mask_sets, texts)

    def embed(inputs: tuple[Method, Batch], begin_phase: BeginPhase) -> OutputSpecs:
        network, batch = inputs
        with torch.autocast("cpu", torch.bfloat16, enabled=execution.autocast):
            begin_phase("forward")
            embeddings = network(batch)
            begin_phase("targets")
            targets = network.targets(batch)
        begin_phase("backward")
        trained = [z for z in embeddings.values() if z.requires_grad]
        torch.autograd.backward(trained, [torch.ones_like(z) for z in trained])
        return OutputSpecs(_specs(embeddings), _specs(targets))

    return *record_trace(prepare, embed), dict(calls)


def trace_loss(method: Method, execution: Execution, specs: OutputSpecs, num_ranks: int) -> Trace:
    """Trace the loss of one rank's images against the images of all ranks, and its gradient.

    Args:
        method: The method on the meta device.
        execution: Number formats and memory layout.
        specs: Shapes of this rank's embeddings and targets.
        num_ranks: Number of ranks.
    """
    network = copy.deepcopy(method)

    def prepare() -> tuple[Tensors, Tensors]:
        make_fake(network, execution.dtype, execution.memory_format)
        return _empty(specs.embeddings), _empty(specs.targets)

    def differentiate(inputs: tuple[Tensors, Tensors], begin_phase: BeginPhase) -> None:
        embeddings, targets = inputs
        leaves = [z for z in embeddings.values() if z.requires_grad]
        loss, _ = network.loss(embeddings, network.couple_targets(targets))
        torch.autograd.grad(loss, leaves, allow_unused=True)

    tiles = replace(BACKENDS["cuda"], fused=False)  # operations inside a kernel are not traced
    with process_group.fake_process_group(num_ranks), use_backend(tiles):
        return record_trace(prepare, differentiate)[0]


def trace_optimizer(
    run: RunConfig, method: Method, execution: Execution, specs: OutputSpecs, num_ranks: int
) -> tuple[Trace, int]:
    """Trace the optimizer's step and the updates after it. Also return the bytes of its state.

    LAMB, which has two moments as well, stands in for optimizers whose step needs values.
    """
    network = copy.deepcopy(method)
    if not library.can_be_traced(run.optim.name):
        stand_in = replace(run.optim, name=STAND_IN, args={}, betas=[0.9, 0.999])
        run = replace(run, optim=stand_in)

    def prepare() -> tuple[torch.optim.Optimizer, Tensors, Tensors]:
        make_fake(network, execution.dtype, execution.memory_format)
        optimizer = optim.build(run.optim, network)
        optim.set_rates(optimizer, run.optim, HALFWAY, run.epochs, run.global_batch_size)
        _allocate_gradients(network)
        optim.step_if_finite(optimizer)  # the first step allocates the state
        _allocate_gradients(network)
        targets = network.couple_targets(_empty(specs.targets))
        return optimizer, _empty(specs.embeddings), targets

    def step(
        inputs: tuple[torch.optim.Optimizer, Tensors, Tensors], begin_phase: BeginPhase
    ) -> int:
        optimizer, embeddings, targets = inputs
        for group in (embeddings, targets):
            for name in network.transient:
                group.pop(name, None)
        optim.step_if_finite(optimizer, run.optim.clip_norm, run.optim.clip_by)
        network.after_step(HALFWAY, {name: z.detach() for name, z in embeddings.items()}, targets)
        state = [value for entries in optimizer.state.values() for value in entries.values()]
        return sum(value.nbytes for value in state if isinstance(value, Tensor))

    with process_group.fake_process_group(num_ranks):
        return record_trace(prepare, step)


def coloring_bytes_per_image(run: RunConfig, itemsize: int) -> float:
    """Return the bytes that the kernels of `color_triton` move for all views of an image.

    Two kernels read the uint8 pixels, and the views are written once. To blur a view, two more
    kernels each read a float32 buffer, which the kernel before them has written.

    Args:
        run: Configuration of the run.
        itemsize: Bytes per value of the views.
    """
    num_bytes = 0.0
    for crop in recipe.crop_per_view(run.views):
        read_bytes = 2 * torch.uint8.itemsize
        blur_bytes = 2 * 2 * torch.float32.itemsize  # two buffers, each written and read
        num_values = run.views.num_channels * crop.num_pixels
        num_bytes += num_values * (read_bytes + itemsize + crop.blur * blur_bytes)
    return num_bytes


def trace_backbone(name: str, size: ImageSize, num_images: int, *, bfloat16: bool) -> Trace:
    """Trace the forward and backward pass of a timm backbone on views of `size` pixels."""
    backbone = backbones.build_on_meta(BackboneConfig(name=name), size)

    def prepare() -> Tensor:
        make_fake(backbone)
        return torch.zeros(num_images, 3, *height_and_width(size)).to(
            memory_format=torch.channels_last
        )

    def step(views: Tensor, begin_phase: BeginPhase) -> None:
        begin_phase("forward")
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            features = backbone(views)
        begin_phase("backward")
        loss = features.float().mean()
        del features  # a class token would keep the memory of all tokens
        loss.backward()

    return record_trace(prepare, step)[0]


def _specs(tensors: Tensors) -> dict[str, TensorSpec]:
    return {name: TensorSpec.from_tensor(tensor) for name, tensor in tensors.items()}


def _empty(specs: dict[str, TensorSpec]) -> Tensors:
    return {name: spec.empty() for name, spec in specs.items()}


def _allocate_gradients(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
