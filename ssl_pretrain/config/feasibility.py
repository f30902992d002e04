"""Check that the settings fit together and that the first step can run."""

import dataclasses

import torch

from ssl_pretrain import schema
from ssl_pretrain.config.method_assembly import assemble_method, takes_images, text_lengths
from ssl_pretrain.config.run_config import RunConfig
from ssl_pretrain.data import order, sources
from ssl_pretrain.data.config import TEXT_SOURCES
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones, image_size_check, text_encoders, timm_networks
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.monitoring import log_config
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.parallel import execution
from ssl_pretrain.schema import image_sizes
from ssl_pretrain.schema.config_file import ConfigError
from ssl_pretrain.views import masks, recipe, text_recipe
from ssl_pretrain.views.batch import Batch, blank_texts
from ssl_pretrain.views.recipe import Crop


def check(config: RunConfig, world_size: int) -> None:
    """Check that the settings fit together and that the first step can run on this many ranks.

    Raises:
        ConfigError: If a check fails.
    """
    try:
        schema.check(config)
        text_recipe.check(config.text)
        sources.check(config.data)
        if takes_images(config):
            _check_images(config)
        else:
            _check_no_images(config)
        execution.bn_group_images(config.parallel, config.global_batch_size)
        execution.check(config.parallel)
        optim.check(config.optim)
        optim.check_sharding(config.optim, config.parallel.strategy)
        log_config.check(config.log)
        config.method.check(config, world_size)
        _try_method(config)
        order.check_batch_divides(config.global_batch_size, world_size)
        _check_micro_batch(config, world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_images(config: RunConfig) -> None:
    """Raise ValueError if the data has no images, or the views or the backbone do not fit."""
    recipe.check(config.views)
    recipe.check_batch(config.views, config.global_batch_size)
    if config.data.source in TEXT_SOURCES:
        raise ConfigError(
            f"data.source: {config.data.source} has texts and no images, and method "
            f"{config.method.name} takes images; give a source of images, or set "
            "method.name=simcse"
        )
    sizes = {f"views.crops.{name}.size": crop.size for name, crop in config.views.crops.items()}
    if config.evaluation.image_size != 0:
        sizes["evaluation.image_size"] = config.evaluation.image_size
    image_size_check.check(config.backbone, sizes)


def _check_no_images(config: RunConfig) -> None:
    """Raise ValueError if there are settings of images, which a method of sentences would ignore.

    The images of a data set with captions are not read.
    """
    if config.views.crops:
        raise ConfigError(
            f"views.crops: {', '.join(config.views.crops)} would be ignored, because method "
            f"{config.method.name} takes texts and no images; leave the section views out"
        )
    default = BackboneConfig()
    for name in sorted(vars(default)):
        if (value := getattr(config.backbone, name)) != getattr(default, name):
            raise ConfigError(
                f"backbone.{name}: {value} would be ignored, because method {config.method.name} "
                "takes texts and no images; leave it out, and set text_encoder.* for its network"
            )
    if config.data.cache == "device" or config.data.loader in ("ffcv", "threads"):
        key = "cache" if config.data.cache == "device" else "loader"
        raise ConfigError(
            f"data.{key}: {getattr(config.data, key)} reads images, and method "
            f"{config.method.name} takes none; leave it out"
        )


def _check_micro_batch(config: RunConfig, world_size: int) -> None:
    global_batch_size = config.global_batch_size
    micro_batch_size = configured_micro_batch_size(config, world_size)
    images_per_rank = global_batch_size // world_size
    if micro_batch_size is None:
        return
    if micro_batch_size < 1 or images_per_rank % micro_batch_size:
        raise ConfigError(
            f"micro_batch_size: {micro_batch_size} does not divide this rank's share of "
            f"{images_per_rank} (global_batch_size {global_batch_size} / {world_size} ranks); give "
            f"a divisor of {images_per_rank}, 0 for the whole share, or auto"
        )
    group_size = execution.bn_group_images(config.parallel, global_batch_size)
    if micro_batch_size < images_per_rank and group_size > micro_batch_size:
        raise ConfigError(
            f"micro_batch_size: {micro_batch_size} splits batch norm's groups of {group_size} "
            f"images, which cannot be accumulated exactly; set micro_batch_size={images_per_rank}, "
            f"or parallel.bn_group_images={micro_batch_size}, which departs from the recipe's "
            f"{config.parallel.bn_group_images}"
        )


def configured_micro_batch_size(config: RunConfig, world_size: int) -> int | None:
    """Return the number of images per forward pass on one rank, or None for `auto`.

    Raises:
        ConfigError: If `micro_batch_size` is neither a number nor auto.
    """
    value = str(config.micro_batch_size)
    if value == "auto":
        return None
    if not value.lstrip("-").isdecimal():
        raise ConfigError(
            f"micro_batch_size: {value!r} is not a number of images; "
            "give a number, 0 for a rank's whole share, or auto"
        )
    return int(value) or config.global_batch_size // world_size


def build_method_on_meta(config: RunConfig) -> Method:
    """Build the run's method on the meta device, where its weights take no memory."""
    with torch.device("meta"):
        method = assemble_method(config, backbones.build_on_meta, text_encoders.build_on_meta)
    if not isinstance(method, Method):
        raise ValueError(
            f"method.name: Config.build of {config.method.name} returns a "
            f"{type(method).__name__}; return a ssl_pretrain.methods.base.Method"
        )
    return method


def _try_method(config: RunConfig) -> None:
    """Run the method's forward pass on the meta device.

    Raises:
        ValueError: If the method does not support the views, the batch size or the backbone.
    """
    backbone = dataclasses.replace(config.backbone, init="random")
    group_size = execution.bn_group_images(config.parallel, config.global_batch_size)
    view_crops = recipe.crop_per_view(config.views)
    num_images = min(2, group_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        method = build_method_on_meta(dataclasses.replace(config, backbone=backbone))
        _check_patch_sizes(config, method)
        if method.couples != "nothing" and config.global_batch_size < 2:
            noun = "image" if takes_images(config) else "text"
            raise ValueError(
                f"global_batch_size: {config.global_batch_size} leaves {config.method.name} "
                f"no other {noun} to compare with; give 2 or more"
            )
        optim.parameter_groups(config.optim, method)
        with torch.device("meta"):
            zeros = torch.zeros(num_images, dtype=torch.int64)  # in place of indices and labels
            channels = config.views.num_channels
            images = [
                torch.zeros(num_images, channels, crop.height, crop.width) for crop in view_crops
            ]
            batch = Batch(
                images,
                zeros,
                zeros,
                masks.blank(config.views, num_images, "meta"),
                blank_texts(text_lengths(config), num_images, "meta"),
            )
            try:
                _check_embeddings(config, method(batch), num_images)
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                if not timm_networks.is_meta_limitation(error):
                    raise _explain_forward_error(config, error, view_crops) from None


def _check_patch_sizes(config: RunConfig, method: Method) -> None:
    """Raise ValueError unless masks have the patches of the backbone."""
    for name, crop in config.views.crops.items():
        if crop.mask.kind == "none":
            continue
        patch_size = method.backbone.patch_size
        if crop.mask.patch_size != patch_size:
            raise ValueError(
                f"views.crops.{name}.mask.patch_size: {crop.mask.patch_size} is not the patch size "
                f"of backbone.name {config.backbone.name}; give {patch_size}"
            )


def _check_embeddings(config: RunConfig, embeddings: object, num_images: int) -> None:
    """Raise ValueError unless the method returns a dict of tensors with one row per image."""
    name = f"method.name: forward of {config.method.name} returns"
    if not isinstance(embeddings, dict) or not embeddings:
        raise ValueError(f"{name} a {type(embeddings).__name__}; return a dict of tensors by name")
    for key, value in embeddings.items():
        if not isinstance(value, torch.Tensor) or value.shape[:1] != (num_images,):
            kind = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(
                f"{name} {key!r} with {kind} for {num_images} images; return tensors with one row "
                "per image"
            )


def _explain_forward_error(
    config: RunConfig, error: Exception, view_crops: list[Crop]
) -> ValueError:
    """Return an error that names the keys behind an error of the method's forward pass."""
    if "more than 1 value per channel" in str(error):
        return ValueError(
            f"parallel.bn_group_images: {config.parallel.bn_group_images} with global_batch_size "
            f"{config.global_batch_size} leaves batch norm one value per channel, which has no "
            "variance; give groups and batches of 2 images or more"
        )
    if isinstance(error, ValueError):
        return error
    sizes = ", ".join(image_sizes.describe(crop.size) for crop in view_crops)
    return ValueError(
        f"method.name: {config.method.name} cannot run on backbone.name {config.backbone.name} "
        f"with views of {sizes} pixels: {str(error).splitlines()[0]}; "
        "give another method, backbone or size"
    )
