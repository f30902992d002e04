"""Describe what a configuration would run and what it would cost, for `--plan`."""

import os

from ssl_pretrain import config
from ssl_pretrain.checkpoint.initial_weights import initialize
from ssl_pretrain.config import RunConfig, build_method_on_meta
from ssl_pretrain.data import order, sources
from ssl_pretrain.data.source_report import layout_lines
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.parallel.execution import bn_group_images
from ssl_pretrain.parallel.memory import GIB, USABLE_FRACTION
from ssl_pretrain.planning import hardware
from ssl_pretrain.planning.communication import Cluster
from ssl_pretrain.planning.estimate import Estimate, StepTime
from ssl_pretrain.views import recipe

NUM_IMAGENET_IMAGES = 1_281_167  # training images of ImageNet-1k
MAX_NAMES = 6  # parameter groups with more names are listed in part


def num_ranks(run: RunConfig, default: int) -> int:
    """Return the number of ranks on the configured cluster, or `default` if there is none."""
    launch = run.launch
    if run.plan.gpu and launch.gpus_per_node:
        return launch.nodes * launch.gpus_per_node
    return default


def describe(run: RunConfig, world_size: int = 1) -> str:
    """Describe the resolved configuration, learning rate, parameters, steps and embeddings.

    Raises:
        ConfigError: If training would refuse the configuration.
    """
    config.check(run, world_size)
    method = build_method_on_meta(run)
    notes = initialize(method.backbone, run.backbone)
    advice = ["memory and time: set plan.gpu to H100, H200, A100 or L40S to estimate them"]
    lines = [
        "# resolved configuration",
        config.to_yaml(run),
        "# plan",
        *_describe_optimizer(run),
        *_describe_parameters(run, method),
        *_describe_steps(run),
        *([f"weights: {run.backbone.init}: {'; '.join(notes)}"] if notes else []),
        *_describe_batch(run, method, world_size),
        *(_describe_estimate(run, world_size) if run.plan.gpu else advice),
    ]
    return "\n".join(lines)


def _describe_optimizer(run: RunConfig) -> list[str]:
    settings = run.optim
    lr = optim.scaled_lr(settings, run.global_batch_size)
    scaling = {
        "linear": f"{settings.base_lr} x {run.global_batch_size} / 256",
        "sqrt": f"{settings.base_lr} x sqrt({run.global_batch_size})",
        "none": "not scaled",
    }[settings.lr_scaling]
    schedule = f"cosine to {lr * settings.final_lr_ratio:.3g}"
    if settings.schedule == "milestones":
        epochs = ", ".join(f"{epoch:g}" for epoch in settings.milestones)
        schedule = f"times {settings.milestone_factor:g} at epochs {epochs}"
    decay = f"weight decay {settings.weight_decay:g}"
    if settings.final_weight_decay is not None:
        decay += f" to {settings.final_weight_decay:g}"
    return [
        f"learning rate: {lr:.6g} ({scaling}), reached after {settings.warmup_epochs:g} epochs, "
        f"{schedule}",
        *optim.warmup_warnings(settings, run.epochs),
        f"optimizer: {settings.name}, {decay}, "
        f"momentum {settings.momentum:g} ({settings.momentum_convention})",
    ]


def _describe_parameters(run: RunConfig, method: Method) -> list[str]:
    lines = [
        f"parameters: {backbones.count_parameters(method):,}, "
        f"of which {backbones.count_parameters(method.backbone):,} are in the backbone"
    ]
    for group in optim.parameter_groups(run.optim, method):
        names = group["names"]
        if not names:
            continue
        rate = 1.0 if group["adapt"] else run.optim.excluded_lr_ratio
        size = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"  group {group['group']}: {len(names)} tensors, {size:,} numbers, "
            f"weight decay {group['weight_decay']:g}"
            + (f", learning rate times {rate:g}" if rate != 1 else "")
            + (", constant learning rate" if group["constant"] else "")
        )
        if len(names) > MAX_NAMES:
            names = [*names[:3], "...", *names[-3:]]
        lines.append(f"    {', '.join(names)}")
    return lines


def _describe_steps(run: RunConfig) -> list[str]:
    try:
        source = sources.open_source(run.data, "train")
    except (ValueError, OSError) as error:
        if run.data.root and os.path.exists(os.path.expanduser(run.data.root)):
            raise  # the run would be refused as well
        return [f"steps per epoch: unknown, because the data cannot be read: {error}"]
    num_images = len(source)
    steps = order.steps_per_epoch(num_images, run.global_batch_size)
    return [
        *layout_lines(run.data, source),
        f"steps per epoch: {steps} ({num_images:,} images, the last incomplete batch dropped); "
        f"{round(steps * run.epochs):,} in {run.epochs} epochs",
    ]


def _describe_batch(run: RunConfig, method: Method, world_size: int) -> list[str]:
    views, batch = recipe.crop_per_view(run.views), run.global_batch_size
    rows = len(views) * batch
    negatives = "none, because the loss does not compare images"
    if method.couples != "nothing":
        negatives = f"{rows - 2:,}, every other embedding of the batch"
    local_batch_size = batch // world_size
    micro_batch_size = config.configured_micro_batch_size(run, world_size)
    if micro_batch_size is None:
        micro_batches = "micro-batches as large as memory allows, measured at the start"
    elif micro_batch_size == local_batch_size:
        micro_batches = "1 micro-batch"
    else:
        micro_batches = f"micro-batches of {micro_batch_size:,}"
    return [
        f"views per image: {', '.join(f'{view.size} px' for view in views)}",
        f"embeddings per loss: {rows:,} ({len(views)} views x {batch:,} images); "
        f"negatives per anchor: {negatives}",
        f"batch norm over {bn_group_images(run.parallel, batch):,} images; each rank's share of "
        f"{local_batch_size:,} images in {micro_batches}, "
        f"on {world_size} rank{'s' * (world_size > 1)}",
    ]


def _describe_estimate(run: RunConfig, world_size: int) -> list[str]:
    """Describe the memory per GPU and the time per step, by component."""
    machine = hardware.configured_machine(run.plan)
    gpus_per_node = run.launch.gpus_per_node or world_size
    cluster = Cluster(world_size // gpus_per_node, gpus_per_node)
    estimate = Estimate(run, cluster, machine)
    largest, reason = estimate.largest_micro_batch()
    micro_batch_size = (
        config.configured_micro_batch_size(run, world_size) or largest or estimate.local_batch_size
    )
    step = estimate.step_time(micro_batch_size)
    nodes = f", {cluster.num_nodes} nodes of {gpus_per_node}" if cluster.num_nodes > 1 else ""
    embedded_twice = ", each embedded twice" if estimate.takes_two_passes(micro_batch_size) else ""
    size = f"{largest:,} {reason}" if largest else f"none, because {reason}"
    lines = [
        f"# on {cluster.num_ranks} x {machine.name}{nodes}: rates from data sheets",
        *_describe_memory(estimate, micro_batch_size),
        f"largest micro-batch: {size}",
        f"micro-batches per rank: {estimate.local_batch_size // micro_batch_size}{embedded_twice}",
        *_describe_time(estimate, step),
    ]
    if run.parallel.compile:
        lines.append("parallel.compile: the times are those without compilation")
    return [*lines, _describe_duration(run, cluster, step)]


def _describe_memory(estimate: Estimate, micro_batch_size: int) -> list[str]:
    memory = estimate.memory_by_component(micro_batch_size)
    total, capacity = sum(memory.values()), estimate.machine.memory_bytes
    verdict = "fits"
    if total > USABLE_FRACTION * capacity:
        verdict = f"does not fit: a run may fill {USABLE_FRACTION:.0%}"
    activations = estimate.activation_bytes(micro_batch_size) / micro_batch_size / 2**20
    gradients = estimate.gradient_bytes / GIB
    loss = estimate.loss_trace(micro_batch_size).peak_bytes / GIB
    return [
        f"memory per GPU with a micro-batch of {micro_batch_size:,} images: "
        f"{total / GIB:.2f} of {capacity / GIB:.1f} GiB; {verdict}",
        *(f"  {size / GIB:9.3f} GiB  {name}" for name, size in memory.items() if size),
        f"  at the peak of the step: {activations:.1f} MiB of activations per image, "
        f"{gradients:.3f} GiB of gradients, {loss:.3f} GiB in the loss",
    ]


def _describe_time(estimate: Estimate, step: StepTime) -> list[str]:
    machine, batch = estimate.machine, estimate.run.global_batch_size
    loader = "waiting for the loader"
    if not machine.decoded_per_core:
        loader = "the loader, not estimated; set plan.decoded_per_core"
    seconds = {
        "forward, teacher, backward": step.compute_seconds,
        "color augmentation of the views": step.color_seconds,
        "loss": step.loss_seconds,
        "optimizer and update of the teacher": step.optimizer_seconds,
        "communication, exposed": step.exposed_seconds,
        loader: step.loader_seconds,
    }
    flops_per_second = step.num_flops / step.total_seconds
    return [
        f"time per step: {step.total_seconds * 1e3:,.1f} ms, "
        f"{batch / step.total_seconds:,.0f} images/s; bound by {step.bottleneck}",
        *(f"  {value * 1e3:11.3f} ms  {name}" for name, value in seconds.items()),
        f"  {step.hidden_seconds * 1e3:.3f} ms of communication hidden by the backward pass; "
        f"{flops_per_second / 1e12:,.1f} TFLOP/s per GPU, "
        f"{flops_per_second / machine.matmul_rate:.0%} of its peak",
        f"  {step.arithmetic_share:.0%} of the computation is bound by arithmetic, "
        "the rest by memory",
    ]


def _describe_duration(run: RunConfig, cluster: Cluster, step: StepTime) -> str:
    num_known = run.plan.num_images or _count_images(run)
    num_images = num_known or NUM_IMAGENET_IMAGES
    epoch_seconds = order.steps_per_epoch(num_images, run.global_batch_size) * step.total_seconds
    hours = run.epochs * epoch_seconds / 3600
    assumption = "" if num_known else "if it were ImageNet, "
    return (
        f"epochs per day: {86400 / epoch_seconds:,.1f}; the run of {run.epochs} epochs takes "
        f"{hours:,.1f} hours, {hours * cluster.num_ranks:,.0f} GPU-hours "
        f"({assumption}{num_images:,} images)"
    )


def _count_images(run: RunConfig) -> int:
    """Return the number of training images, or 0 if the data cannot be read."""
    try:
        return len(sources.open_source(run.data, "train"))
    except (ValueError, OSError):
        return 0
