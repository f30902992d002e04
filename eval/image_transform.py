"""The transform that turns an image into the input of a pretrained backbone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.data.config import pixel_format
from ssl_pretrain.data.image_values import to_pixels
from ssl_pretrain.data.pixels import RGB, PixelFormat
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema.image_sizes import ImageSize
from ssl_pretrain.views import color, crops
from ssl_pretrain.views.recipe import Interpolation


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop and normalize an image, as the evaluations of its run do.

    Calling it maps an image to a float32 tensor (channels, height, width). The image is a PIL
    image, a path, an array (height, width, channels) or a tensor (channels, height, width).

    Attributes:
        size: Side of the square result in pixels, or its height and width.
        crop_ratio: Side of the central crop as a share of the resized side that it covers.
        interpolation: Interpolation of the resize.
        mean: Mean that is subtracted from each channel, for pixels in [0, 1].
        std: Divisor of each channel.
        pixel_format: Number of channels of the images, and the range of wide values.
    """

    size: ImageSize
    crop_ratio: float
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_format: PixelFormat = RGB

    @classmethod
    def of_run(cls, run: Run) -> "ImageTransform":
        """Return the transform of a run's evaluations."""
        evaluation, views = run.config.evaluation, run.config.views
        return cls(
            run.image_size,
            evaluation.crop_ratio,
            evaluation.interpolation,
            tuple(views.mean),
            tuple(views.std),
            pixel_format(run.config.data),
        )

    def __call__(self, image: Any) -> Tensor:
        """Return the input of the backbone, float32 (channels, height, width).

        Raises:
            ValueError: If the object is not an image.
        """
        pixels = torch.from_numpy(to_pixels(image, "the image", self.pixel_format)).permute(2, 0, 1)
        return self.normalize(self.crop(pixels)[None])[0]

    def crop(self, pixels: Tensor) -> Tensor:
        """Resize and crop an image, uint8 (channels, height, width), to the same layout."""
        return crops.evaluation_view(pixels, self.size, self.crop_ratio, self.interpolation)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize cropped images, uint8 (n, channels, height, width), to float32."""
        return color.normalize(pixels, list(self.mean), list(self.std))
