"""Rebuild the whole method of a run, with its heads and its text encoder."""

from dataclasses import replace
from typing import Any

import torch

from ssl_pretrain import config, rng
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.eval.trained_run import TrainedRun
from ssl_pretrain.models import backbones, text_encoders
from ssl_pretrain.models.timm_networks import BackboneConfig


def without_weights(backbone_config: BackboneConfig) -> BackboneConfig:
    """Return the configuration of the same network with random weights."""
    return replace(backbone_config, init="random", init_key="", init_prefix="")


def build_method(run: TrainedRun, is_pretrained: bool, backbone_config: BackboneConfig) -> Any:
    """Build the method of a run on the CPU, by the run's seed.

    A text encoder starts with random weights, so that none are downloaded.

    Args:
        run: The run.
        is_pretrained: True to load the weights of the checkpoint.
        backbone_config: The run's backbone, with the weights that it starts from. It is not used if
            the method takes no images.

    Raises:
        ValueError: If the checkpoint is damaged, or its weights do not fit the configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(run.config.seed, 0, 0))  # as the trainer derives it
        method = config.assemble_method(
            run.config,
            lambda _, image_size: backbones.build(backbone_config, image_size),
            text_encoders.build_random,
        )
    if is_pretrained:
        _, tensors = read_checkpoint(run.checkpoint_path)
        backbones.load_strict(method, tensors, str(run.checkpoint_path), exact=True)
    return method
