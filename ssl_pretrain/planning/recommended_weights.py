"""Recommend published weights for a suggested configuration with few photos."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssl_pretrain.models import custom_network, timm_networks
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.planning.suggested_settings import Suggestion

MIN_IMAGES_FROM_SCRATCH = 2000  # for fewer photos, published weights are recommended


def recommend(result: Suggestion, num_images: int) -> None:
    """Name published weights of the network if there are few photos and the weights fit it."""
    name = result.get("backbone.name", "resnet50")
    if num_images >= MIN_IMAGES_FROM_SCRATCH or custom_network.is_custom(name):
        return
    published = timm_networks.pretrained_cfg(name)
    if not published.has_weights or result.get("method.vit_starts", "as_built") != "as_built":
        return
    args = result.get("backbone.args", {})
    if args and not _has_equal_shapes(name, args):
        return
    weights = f"backbone.init=timm:{published.tag}"
    if result.get("backbone.stem") == "small":
        weights += " backbone.stem=no_pool"
    reason = (
        f"with fewer than {MIN_IMAGES_FROM_SCRATCH:,} photos, published weights usually serve "
        f"better: {weights}"
    )
    result.set("backbone.init", "random", reason)


def _has_equal_shapes(name: str, args: Mapping[str, Any]) -> bool:
    """Return True if a network with these arguments has the tensors of timm's own.

    Patch embeddings and positions may differ, because timm resamples them.
    """
    size = timm_networks.native_size(name)
    networks = [
        timm_networks.create_on_meta(partial(timm_networks.create, config, size))
        for config in (BackboneConfig(name), BackboneConfig(name, args=dict(args)))
    ]
    own, changed = (
        {
            key: tensor.shape
            for key, tensor in network.state_dict().items()
            if key != "pos_embed" and not key.startswith("patch_embed.")
        }
        for network in networks
    )
    return own == changed
