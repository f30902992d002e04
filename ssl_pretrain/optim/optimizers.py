"""Configure and build the optimizer of a run, set its learning rates, and take masked steps."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_pretrain.distributed import collectives
from ssl_pretrain.optim import library, lr_multipliers, optimizer_list, scaling, schedules
from ssl_pretrain.optim.large_batch_adam import LAMB, Adan
from ssl_pretrain.optim.momentum_sgd import LARC, LARS, SGD
from ssl_pretrain.schema import DIMENSIONLESS, setting


@dataclass
class OptimConfig:
    """Settings of the optimizer and its schedule. `--plan` prints the scaled learning rate."""

    name: Literal[
        "lars",
        "larc",
        "adamw",
        "adam",
        "sgd",
        "lamb",
        "adan",
        "timm:lion",
        "timm:muon",
        "torch:adadelta",
        "torch:adamax",
        "torch:nadam",
        "torch:radam",
        "torch:rmsprop",
    ] = setting(
        "lars",
        "Optimizer. Names with timm: or torch: are classes of that library. args has their "
        "arguments.",
    )
    args: dict[str, Any] = setting(
        {},
        "Arguments of an optimizer of timm or torch, such as betas. "
        "Arguments that are left out have the library's defaults.",
    )
    base_lr: float = setting(
        0.3, "Learning rate before it is scaled with the batch size.", unit=DIMENSIONLESS
    )
    lr_scaling: Literal["linear", "sqrt", "none"] = setting(
        "linear",
        "Rule for the scaled learning rate, which is base_lr * global_batch_size / 256 for linear, "
        "base_lr * sqrt(global_batch_size) for sqrt, and base_lr for none.",
    )
    final_lr_ratio: float = setting(
        0.0, "Learning rate at the end of the cosine or line, as a fraction of the scaled one."
    )
    warmup_epochs: float = setting(10.0, "Epochs of linear warm-up.")
    warmup_start_ratio: float = setting(
        0.0, "Learning rate at step 0, as a fraction of the scaled one."
    )
    schedule: Literal["cosine", "linear", "milestones"] = setting(
        "cosine", "Schedule after the warm-up."
    )
    milestones: list[float] = setting(
        [], "Epochs at which the learning rate is multiplied by milestone_factor.", unit="epochs"
    )
    milestone_factor: float = setting(0.1, "Factor of the learning rate at each milestone.")
    changes_every: Literal["step", "epoch"] = setting(
        "step",
        "How often the learning rate changes. With epoch, "
        "all steps use the rate of the epoch's first step, as in MoCo v2 and SimSiam.",
    )
    excluded_lr_ratio: float = setting(
        1.0,
        "Learning rate of the excluded parameters, relative to the others (Barlow Twins: 0.024).",
    )
    constant_lr_names: list[str] = setting(
        [],
        "Prefixes of parameter names whose learning rate stays at its peak (SimSiam: predictor).",
    )
    lr_multipliers: dict[str, float] = setting(
        {},
        "Multipliers of the learning rate, by the name of a module or a parameter, such as "
        "{backbone: 0.1, predictor: 10}. The longest matching name applies. With 0 the parameters "
        "never change. Multiplied with layer_decay and the other ratios.",
        unit=DIMENSIONLESS,
    )
    layer_decay: float = setting(
        1.0,
        "Learning rate of each block of the backbone, relative to the block after it (DINOv2: "
        "0.9). Block i of n has layer_decay ** (n + 1 - i). Patch embedding, positions and tokens "
        "are block 0. The final norm and the heads have the full rate.",
        above=0,
        maximum=1,
        unit=DIMENSIONLESS,
    )
    patch_embed_lr_ratio: float = setting(
        1.0, "Learning rate of the patch embedding, relative to the others (DINOv2: 0.2)."
    )
    freeze_backbone_epochs: float = setting(
        0.0,
        "Epochs in which only the heads are trained, for backbones with loaded weights. The "
        "statistics of the backbone's batch norm do not change either. Gradients of the backbone "
        "count toward the clipped norm.",
    )
    weight_decay: float = setting(1e-4, "Weight decay.", unit=DIMENSIONLESS)
    final_weight_decay: float | None = setting(
        None,
        "Weight decay at the end of a half cosine (DINO: from 0.04 to 0.4). "
        "null keeps it constant.",
        unit=DIMENSIONLESS,
    )
    momentum: float = setting(0.9, "Momentum of lars, larc and sgd.", below=1)
    momentum_convention: Literal["classic", "popular"] = setting(
        "classic",
        "Place of the learning rate. It is inside the momentum buffer for classic (SimCLR), and "
        "multiplies the buffer for popular (BYOL, MoCo v3, Barlow Twins).",
    )
    nesterov: bool = setting(False, "Use Nesterov momentum, with sgd only.")
    trust_coefficient: float = setting(
        0.001, "Trust coefficient eta of lars and larc.", unit=DIMENSIONLESS
    )
    larc_clip: bool = setting(
        False, "Limit each tensor's rate to lr, with larc only (solo-learn: true, SwAV: false)."
    )
    betas: list[float] = setting(
        [0.9, 0.999],
        "Decay rates of the moments of adamw, adam, lamb and adan (three for adan).",
        below=1,
        unit=DIMENSIONLESS,
    )
    eps: float = setting(
        1e-8,
        "Number added to the root of the second moment of adamw, adam, lamb and adan.",
        above=0,
        unit=DIMENSIONLESS,
    )
    exclude_by: Literal["ndim", "name", "none"] = setting(
        "ndim",
        "How to choose the parameters without weight decay and without the adaptation of LARS. "
        "ndim excludes biases and norms, which have at most one dimension. name excludes by "
        "exclude_names.",
    )
    exclude_names: list[str] = setting([], "Substrings of excluded names, for exclude_by=name.")
    clip_norm: float = setting(
        0.0, "Largest norm of the gradient. 0 means no clipping.", unit=DIMENSIONLESS
    )
    clip_by: Literal["whole", "tensor"] = setting(
        "whole", "Norm that clip_norm limits, of the whole gradient or of each tensor (DINO)."
    )


def check(config: OptimConfig) -> None:
    """Raise ValueError, naming the key, if a value makes no sense."""
    num_betas, example = (3, "[0.98, 0.92, 0.99]") if config.name == "adan" else (2, "[0.9, 0.999]")
    if len(config.betas) != num_betas:
        raise ValueError(
            f"optim.betas: {config.betas} has {len(config.betas)} numbers; "
            f"give {num_betas}, such as {example}"
        )
    if config.name in optimizer_list.ENTRIES:
        library.check_args(config.name, config.args)
    elif config.args:
        raise ValueError(
            f"optim.args: {config.args} is for optimizers of timm and torch, not for "
            f"{config.name}; leave it out"
        )
    if config.schedule == "milestones" and not config.milestones:
        raise ValueError(
            "optim.milestones: [] leaves optim.schedule=milestones nothing to do; "
            "give epochs, such as [120, 160]"
        )
    for name, multiplier in config.lr_multipliers.items():
        if not 0 <= multiplier < math.inf:
            raise ValueError(
                f"optim.lr_multipliers.{name}: {multiplier:g} is out of range; give a finite "
                "number >= 0"
            )


def check_sharding(config: OptimConfig, strategy: str) -> None:
    """Raise ValueError if the optimizer cannot update each rank's shards independently."""
    entry = optimizer_list.ENTRIES.get(config.name)
    if strategy == "ddp" or entry is None:
        return
    if entry.needs_whole_tensors:
        raise ValueError(
            f"optim.name: {config.name} needs whole tensors, which parallel.strategy={strategy} "
            "divides among the ranks; set parallel.strategy=ddp, or another optimizer"
        )
    if config.args.get("caution"):
        raise ValueError(
            f"optim.args.caution: true needs whole tensors, which parallel.strategy={strategy} "
            "divides among the ranks; leave it out, or set parallel.strategy=ddp"
        )


def schedule_warnings(config: OptimConfig, epochs: int) -> list[str]:
    """Return a line of warning for each phase that takes the whole run.

    Such a run is allowed, because people try out a preset with `epochs=1`.
    """
    phases = {
        "warmup_epochs": (config.warmup_epochs, "the learning rate only rises", "warm-up"),
        "freeze_backbone_epochs": (
            config.freeze_backbone_epochs,
            "the backbone never changes",
            "phase",
        ),
    }
    return [
        f"warning: optim.{key}: {phase_epochs:g} takes the whole run of epochs: "
        f"{epochs}, so {effect}; give a shorter {name}, such as optim.{key}={epochs / 10:g}"
        for key, (phase_epochs, effect, name) in phases.items()
        if phase_epochs and phase_epochs >= epochs
    ]


def scaled_lr(config: OptimConfig, global_batch_size: int) -> float:
    """Return the peak learning rate at a global batch size."""
    scale = {"linear": global_batch_size / 256, "sqrt": math.sqrt(global_batch_size), "none": 1.0}
    return config.base_lr * scale[config.lr_scaling]


def parameter_groups(config: OptimConfig, module: nn.Module) -> list[dict[str, Any]]:
    """Divide the trained parameters of a module into the optimizer's groups.

    The groups are `adapted` and `excluded`. Excluded parameters have no weight decay and are not
    adapted by LARS. If `constant_lr_names` is set, there are also `constant adapted` and
    `constant excluded`. Each is divided further by the multipliers of the learning rate.

    Raises:
        ValueError: If no parameter's name starts with one of `constant_lr_names`, or a multiplier
            does not suit the module.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for prefix in config.constant_lr_names:
        if not any(name.startswith(prefix) for name, _ in trained):
            raise ValueError(
                f"optim.constant_lr_names: no trained parameter's name starts with {prefix!r}; "
                "give a prefix such as predictor, or leave it out"
            )
    multipliers = lr_multipliers.compute(
        module,
        by_prefix=config.lr_multipliers,
        layer_decay=config.layer_decay,
        patch_embed_lr_ratio=config.patch_embed_lr_ratio,
    )
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {
        (constant, excluded, multiplier): {
            "group": ("constant " if constant else "") + ("excluded" if excluded else "adapted"),
            "names": [],
            "params": [],
            "weight_decay": 0.0 if excluded else config.weight_decay,
            "adapt": not excluded,
            "constant": constant,
            "lr_multiplier": multiplier,
        }
        for constant in ((False, True) if config.constant_lr_names else (False,))
        for excluded in (False, True)
        for multiplier in dict.fromkeys(multipliers.values())  # in the order of the parameters
    }
    for name, parameter in trained:
        constant = name.startswith(tuple(config.constant_lr_names))
        group = groups[constant, _is_excluded(config, name, parameter), multipliers[name]]
        group["names"].append(name)
        group["params"].append(parameter)
    return list(groups.values())


def _is_excluded(config: OptimConfig, name: str, parameter: Tensor) -> bool:
    if config.exclude_by == "ndim":
        return parameter.ndim <= 1
    return config.exclude_by == "name" and any(text in name for text in config.exclude_names)


def build(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer over `parameter_groups`. `set_rates` sets its rates before each step."""
    groups = [group for group in parameter_groups(config, module) if group["params"]]
    adaptive_options = {"momentum": config.momentum, "trust_coefficient": config.trust_coefficient}
    if config.name == "lars":
        return LARS(groups, convention=config.momentum_convention, **adaptive_options)
    if config.name == "larc":
        return LARC(groups, clip=config.larc_clip, **adaptive_options)
    if config.name == "sgd":
        return SGD(groups, momentum=config.momentum, nesterov=config.nesterov)
    if config.name == "lamb":
        return LAMB(groups, betas=config.betas, eps=config.eps)
    if config.name == "adan":
        return Adan(groups, betas=config.betas, eps=config.eps)
    if config.name in optimizer_list.ENTRIES:
        return library.LibraryOptimizer(groups, config.name, config.args)
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    betas = config.betas[0], config.betas[1]
    return adam(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def rates(
    config: OptimConfig, progress: schedules.Progress, epochs: float, global_batch_size: int
) -> dict[str, float]:
    """Return the learning rate and the weight decay of a step, by name.

    Args:
        config: The optimizer's configuration.
        progress: Progress of the step.
        epochs: Epochs of the whole run.
        global_batch_size: Images per step over all ranks.
    """
    peak, decay = scaled_lr(config, global_batch_size), config.weight_decay
    if config.changes_every == "epoch":
        fraction, epochs_done = progress.epoch / epochs, float(progress.epoch)
    else:
        fraction, epochs_done = progress.fraction, progress.step / progress.steps_per_epoch
    warmup_fraction = min(1.0, config.warmup_epochs / epochs)
    start = config.warmup_start_ratio * peak
    if config.schedule == "milestones":
        num_passed = sum(epochs_done >= milestone for milestone in config.milestones)
        lr = peak * config.milestone_factor**num_passed
        if fraction < warmup_fraction:
            lr = start + (lr - start) * fraction / warmup_fraction
    else:
        lr = schedules.warmup_and_decline(
            fraction,
            warmup_fraction=warmup_fraction,
            start=start,
            peak=peak,
            final=config.final_lr_ratio * peak,
            decline=schedules.cosine if config.schedule == "cosine" else schedules.linear,
        )
    if config.final_weight_decay is not None:
        decay = schedules.cosine(progress.fraction, start=decay, final=config.final_weight_decay)
    return {"lr": lr, "weight_decay": decay}


def set_rates(
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    progress: schedules.Progress,
    epochs: float,
    global_batch_size: int,
) -> dict[str, float]:
    """Set the optimizer's rates for a step and return them. See `rates` for the arguments."""
    step_rates = rates(config, progress, epochs, global_batch_size)
    for group in optimizer.param_groups:
        lr = scaled_lr(config, global_batch_size) if group["constant"] else step_rates["lr"]
        ratio = 1.0 if group["adapt"] else config.excluded_lr_ratio
        group["lr"] = lr * ratio * group["lr_multiplier"]
        group["weight_decay"] = step_rates["weight_decay"] if group["adapt"] else 0.0
    return step_rates


def freezes_backbone(config: OptimConfig, progress: schedules.Progress) -> bool:
    """Return True if only the heads are trained in this step."""
    return progress.step < config.freeze_backbone_epochs * progress.steps_per_epoch


@torch.no_grad()
def step_if_finite(
    optimizer: torch.optim.Optimizer,
    clip_norm: float = 0.0,
    clip_by: str = "whole",
    frozen: Iterable[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Take an optimizer step, unless the gradient is not finite.

    A skipped step changes neither weights nor optimizer state. The decision is made on the device,
    and the host does not wait for it. It is the same on every rank because the gradients are.

    Args:
        optimizer: An optimizer built by `build`.
        clip_norm: Largest norm of the gradient. 0 means no clipping.
        clip_by: `whole` clips the whole gradient. `tensor` clips the gradient of each tensor.
        frozen: Parameters that stay fixed in this step. Their gradients count toward the
            clipped norm, as in DINO's code, and are then set to None.

    Returns:
        The norm of the gradient before clipping, and 1.0 if the step was skipped, else 0.0.
    """
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    (norms,) = collectives.tensor_norms(gradients)
    gradients = collectives.local_tensors(gradients)
    norm = torch.linalg.vector_norm(norms)
    skipped = (~torch.isfinite(norm)).float()
    if clip_norm and clip_by == "whole":
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    elif clip_norm:
        scaling.scale(gradients, (clip_norm / (norms + 1e-6)).clamp(max=1.0))
    for parameter in frozen:
        parameter.grad = None
    untyped_optimizer: Any = optimizer  # the docstring of `SGD` describes the protocol
    untyped_optimizer.found_inf, untyped_optimizer.grad_scale = skipped, None
    untyped_optimizer.step()
    return norm, skipped
