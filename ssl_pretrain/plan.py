"""What a configuration would run, computed without running it: `--plan`."""

from __future__ import annotations

import torch

from ssl_pretrain import backbones, config, optim, parallel
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import order, sources
from ssl_pretrain.methods.base import Method
from ssl_pretrain.views import recipe


def method_on_meta(run: RunConfig) -> Method:
    """The run's method without memory behind its parameters: to count them and to see their names."""
    with torch.device("meta"):
        return run.method.build(backbones.on_meta(run.backbone, recipe.each(run.views)[0].size))


def describe(run: RunConfig, world_size: int = 1) -> str:
    """The resolved config, the effective learning rate, parameter groups, steps and embeddings, as text.

    Raises:
        ConfigError: what training would refuse too.
    """
    config.check(run, world_size)
    method = method_on_meta(run)
    lines = ["# resolved configuration", config.to_yaml(run), "# plan"]
    lines += _rates(run)
    lines += _parameters(run, method)
    lines += _steps(run)
    views = recipe.each(run.views)
    lines.append(f"views of an image: {', '.join(f'{view.size} px' for view in views)}")
    couples = "every other embedding of the batch" if method.couples_batch else "none: images do not couple"
    rows = len(views) * run.global_batch_size
    lines.append(
        f"embeddings per loss: {rows:,} ({len(views)} views x {run.global_batch_size:,} images); negatives per anchor: "
        + (f"{rows - 2:,}, {couples}" if method.couples_batch else couples)
    )
    group = parallel.group_images(run.parallel, run.global_batch_size)
    share, part = run.global_batch_size // world_size, config.part_size(run, world_size)
    parts = "parts as large as memory allows, measured at the start" if part is None else f"parts of {part:,}" if part < share else "1 part"
    lines.append(
        f"batch norm over {group:,} images; each rank's share of {share:,} images in {parts}, "
        f"at {world_size} rank{'s' if world_size > 1 else ''}"
    )
    return "\n".join(lines)


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
    lines = [f"parameters: {backbones.count_parameters(method):,}, of them the backbone's {backbones.count_parameters(method.backbone):,}"]
    for group in optim.parameter_groups(run.optim, method):
        if not group["names"]:
            continue
        rate = 1.0 if group["adapt"] else run.optim.excluded_lr_ratio
        special = (f", learning rate times {rate:g}" if rate != 1 else "") + (", constant learning rate" if group["constant"] else "")
        numbers = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"  group {group['group']}: {len(group['names'])} tensors, {numbers:,} numbers, weight decay {group['weight_decay']:g}{special}"
        )
        shown = group["names"] if len(group["names"]) <= 6 else [*group["names"][:3], "...", *group["names"][-3:]]
        lines.append(f"    {', '.join(shown)}")
    return lines


def _steps(run: RunConfig) -> list[str]:
    try:
        num_images = len(sources.open_source(run.data, "train"))
    except (ValueError, OSError) as error:
        return [f"steps per epoch: unknown, as the data cannot be read here: {error}"]
    steps = order.steps_per_epoch(num_images, run.global_batch_size)
    return [
        f"steps per epoch: {steps} ({num_images:,} images, the last incomplete batch dropped); "
        f"{round(steps * run.epochs):,} in {run.epochs} epochs"
    ]
