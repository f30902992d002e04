"""Check that the settings fit together and that the first step can run."""

import dataclasses
from collections.abc import Sequence

import torch

from ssl_pretrain import schema
from ssl_pretrain.config.loading import ConfigError
from ssl_pretrain.config.run_config import LaunchConfig, RunConfig
from ssl_pretrain.data import order, sources
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones, image_size_check, timm_networks
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.parallel import execution
from ssl_pretrain.views import recipe
from ssl_pretrain.views.batch import Batch

SLURM_KEYS = (  # names within the section `launch`
    *("nodes", "gpus_per_node", "cpus_per_rank", "memory_gb", "hours", "signal_seconds"),
    *("requeue", "chain", "partition", "account", "qos", "constraint"),
)


def check(config: RunConfig, world_size: int) -> None:
    """Check that the settings fit together and that the first step can run on this many ranks.

    Raises:
        ConfigError: If a check fails. The message names the keys, their values and a remedy.
    """
    try:
        schema.check(config)
        recipe.check(config.views)
        sources.check(config.data)
        execution.bn_group_images(config.parallel, config.global_batch_size)
        execution.check(config.parallel)
        optim.check(config.optim)
        sizes = {f"views.crops.{name}.size": crop.size for name, crop in config.views.crops.items()}
        if config.evaluation.image_size:
            sizes["evaluation.image_size"] = config.evaluation.image_size
        image_size_check.check(config.backbone, sizes)
        config.method.check(config, world_size)
        _try_method(config)
        order.check_divides(config.global_batch_size, world_size)
        _check_micro_batch(config, world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_micro_batch(config: RunConfig, world_size: int) -> None:
    batch, images = config.global_batch_size, configured_micro_batch_size(config, world_size)
    share = batch // world_size
    if images is None:
        return
    if images < 1 or share % images:
        raise ConfigError(
            f"micro_batch_size: {images} does not divide this rank's share of {share} "
            f"(global_batch_size {batch} / {world_size} ranks)"
        )
    group = execution.bn_group_images(config.parallel, batch)
    if images < share and group > images:
        raise ConfigError(
            f"micro_batch_size: {images} splits batch norm's groups of {group} images, which "
            f"cannot be accumulated exactly; set micro_batch_size={share}, or "
            f"parallel.bn_group_images={images}, which departs from the recipe's "
            f"{config.parallel.bn_group_images}"
        )


def configured_micro_batch_size(config: RunConfig, world_size: int) -> int | None:
    """Return the images per forward pass on one rank, or None for `auto`.

    Raises:
        ConfigError: If `micro_batch_size` is neither a number nor auto.
    """
    value = str(config.micro_batch_size)
    if value == "auto":
        return None
    if not value.lstrip("-").isdecimal():
        raise ConfigError(
            f"micro_batch_size: {value!r}; "
            "choose a number of images, 0 for a rank's whole share, or auto"
        )
    return int(value) or config.global_batch_size // world_size


def method_on_meta(config: RunConfig) -> Method:
    """Build the run's method on the meta device, where its weights take no memory."""
    image_size = recipe.expand_counts(config.views)[0].size
    with torch.device("meta"):
        return config.method.build(backbones.on_meta(config.backbone, image_size))


def _try_method(config: RunConfig) -> None:
    """Run the method's forward pass on the meta device.

    Raises:
        ValueError: If the method needs other views or more images, or cannot run on the backbone.
    """
    backbone = dataclasses.replace(config.backbone, init="random")
    group = execution.bn_group_images(config.parallel, config.global_batch_size)
    sizes = [crop.size for crop in recipe.expand_counts(config.views)]
    num_images = min(2, group)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        method = method_on_meta(dataclasses.replace(config, backbone=backbone))
        if method.couples != "nothing" and config.global_batch_size < 2:
            raise ValueError(
                f"global_batch_size: {config.global_batch_size} leaves {config.method.name} "
                "no other image to compare with; give 2 or more"
            )
        with torch.device("meta"):
            numbers = torch.zeros(num_images, dtype=torch.int64)
            images = [torch.zeros(num_images, 3, size, size) for size in sizes]
            try:
                method(Batch(images, numbers, numbers))
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                if not timm_networks.lacks_meta(error):
                    raise _forward_problem(config, error, sizes) from None


def _forward_problem(config: RunConfig, error: Exception, sizes: list[int]) -> ValueError:
    """Return an error that names the keys, for an error of the method's forward pass."""
    if "more than 1 value per channel" in str(error):
        return ValueError(
            "parallel.bn_group_images: batch norm cannot take its statistics from one image of "
            "one position; give groups and a global_batch_size "
            f"({config.global_batch_size}) of 2 images or more"
        )
    if isinstance(error, ValueError):
        return error
    return ValueError(
        f"method.name: {config.method.name} cannot run on backbone.name {config.backbone.name} "
        f"with views of {', '.join(map(str, sizes))} pixels: {str(error).splitlines()[0]}"
    )


def check_slurm_keys(
    config: RunConfig, overrides: Sequence[str], reason: str, remedy: str, *, overrides_only: bool
) -> None:
    """Refuse the keys that only a submission to SLURM uses. Call it if nothing is submitted.

    Args:
        config: The configuration.
        overrides: The `key=value` arguments of the command line.
        reason: Reason why nothing is submitted, for the message.
        remedy: Remedy, for the message.
        overrides_only: Refuse the keys on the command line only, because a YAML that was written
            for a cluster may have them.

    Raises:
        ConfigError: If such a key is not at its default. The message names each key and its value.
    """
    default, override_keys = LaunchConfig(), {text.partition("=")[0] for text in overrides}
    changes = [
        f"launch.{key}: {value}"
        for key in SLURM_KEYS
        if (value := getattr(config.launch, key)) != getattr(default, key)
        and (f"launch.{key}" in override_keys or not overrides_only)
    ]
    if changes:
        verb = "this is" if len(changes) == 1 else "these are"
        raise ConfigError(f"{', '.join(changes)}: {verb} for SLURM, and {reason}; {remedy}")
