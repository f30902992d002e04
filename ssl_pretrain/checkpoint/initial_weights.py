"""Load the initial weights of a backbone from a run or a file."""

from pathlib import Path

from torch import Tensor, nn

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.manifest import MANIFEST_FILE
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.models import backbones, published_channels, timm_networks, weights_file
from ssl_pretrain.models.timm_networks import BackboneConfig

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def initialize(backbone: nn.Module, config: BackboneConfig) -> list[str]:
    """Load the weights that `backbone.init` names.

    Returns:
        Notes on weights that were omitted or converted.

    Raises:
        ValueError: If the weights cannot be read or do not fit this backbone.
    """
    weights, notes = read_initial_weights(config.init, config.init_key)
    if weights is None:  # loaded by timm, or random
        if config.init == "random":
            return []
        model = backbone.get_submodule("model")
        return [
            *timm_networks.describe_pretrained(config, model),
            *published_channels.describe(config, model),
        ]
    return notes + backbones.load_strict(
        backbone, weights, f"backbone.init: {config.init!r}", config.init_prefix
    )


def read_initial_weights(init: str, key: str = "") -> tuple[dict[str, Tensor] | None, list[str]]:
    """Read weights from a run, a .safetensors file or a torch file.

    Args:
        init: The value of `backbone.init`.
        key: The value of `backbone.init_key`, for torch files with several state dicts.

    Returns:
        The weights and notes on their conversion. The weights are None for `random` and
        `timm:<tag>`, because the backbone's constructor initializes these.

    Raises:
        ValueError: If the file or run does not exist or its format is unknown.
    """
    if init == "random" or init.startswith("timm:"):
        return None, []
    path = Path(init)
    if not init or not path.exists():
        raise ValueError(
            f"backbone.init: {init!r} does not exist; give random, timm:<tag>, a weights file or "
            "the folder of a run"
        )
    if not path.is_dir():
        return weights_file.read_weights(path, f"backbone.init: {init!r}", key)
    is_checkpoint = (path / MANIFEST_FILE).exists()
    weight_files = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if weight_files and not is_checkpoint:
        raise ValueError(
            f"backbone.init: {init!r} is a folder; give one of its files, such as "
            f"{path / weight_files[0]}"
        )
    return read_evaluated_weights(path if is_checkpoint else newest_checkpoint(path)), []


def read_evaluated_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint's evaluated network, keyed by backbone parameter name."""
    manifest, tensors = read_checkpoint(path)
    prefix = f"{manifest['evaluated']}."
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
