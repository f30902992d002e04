"""Open a network to embed images with: a run, an export, a file of weights, or `timm:TAG`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import ssl_pretrain
from ssl_pretrain import config
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import source_report, sources
from ssl_pretrain.data.config import DataConfig, locate
from ssl_pretrain.data.file_dataset import SplitName
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.pixels import PixelFormat
from ssl_pretrain.eval import runs
from ssl_pretrain.eval.embedding.feature_batches import FeatureExtractor
from ssl_pretrain.eval.embedding.weights_digest import digest_of_network
from ssl_pretrain.eval.image_transform import ImageTransform
from ssl_pretrain.parallel.execution import ParallelConfig
from ssl_pretrain.schema import NON_NEGATIVE_INT, POSITIVE_INT
from ssl_pretrain.schema.argument_parser import ArgumentParser


@dataclass(frozen=True)
class EmbeddingNetwork:
    """A network in evaluation mode, and what the vectors that it computes depend on.

    Attributes:
        backbone: The network.
        transform: Transform of its images.
        parallel: Settings of the computation, of which the precision matters.
        origin: Where the weights come from, for people: name, path, and step of a run.
    """

    backbone: nn.Module
    transform: ImageTransform
    parallel: ParallelConfig
    origin: dict[str, Any]

    def extractor(self, feature: str) -> FeatureExtractor:
        """Return a feature of the network, as a function of images."""
        return FeatureExtractor(self.backbone, self.transform, feature, self.parallel)

    def provenance(self, feature: str) -> dict[str, Any]:
        """Return the entries of a file that identify the network, its weights and its input."""
        return {
            **self.origin,
            "weights_sha256": digest_of_network(self.backbone),
            "feature": feature,
            "transform": describe_transform(self.transform),
            "precision": self.extractor(feature).precision,
            "ssl_pretrain": ssl_pretrain.__version__,
        }


def open_network(
    network: str | Path, overrides: Sequence[str] = (), device: str = "auto"
) -> EmbeddingNetwork:
    """Open a run, an export, a file of weights, or weights that timm publishes.

    Args:
        network: Folder of a run or of an export, a file of weights, or `timm:TAG`.
        overrides: key=value settings. A file of weights needs backbone.name. Of `data`, only the
            channels and the range matter.
        device: A torch device, or auto for cuda if it is available and cpu otherwise.

    Raises:
        ValueError: If there is no such network, or the weights do not fit it.
    """
    used = [text for text in overrides if not text.startswith("data.") or _is_format(text)]
    run = runs.load_run(network, None, used, device, is_evaluated=False)
    origin = {
        "network": run.config.backbone.name,
        "origin": str(run.checkpoint_path),
        "step": run.step,
    }
    return EmbeddingNetwork(run.backbone, ImageTransform.of_run(run), run.config.parallel, origin)


def open_images(
    images: str | Path,
    pixel_format: PixelFormat,
    overrides: Sequence[str] = (),
    split: SplitName = "train",
) -> tuple[Source, DataConfig]:
    """Open images by a path, in the channels that a network takes.

    Args:
        images: Anything that `data.root` takes, or digits or cifar10 if there is no such path.
        pixel_format: Channels and range of the images.
        overrides: key=value settings, of which those of `data` are used.
        split: Split of a data set that has several. Folders without splits are all "train".

    Returns:
        The images, and the settings with which they were opened.

    Raises:
        ValueError: If they are no images, or most have other channels (`WrongChannels`).
    """
    data = DataConfig(
        **locate(images),
        channels=pixel_format.num_channels,
        range=list(pixel_format.value_range or ()),
    )
    data = _read_overrides(data, [text for text in overrides if text.startswith("data.")]).data
    source = sources.open_source(data, split)
    source_report.check_images(source)
    return source, data


def add_options(parser: ArgumentParser) -> None:
    """Add the options that say where and how features are computed."""
    add = parser.add_argument
    add("--device", default="auto", help="cpu or cuda (default: cuda where available)")
    add("--batch-size", type=POSITIVE_INT, default=64, help="images per forward pass (default: 64)")
    add(
        "--num-workers",
        type=NON_NEGATIVE_INT,
        default=0,
        help="processes that read the images (default: 0, which reads in this process)",
    )


def describe_transform(transform: ImageTransform) -> dict[str, Any]:
    """Return a transform as plain values that survive JSON."""
    values = asdict(transform)
    del values["pixel_format"]
    return {
        **{
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        },
        "channels": transform.pixel_format.num_channels,
        "range": list(transform.pixel_format.value_range or ()),
    }


def _is_format(override: str) -> bool:
    return override.partition("=")[0] in ("data.channels", "data.range")


def _read_overrides(data: DataConfig, overrides: Sequence[str]) -> RunConfig:
    """Return a configuration that consists of defaults, `data` and the overrides."""
    tree = {"method": {"name": config.NO_METHOD}, "data": asdict(data)}
    return config.from_dict(
        config.apply_overrides(tree, list(overrides), "the command line"), "the command line"
    )
