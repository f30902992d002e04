"""Describe what a configuration would run and what it would cost, for `--plan`."""

import os

from ssl_pretrain import config
from ssl_pretrain.checkpoint.initial_weights import initialize
from ssl_pretrain.config import RunConfig, build_method_on_meta
from ssl_pretrain.data import order, sources
from ssl_pretrain.data.source_report import check_images, layout_lines
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import optimizer_list
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.parallel.execution import bn_group_images
from ssl_pretrain.planning import estimate_text
from ssl_pretrain.schema import image_sizes
from ssl_pretrain.views import recipe

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
    method, takes_images = build_method_on_meta(run), config.takes_images(run)
    notes = initialize(method.backbone, run.backbone) if takes_images else []
    channels = config.describe_channels(run)
    advice = ["memory and time: set plan.gpu to H100, H200, A100 or L40S to estimate them"]
    lines = [
        "# resolved configuration",
        config.to_yaml(run),
        "# plan",
        *([channels] if channels else []),
        *_describe_optimizer(run),
        *_describe_parameters(run, method),
        *_describe_steps(run),
        *([f"weights: {run.backbone.init}: {'; '.join(notes)}"] if notes else []),
        *_describe_batch(run, method, world_size),
        *(estimate_text.describe(run, world_size) if run.plan.gpu else advice),
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
    schedule = f"{settings.schedule} to {lr * settings.final_lr_ratio:.3g}"
    if settings.schedule == "milestones":
        epochs = ", ".join(f"{epoch:g}" for epoch in settings.milestones)
        schedule = f"times {settings.milestone_factor:g} at epochs {epochs}"
    decay = f"weight decay {settings.weight_decay:g}"
    if settings.final_weight_decay is not None:
        decay += f" to {settings.final_weight_decay:g}"
    frozen = f"backbone: frozen in the first {settings.freeze_backbone_epochs:g} epochs"
    return [
        f"learning rate: {lr:.6g} ({scaling}), reached after {settings.warmup_epochs:g} epochs, "
        f"{schedule}",
        *optim.schedule_warnings(settings, run.epochs),
        f"optimizer: {settings.name}, {decay}, {_describe_hyperparameters(settings)}",
        *([frozen] if settings.freeze_backbone_epochs else []),
    ]


def _describe_hyperparameters(settings: optim.OptimConfig) -> str:
    if settings.name in ("lars", "larc", "sgd"):
        return f"momentum {settings.momentum:g} ({settings.momentum_convention})"
    if settings.name in optimizer_list.ENTRIES:
        arguments = ", ".join(f"{name} {value}" for name, value in settings.args.items())
        return arguments or "the library's other defaults"
    return f"betas {', '.join(f'{beta:g}' for beta in settings.betas)}, eps {settings.eps:g}"


def _describe_parameters(run: RunConfig, method: Method) -> list[str]:
    lines = [
        f"parameters: {backbones.count_parameters(method):,}, "
        f"of which {backbones.count_parameters(method.backbone):,} are in the backbone"
    ]
    for group in optim.parameter_groups(run.optim, method):
        names = group["names"]
        if not names:
            continue
        rate = group["lr_multiplier"] * (1 if group["adapt"] else run.optim.excluded_lr_ratio)
        size = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"  group {group['group']}: {len(names)} tensors, {size:,} numbers, "
            f"weight decay {group['weight_decay']:g}"
            + (f", learning rate times {rate:.6g}" if rate != 1 else "")
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
    check_images(source)
    config.check_number_of_texts(run, source)
    num_items, noun = len(source), _noun(run)
    steps = order.steps_per_epoch(num_items, run.global_batch_size)
    return [
        *layout_lines(run.data, source),
        f"steps per epoch: {steps} ({num_items:,} {noun}, the last incomplete batch dropped); "
        f"{round(steps * run.epochs):,} in {run.epochs} epochs",
    ]


def _describe_batch(run: RunConfig, method: Method, world_size: int) -> list[str]:
    batch, noun = run.global_batch_size, _noun(run)
    local_batch_size = batch // world_size
    micro_batch_size = config.configured_micro_batch_size(run, world_size)
    if micro_batch_size is None:
        micro_batches = "micro-batches as large as memory allows, measured at the start"
    elif micro_batch_size == local_batch_size:
        micro_batches = "1 micro-batch"
    else:
        micro_batches = f"micro-batches of {micro_batch_size:,}"
    share = (
        f"each rank's share of {local_batch_size:,} {noun} in {micro_batches}, "
        f"on {world_size} rank{'s' * (world_size > 1)}"
    )
    if not config.takes_images(run):
        num_texts = len(config.text_lengths(run))
        return [
            f"texts per item: {num_texts} of {run.text.length} tokens; negatives per anchor: "
            f"{_count_texts(num_texts, batch) - 1:,}",
            share,
        ]
    views = recipe.crop_per_view(run.views)
    return [
        f"views per image: {', '.join(f'{image_sizes.describe(view.size)} px' for view in views)}",
        _describe_loss(method, len(views), batch),
        f"batch norm over {bn_group_images(run.parallel, batch):,} images; {share}",
    ]


def _count_texts(num_texts: int, batch: int) -> int:
    """Return the number of texts to which an anchor is compared: positives and hard negatives."""
    return batch * max(1, num_texts - 1)


def _noun(run: RunConfig) -> str:
    return "images" if config.takes_images(run) else "items"


def _describe_loss(method: Method, num_views: int, batch: int) -> str:
    """Describe over how many embeddings the loss is computed, and the negatives if it has any."""
    views = f"{num_views} view{'s' * (num_views > 1)}"
    line = f"embeddings per loss: {num_views * batch:,} ({views} x {batch:,} images)"
    if method.negatives == "patches":
        line = f"embeddings per loss: the patches of {batch:,} images"
    elif method.couples != "embeddings":
        line = f"loss: the mean of one term per image, over {batch:,} images"
    negatives = _describe_negatives(method, batch)
    return f"{line}; negatives per anchor: {negatives}" if negatives else line


def _describe_negatives(method: Method, batch: int) -> str:
    """Describe the negatives of an anchor in a global batch, or return an empty string for none."""
    if method.needs_labels:
        return {
            "embeddings": "every embedding of another class",
            "images": "every image of another class",
            "mined": "1 per positive pair, chosen from other classes",
        }.get(method.negatives, "")
    others = f"{2 * batch - 2:,}"
    return {
        "embeddings": f"{others}, every other embedding of the batch",
        "images": f"{batch - 1:,}, every other image of the batch",
        "mined": f"1 per positive pair, chosen among {others}",
        "patches": "every other patch of the batch",
        "queue": f"{getattr(method.config, 'queue_size', 0):,}, the embeddings in the queue",
    }.get(method.negatives, "")
