"""Compute a feature of images, batch by batch: the arithmetic of `embed` everywhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain.data import readers
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.replacement import Replacement, ReplacementLimit
from ssl_pretrain.eval.frozen import named_features
from ssl_pretrain.eval.frozen.patch_tokens import PATCHES, TokenSequence
from ssl_pretrain.eval.image_transform import ImageTransform
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.schema.image_sizes import height_and_width
from ssl_pretrain.views.batch import upload

ADVICE = f"{named_features.ADVICE}; or patches, one vector per patch"


@dataclass(frozen=True)
class FeatureBatch:
    """Features of some images.

    Attributes:
        features: float32 (n, dim), or (n, patches, dim). The row of an unreadable image is NaN.
        unreadable: Index of each unreadable image of the batch in the source, and the reason.
    """

    features: Tensor
    unreadable: dict[int, str]


class FeatureExtractor:
    """A feature of a network, as a function of cropped images.

    Args:
        backbone: Network that maps normalized images to features.
        transform: Transform of the images.
        feature: Name of the feature: those of `named_features`, or "patches".
        parallel: Settings of the computation. Only the precision is used.

    Raises:
        ValueError: If there is no such feature, or the network does not have it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: ImageTransform,
        feature: str = named_features.POOLED,
        parallel: ParallelConfig | None = None,
    ):
        self.transform, self.feature = transform, feature
        self.device = next(backbone.parameters()).device
        self.execution = Execution.resolve(
            parallel or ParallelConfig(precision="float32"), self.device
        )
        self._compute = _feature_function(backbone, feature)

    @property
    def precision(self) -> str:
        """Number format of the forward pass, as an entry of the metadata."""
        return "bfloat16 autocast" if self.execution.autocast else "float32"

    def describe_shape(self) -> tuple[int, ...]:
        """Return the shape of one image's feature, from a forward pass of a black image."""
        channels = self.transform.pixel_format.num_channels
        pixels = torch.zeros(1, channels, *height_and_width(self.transform.size), dtype=torch.uint8)
        return tuple(self(pixels).shape[1:])

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the features, float32 on the CPU, of cropped images, uint8 (n, C, h, w)."""
        views = self.transform.normalize(upload(pixels, self.device))
        with self.execution.forward_context():
            return self._compute(views).float().cpu()

    def extract(
        self,
        source: Source,
        indices: np.ndarray | None = None,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        limit: ReplacementLimit | None = None,
    ) -> Iterator[FeatureBatch]:
        """Yield the features of images in order.

        Args:
            source: The images.
            indices: Indices of the images, or None for all.
            batch_size: Images per forward pass.
            num_workers: Processes that read the images.
            limit: Limit on the unreadable images, or None for that of these images alone.

        Raises:
            ValueError: If more images are unreadable, or the source has no image.
        """
        if not len(source):
            raise ValueError(f"{source.full_path}: contains no image; give images")
        order = np.arange(len(source)) if indices is None else indices
        unreadable: dict[int, str] = {}

        def record(replacements: Sequence[Replacement]) -> None:
            unreadable.update({item.unreadable_index: item.read_error for item in replacements})

        start = 0
        for pixels, _ in readers.read_images(
            source,
            order,
            self.transform.crop,
            batch_size,
            num_workers,
            report_replaced=record,
            limit=limit,
        ):
            features = self(pixels)
            batch_indices = order[start : start + len(features)]
            start += len(features)
            batch_unreadable = {}
            for row, index in enumerate(batch_indices.tolist()):
                if index in unreadable:
                    features[row] = torch.nan
                    batch_unreadable[index] = unreadable[index]
            yield FeatureBatch(features, batch_unreadable)


def check_feature(name: str) -> str:
    """Return `name` if it is the name of a feature.

    Raises:
        ValueError: If it is not.
    """
    if name != PATCHES and not named_features.NAME.fullmatch(name):
        raise ValueError(f"--feature {name}: is not a feature; {ADVICE}")
    return name


def _feature_function(backbone: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    check_feature(name)
    if name != named_features.POOLED and not hasattr(backbone, "find_token_problem"):
        raise ValueError(
            f"--feature {name}: {type(backbone).__name__} has no tokens; give --feature pooled"
        )
    if name == PATCHES:
        network: Any = backbone
        named_features.check_tokens_supported(network, name, "give --feature pooled")
        return TokenSequence(backbone)
    return named_features.network_of_feature(backbone, name)
