"""What a configuration would run, computed without running it: `--plan`."""

from __future__ import annotations

import os

from ssl_pretrain import config
from ssl_pretrain.checkpoint.initial_weights import initialize
from ssl_pretrain.config import RunConfig, method_on_meta
from ssl_pretrain.data import order, sources
from ssl_pretrain.data.layout_report import layout_lines
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.parallel import parallel_config
from ssl_pretrain.parallel.memory import GIB, ROOM
from ssl_pretrain.planning import hardware
from ssl_pretrain.planning.communication import Cluster
from ssl_pretrain.planning.estimate import Program, Step
from ssl_pretrain.planning.hardware import Machine
from ssl_pretrain.views import recipe

IMAGENET = 1_281_167  # training images


def ranks(run: RunConfig, here: int) -> int:
    """How many ranks a plan is for: of the cluster that `plan.gpu` and `launch` describe, else as many as would start here."""
    launch = run.launch
    return launch.nodes * launch.gpus_per_node if run.plan.gpu and launch.gpus_per_node else here


def describe(run: RunConfig, world_size: int = 1) -> str:
    """The resolved config, the effective learning rate, parameter groups, steps and embeddings, as text.

    Raises:
        ConfigError: what training would refuse too.
    """
    config.check(run, world_size)
    method = method_on_meta(run)
    notes = initialize(method.backbone, run.backbone)
    lines = ["# resolved configuration", config.to_yaml(run), "# plan"]
    lines += _rates(run)
    lines += _parameters(run, method)
    lines += _steps(run)
    lines += [f"weights: {run.backbone.init}: {'; '.join(notes)}"] if notes else []
    views = recipe.expand_counts(run.views)
    lines.append(f"views of an image: {', '.join(f'{view.size} px' for view in views)}")
    couples = (
        "every other embedding of the batch"
        if method.couples != "nothing"
        else "none: images do not couple"
    )
    rows = len(views) * run.global_batch_size
    lines.append(
        f"embeddings per loss: {rows:,} ({len(views)} views x {run.global_batch_size:,} images); negatives per anchor: "
        + (f"{rows - 2:,}, {couples}" if method.couples != "nothing" else couples)
    )
    group = parallel_config.bn_group_images(run.parallel, run.global_batch_size)
    share, part = run.global_batch_size // world_size, config.part_size(run, world_size)
    parts = (
        "parts as large as memory allows, measured at the start"
        if part is None
        else f"parts of {part:,}"
        if part < share
        else "1 part"
    )
    lines.append(
        f"batch norm over {group:,} images; each rank's share of {share:,} images in {parts}, "
        f"at {world_size} rank{'s' if world_size > 1 else ''}"
    )
    if run.plan.gpu:
        lines += _on_machine(run, world_size)
    else:
        lines.append("memory and time: plan.gpu=H100 computes them, as do H200, A100 and L40S")
    return "\n".join(lines)


def _on_machine(run: RunConfig, world_size: int) -> list[str]:
    """Memory of each GPU and seconds of a step, by part, and what they come to."""
    machine = hardware.machine(run.plan)
    per_node = run.launch.gpus_per_node or world_size
    cluster = Cluster(world_size // per_node, per_node)
    program = Program(run, cluster, machine)
    largest, why = program.largest()
    images = config.part_size(run, world_size) or largest or program.share
    eager = (
        ["parallel.compile: the times are of the blocks as they are written; fused ones move less"]
        if run.parallel.compile
        else []
    )
    what = f"{cluster.ranks} x {machine.name}" + (
        f", {cluster.nodes} nodes of {per_node}" if cluster.nodes > 1 else ""
    )
    lines = [f"# on {what}: rates from {machine.source}", *_memory(program, images)]
    lines.append(f"largest local batch: {f'{largest:,} {why}' if largest else f'none: {why}'}")
    passes = ", each embedded twice" if program.two_passes(images) else ""
    lines.append(f"parts of the global batch on a rank: {program.share // images}{passes}")
    step = program.step(images)
    return [*lines, *_time(run, machine, step), *eager, _run_hours(run, cluster, step)]


def _memory(program: Program, images: int) -> list[str]:
    memory, machine = program.memory(images), program.machine
    total = sum(memory.values())
    verdict = (
        "fits"
        if total <= ROOM * machine.memory
        else f"does not fit: {ROOM:.0%} is what a run may fill"
    )
    return [
        f"memory of each, {images:,} images at once: {total / GIB:.2f} of {machine.memory / GIB:.1f} GiB; {verdict}",
        *(f"  {size / GIB:9.3f} GiB  {name}" for name, size in memory.items() if size),
        f"  of the step's peak: {program.activations(images) / images / 2**20:.1f} MiB of activations an image, "
        f"{program.gradient_bytes / GIB:.3f} GiB of gradients, {program.loss(images).peak / GIB:.3f} GiB in the loss",
    ]


def _time(run: RunConfig, machine: Machine, step: Step) -> list[str]:
    loader = (
        "waiting for the loader"
        if machine.decoded_per_core
        else "the loader: not planned; give plan.decoded_per_core"
    )
    parts = {
        "forward, teacher, backward": step.compute,
        "colours of the views": step.views,
        "loss": step.loss,
        "optimizer and teacher's move": step.optimizer,
        "communication, exposed": step.exposed,
        loader: step.data,
    }
    return [
        f"a step: {step.total * 1e3:,.1f} ms, {run.global_batch_size / step.total:,.0f} images/s; {step.bound} bounds it",
        *(f"  {seconds * 1e3:11.3f} ms  {name}" for name, seconds in parts.items()),
        f"  {step.hidden * 1e3:.3f} ms of communication behind the backward; {step.flops / step.total / 1e12:,.1f} TFLOP/s a GPU, "
        f"{step.flops / step.total / machine.matmul:.0%} of its rate",
        f"  {step.arithmetic:.0%} of the computing is bound by arithmetic, the rest by memory",
    ]


def _run_hours(run: RunConfig, cluster: Cluster, step: Step) -> str:
    num_images = run.plan.num_images or _num_images(run)
    epoch = order.steps_per_epoch(num_images or IMAGENET, run.global_batch_size) * step.total
    hours = run.epochs * epoch / 3600
    return (
        f"epochs a day: {86400 / epoch:,.1f}; the run of {run.epochs} epochs: {hours:,.1f} hours, {hours * cluster.ranks:,.0f} GPU-hours "
        f"({'' if num_images else 'if it were ImageNet, '}{num_images or IMAGENET:,} images)"
    )


def _rates(run: RunConfig) -> list[str]:
    settings = run.optim
    lr = optim.scaled_lr(settings, run.global_batch_size)
    how = {
        "linear": f"{settings.base_lr} x {run.global_batch_size} / 256",
        "sqrt": f"{settings.base_lr} x sqrt({run.global_batch_size})",
        "none": "not scaled",
    }[settings.lr_scaling]
    then = f"cosine to {lr * settings.final_lr_ratio:.3g}"
    if settings.schedule == "milestones":
        then = f"times {settings.milestone_factor:g} at epochs {', '.join(f'{epoch:g}' for epoch in settings.milestones)}"
    decay = f"weight decay {settings.weight_decay:g}"
    if settings.final_weight_decay is not None:
        decay += f" to {settings.final_weight_decay:g}"
    return [
        f"learning rate: {lr:.6g} ({how}), reached after {settings.warmup_epochs:g} epochs, {then}",
        f"optimizer: {settings.name}, {decay}, momentum {settings.momentum:g} ({settings.momentum_convention})",
    ]


def _parameters(run: RunConfig, method: Method) -> list[str]:
    lines = [
        f"parameters: {backbones.count_parameters(method):,}, of them the backbone's {backbones.count_parameters(method.backbone):,}"
    ]
    for group in optim.parameter_groups(run.optim, method):
        if not group["names"]:
            continue
        rate = 1.0 if group["adapt"] else run.optim.excluded_lr_ratio
        special = (f", learning rate times {rate:g}" if rate != 1 else "") + (
            ", constant learning rate" if group["constant"] else ""
        )
        numbers = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"  group {group['group']}: {len(group['names'])} tensors, {numbers:,} numbers, weight decay {group['weight_decay']:g}{special}"
        )
        shown = (
            group["names"]
            if len(group["names"]) <= 6
            else [*group["names"][:3], "...", *group["names"][-3:]]
        )
        lines.append(f"    {', '.join(shown)}")
    return lines


def _steps(run: RunConfig) -> list[str]:
    try:
        source = sources.open_source(run.data, "train")
    except (ValueError, OSError) as error:
        if run.data.root and os.path.exists(os.path.expanduser(run.data.root)):
            raise  # the run would be refused as well
        return [f"steps per epoch: unknown, as the data cannot be read here: {error}"]
    num_images = len(source)
    steps = order.steps_per_epoch(num_images, run.global_batch_size)
    return [
        *layout_lines(run.data, source),
        f"steps per epoch: {steps} ({num_images:,} images, the last incomplete batch dropped); "
        f"{round(steps * run.epochs):,} in {run.epochs} epochs",
    ]


def _num_images(run: RunConfig) -> int:
    """0 where the data cannot be read here."""
    try:
        return len(sources.open_source(run.data, "train"))
    except (ValueError, OSError):
        return 0
