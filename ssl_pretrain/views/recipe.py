"""Recipe of each kind of view, as set in the section `views` of a configuration.

It covers the views of SimCLR (arXiv:2002.05709), BYOL (arXiv:2006.07733), SwAV's multi-crop
(arXiv:2006.09882) and DINO (arXiv:2104.14294). The operations of a view are applied in this order:
crop, flip, jitter, grayscale, blur, solarize.

The defaults are torchvision's functions. SimCLR and BYOL were written for TensorFlow and JAX, whose
functions of the same names compute different results. Their recipes therefore set saturation_mode:
hsv, contrast_mean: channel, blur_border: zero, antialias: false and a crop_sampler.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ssl_pretrain import schema
from ssl_pretrain.schema import DIMENSIONLESS, image_sizes, setting
from ssl_pretrain.views import mask_checks
from ssl_pretrain.views.mask_recipe import Mask

Interpolation = Literal["bilinear", "bicubic"]
CropSampler = Literal["torchvision", "tensorflow", "clipped"]
COLOR_OPERATIONS = ("saturation", "hue", "grayscale")  # need red, green and blue


@dataclass
class Crop:
    """One kind of view, whose name is its key in `views.crops`."""

    count: int = setting(2, "Views of this kind per image.", minimum=1, maximum=1000, unit="views")
    size: int | list[int] = setting(
        224,
        "Height and width of the view: one number for a square, or [height, width].",
        minimum=1,
        maximum=10_000,
        unit="pixels",
    )
    scale: list[float] = setting(
        [0.08, 1.0], "[low, high] of the crop's share of the image's area.", unit=DIMENSIONLESS
    )
    ratio: list[float] = setting(
        [0.75, 1.3333333333333333],
        "[low, high] of the crop's width / height before resizing to the view's size.",
    )
    crop_sampler: CropSampler = setting(
        "torchvision",
        "How a crop's box is drawn: as in torchvision, as in tensorflow (SimCLR), "
        "or clipped to the image (BYOL).",
    )
    interpolation: Interpolation = setting("bilinear", "Interpolation when the crop is resized.")
    antialias: bool = setting(
        True,
        "Filter a crop that is shrunk. "
        "false: sample it without a low-pass filter, as in tf.image.resize.",
    )
    flip: float = setting(0.5, "Probability of a horizontal flip.", maximum=1, unit=DIMENSIONLESS)
    jitter: float = setting(0.0, "Probability of the color jitter.", maximum=1, unit=DIMENSIONLESS)
    brightness: float = setting(
        0.0,
        "Strength x of the brightness jitter: factors are uniform in [max(0, 1 - x), 1 + x].",
        unit=DIMENSIONLESS,
    )
    contrast: float = setting(0.0, "Strength of the contrast jitter.", unit=DIMENSIONLESS)
    saturation: float = setting(0.0, "Strength of the saturation jitter.", unit=DIMENSIONLESS)
    hue: float = setting(
        0.0,
        "Strength x of the hue jitter: shifts are uniform in [-x, x].",
        maximum=0.5,
        unit="turns of the color wheel",
    )
    brightness_mode: Literal["multiply", "add"] = setting(
        "multiply",
        "multiply: scale the pixels. add: add uniform[-x, x] to them, as in SimCLR v1 and BYOL.",
    )
    contrast_mean: Literal["gray", "channel"] = setting(
        "gray",
        "Mean that the contrast jitter keeps. "
        "channel: each channel's own, as in tf.image.adjust_contrast.",
    )
    saturation_mode: Literal["blend", "hsv"] = setting(
        "blend",
        "blend: mix with the gray image. "
        "hsv: scale S at constant hue and value, as in tf.image.adjust_saturation.",
    )
    grayscale: float = setting(
        0.0, "Probability of a conversion to gray.", maximum=1, unit=DIMENSIONLESS
    )
    blur: float = setting(0.0, "Probability of a Gaussian blur.", maximum=1, unit=DIMENSIONLESS)
    blur_sigma: list[float] = setting(
        [0.1, 2.0], "[low, high] of the blur's standard deviation.", unit="pixels"
    )
    blur_kernel: int = setting(
        0,
        "Size of the blur's kernel. "
        "If it is 0, a tenth of the view's shorter side made odd, at least 3 "
        "(SimCLR: 23 for 224 pixels).",
        unit="pixels",
    )
    blur_border: Literal["reflect", "zero"] = setting(
        "reflect",
        "Pixels beyond the border of the view. zero: black, as with TensorFlow's SAME padding.",
    )
    solarize: float = setting(0.0, "Probability of solarization.", maximum=1, unit=DIMENSIONLESS)
    solarize_threshold: float = setting(
        0.5,
        "Solarization inverts pixels of at least this value in [0, 1].",
        maximum=1,
        unit=DIMENSIONLESS,
    )
    mask: Mask = setting(Mask(), "Masks of the view's patches, for methods that need them.")

    def __post_init__(self) -> None:
        self.size = image_sizes.simplify(self.size)

    @property
    def height(self) -> int:
        """Height of the view in pixels."""
        return image_sizes.height_and_width(self.size)[0]

    @property
    def width(self) -> int:
        """Width of the view in pixels."""
        return image_sizes.height_and_width(self.size)[1]

    @property
    def num_pixels(self) -> int:
        """Number of pixels of the view."""
        return image_sizes.area(self.size)


@dataclass
class ViewsConfig:
    """Crops and augmentations."""

    crops: dict[str, Crop] = setting({}, "Kinds of views by name, global ones first.")
    mean: list[float] = setting(
        [0.0, 0.0, 0.0],
        "Mean subtracted from each color channel. SimCLR does not normalize pixels in [0, 1].",
        unit=DIMENSIONLESS,
    )
    std: list[float] = setting(
        [1.0, 1.0, 1.0], "Divisor of each color channel.", above=0, unit=DIMENSIONLESS
    )

    @property
    def num_channels(self) -> int:
        """Number of channels of the views."""
        return len(self.mean)


def crop_per_view(views: ViewsConfig) -> list[Crop]:
    """Return the recipe of every view of an image, in the order of the YAML."""
    return [crop for crop in views.crops.values() for _ in range(crop.count)]


def enclosing_size(views: ViewsConfig) -> int | list[int]:
    """Return the smallest size that contains every view. Pictures of views have such tiles."""
    crops = views.crops.values()
    return image_sizes.simplify(
        [max(crop.height for crop in crops), max(crop.width for crop in crops)]
    )


def blur_taps(crop: Crop) -> int:
    """Return the width of the blur's kernel in pixels: `blur_kernel`, or SimCLR's if it is 0."""
    return crop.blur_kernel or max(3, (min(crop.height, crop.width) // 10) | 1)


def check(views: ViewsConfig) -> None:
    """Raise ValueError unless every view can be made."""
    if not views.crops:
        raise ValueError(
            "views.crops: no crop is named; name at least one, as in views.crops.global.size=224"
        )
    schema.check(views, "views")
    for name, crop in views.crops.items():
        image_sizes.check(f"views.crops.{name}.size", crop.size)
    for name, crop in views.crops.items():
        _check_crop(f"views.crops.{name}", crop)
    _check_order(views.crops)
    if len(views.mean) != len(views.std):
        raise ValueError(
            f"views.std: {views.std} must be {len(views.mean)} numbers, as views.mean is, one per "
            "channel of the images"
        )
    for name, crop in views.crops.items():
        _check_colors(f"views.crops.{name}", crop, views.num_channels)


def check_batch(views: ViewsConfig, global_batch_size: int) -> None:
    """Raise ValueError if the batch is so small that masks hide nothing."""
    for name, crop in views.crops.items():
        mask_checks.check_batch(
            f"views.crops.{name}.mask", crop.mask, crop.count, global_batch_size
        )


def _check_crop(key: str, crop: Crop) -> None:
    schema.check_choices(crop, key)
    schema.check_range(f"{key}.scale", crop.scale, highest=1.0)
    schema.check_range(f"{key}.ratio", crop.ratio)
    schema.check_range(f"{key}.blur_sigma", crop.blur_sigma)
    if crop.jitter and not (crop.brightness or crop.contrast or crop.saturation or crop.hue):
        raise ValueError(
            f"{key}.jitter: {crop.jitter} changes nothing, as brightness, contrast, saturation and "
            "hue are all 0; set one of them, or jitter to 0"
        )
    _check_blur(key, crop)
    mask_checks.check(f"{key}.mask", crop.mask, crop.size)


def _check_colors(key: str, crop: Crop, num_channels: int) -> None:
    for operation in COLOR_OPERATIONS:
        if num_channels != 3 and getattr(crop, operation):
            raise ValueError(
                f"{key}.{operation}: {getattr(crop, operation)} needs red, green and blue, and the "
                f"images have {num_channels} channels; set it to 0"
            )


def _check_blur(key: str, crop: Crop) -> None:
    if crop.blur_kernel and (crop.blur_kernel < 3 or crop.blur_kernel % 2 == 0):
        raise ValueError(
            f"{key}.blur_kernel: {crop.blur_kernel} has no middle pixel; give an odd number >= 3, "
            "or 0 for size // 10"
        )
    side = min(crop.height, crop.width)
    taps, max_taps = blur_taps(crop), 2 * side - 1  # because half a kernel is reflected
    if crop.blur and crop.blur_border == "reflect" and taps > max_taps:
        remedy = f"give at most {max_taps}" if max_taps >= 3 else "set blur to 0"
        raise ValueError(
            f"{key}.blur_kernel: {taps} is too wide to reflect an image of size "
            f"{image_sizes.describe(crop.size)}; {remedy}"
        )


def _check_order(crops: dict[str, Crop]) -> None:
    for (previous, larger), (name, crop) in pairwise(crops.items()):
        if crop.num_pixels > larger.num_pixels:
            raise ValueError(
                f"views.crops.{name}.size: {crop.size} comes after {previous} of size "
                f"{larger.size}; name the crops from the largest to the smallest, as methods take "
                "the first ones for the global views"
            )
