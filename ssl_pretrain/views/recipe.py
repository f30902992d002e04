"""What a view is: the recipe of each kind of crop, as the YAML says it under `views`.

Covers the views of SimCLR (arXiv:2002.05709), BYOL (arXiv:2006.07733), SwAV's multi-crop
(arXiv:2006.09882) and DINO (arXiv:2104.14294). Each view is drawn in this order: crop,
flip, jitter, grayscale, blur, solarize.

The defaults are torchvision's functions. SimCLR and BYOL were written for TensorFlow and JAX,
whose functions of the same names differ. Their recipes set saturation_mode: hsv,
contrast_mean: channel, blur_border: zero, antialias: false and their own crop_sampler.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from ssl_pretrain.schema import setting

Interpolation = Literal["bilinear", "bicubic"]
BrightnessMode = Literal["multiply", "add"]
SaturationMode = Literal["blend", "hsv"]
ContrastMean = Literal["gray", "channel"]
BlurBorder = Literal["reflect", "zero"]
CropSampler = Literal["torchvision", "tensorflow", "clipped"]


LARGEST = {"count": 1000, "size": 10000}  # views of an image; pixels
CHOICES = {
    "crop_sampler": get_args(CropSampler),
    "interpolation": get_args(Interpolation),
    "brightness_mode": get_args(BrightnessMode),
    "contrast_mean": get_args(ContrastMean),
    "saturation_mode": get_args(SaturationMode),
    "blur_border": get_args(BlurBorder),
}


@dataclass
class Crop:
    """One kind of view, named under `views.crops`."""

    count: int = setting(2, "Views of this kind per image.")
    size: int = setting(224, "Height and width of the view in pixels.")
    scale: list[float] = setting(
        [0.08, 1.0], "[low, high] of the crop's share of the image's area."
    )
    ratio: list[float] = setting(
        [0.75, 1.3333333333333333], "[low, high] of the crop's width / height before resizing."
    )
    crop_sampler: CropSampler = setting(
        "torchvision",
        "How a crop's box is drawn: as by torchvision, as by tensorflow (SimCLR), "
        "or clipped to the image (BYOL).",
    )
    interpolation: Interpolation = setting("bilinear", "Interpolation when the crop is resized.")
    antialias: bool = setting(
        True,
        "Filter a crop that is shrunk. "
        "false: sample it without a low-pass filter, as by tf.image.resize.",
    )
    flip: float = setting(0.5, "Probability of a horizontal flip.")
    jitter: float = setting(0.0, "Probability of the color jitter.")
    brightness: float = setting(
        0.0, "Strength x of the brightness jitter: factors are uniform in [max(0, 1 - x), 1 + x]."
    )
    contrast: float = setting(0.0, "Strength of the contrast jitter.")
    saturation: float = setting(0.0, "Strength of the saturation jitter.")
    hue: float = setting(
        0.0, "Strength x of the hue jitter: shifts are uniform in [-x, x] turns of the color wheel."
    )
    brightness_mode: BrightnessMode = setting(
        "multiply",
        "multiply: scale the pixels. add: add uniform[-x, x] to them, as in SimCLR v1 and BYOL.",
    )
    contrast_mean: ContrastMean = setting(
        "gray",
        "Mean that the contrast jitter keeps. "
        "channel: each channel's own, as in tf.image.adjust_contrast.",
    )
    saturation_mode: SaturationMode = setting(
        "blend",
        "blend: mix with the gray image. "
        "hsv: scale S at constant hue and value, as in tf.image.adjust_saturation.",
    )
    grayscale: float = setting(0.0, "Probability of a conversion to gray.")
    blur: float = setting(0.0, "Probability of a Gaussian blur.")
    blur_sigma: list[float] = setting([0.1, 2.0], "[low, high] of the blur's deviation in pixels.")
    blur_kernel: int = setting(
        0,
        "Size of the blur's kernel in pixels. "
        "0: size // 10 made odd, at least 3 (SimCLR: 23 for 224 pixels).",
    )
    blur_border: BlurBorder = setting(
        "reflect",
        "Pixels beyond the border of the view. zero: black, as with TensorFlow's SAME padding.",
    )
    solarize: float = setting(0.0, "Probability of solarization.")
    solarize_threshold: float = setting(
        0.5, "Pixels from this value in [0, 1] upward are inverted by solarization."
    )


@dataclass
class ViewsConfig:
    """Crops and augmentations."""

    crops: dict[str, Crop] = setting({}, "Kinds of views by name, global ones first.")
    mean: list[float] = setting(
        [0.0, 0.0, 0.0],
        "Mean subtracted from each color channel. SimCLR takes pixels in [0, 1] as they are.",
    )
    std: list[float] = setting([1.0, 1.0, 1.0], "Divisor of each color channel.")


def expand_counts(views: ViewsConfig) -> list[Crop]:
    """The recipe of every view, counts expanded, in YAML order; the place in the list is the view's number."""
    return [crop for crop in views.crops.values() for _ in range(crop.count)]


def blur_taps(crop: Crop) -> int:
    """Width of the blur's kernel in pixels, odd: `blur_kernel`, or from the size as SimCLR does."""
    return crop.blur_kernel or max(3, (crop.size // 10) | 1)


def check(views: ViewsConfig) -> None:
    """Nothing, if every view can be drawn.

    Raises:
        ValueError: the first bad key, with its value and what is allowed.
    """
    if not views.crops:
        raise ValueError(
            "views.crops: no crop is named; name at least one, as in views.crops.global.size=224"
        )
    for name, crop in views.crops.items():
        _check_crop(f"views.crops.{name}", crop)
    _check_order(views.crops)
    for key, values in (("mean", views.mean), ("std", views.std)):
        if len(values) != 3:
            raise ValueError(
                f"views.{key}: {values} has {len(values)} numbers; give 3, one each for red, green and blue"
            )
    if not all(value > 0 for value in views.std):
        raise ValueError(f"views.std: {views.std} divides the pixels; give 3 numbers > 0")


def _check_crop(key: str, crop: Crop) -> None:
    for name in ("count", "size"):
        if getattr(crop, name) < 1:
            raise ValueError(
                f"{key}.{name}: {getattr(crop, name)} is too small; give a whole number >= 1"
            )
        if getattr(crop, name) > LARGEST[name]:
            raise ValueError(
                f"{key}.{name}: {getattr(crop, name)} is too large; give a whole number <= {LARGEST[name]}"
            )
    _check_range(f"{key}.scale", crop.scale, highest=1.0)
    _check_range(f"{key}.ratio", crop.ratio)
    _check_range(f"{key}.blur_sigma", crop.blur_sigma)
    for name, choices in CHOICES.items():
        if getattr(crop, name) not in choices:
            raise ValueError(
                f"{key}.{name}: {getattr(crop, name)!r} is not known; choose one of: {', '.join(choices)}"
            )
    for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
        if not 0 <= getattr(crop, name) <= 1:
            raise ValueError(
                f"{key}.{name}: {getattr(crop, name)} is not a probability; give a number in [0, 1]"
            )
    for name, highest in (
        ("brightness", float("inf")),
        ("contrast", float("inf")),
        ("saturation", float("inf")),
        ("hue", 0.5),
    ):
        if not 0 <= getattr(crop, name) <= highest:
            allowed = f"in [0, {highest}]" if highest < float("inf") else ">= 0"
            raise ValueError(
                f"{key}.{name}: {getattr(crop, name)} is out of range; give a number {allowed}"
            )
    if crop.jitter and not (crop.brightness or crop.contrast or crop.saturation or crop.hue):
        raise ValueError(
            f"{key}.jitter: {crop.jitter} changes nothing, as brightness, contrast, saturation and hue are all 0;"
            " set one of them, or jitter to 0"
        )
    if not 0 <= crop.solarize_threshold <= 1:
        raise ValueError(
            f"{key}.solarize_threshold: {crop.solarize_threshold} is out of range; pixels are in [0, 1]"
        )
    _check_blur(key, crop)


def _check_range(key: str, values: list[float], highest: float = float("inf")) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= highest:
        bound = f" <= {highest:g}" if highest < float("inf") else ""
        raise ValueError(
            f"{key}: {values} is not a range; give [low, high] with 0 < low <= high{bound}"
        )


def _check_blur(key: str, crop: Crop) -> None:
    if crop.blur_kernel and (crop.blur_kernel < 3 or crop.blur_kernel % 2 == 0):
        raise ValueError(
            f"{key}.blur_kernel: {crop.blur_kernel} has no middle pixel; give an odd number >= 3, or 0 for size // 10"
        )
    largest = 2 * crop.size - 1  # reflection pads by half the kernel, less than the image itself
    if crop.blur and crop.blur_border == "reflect" and blur_taps(crop) > largest:
        remedy = f"give at most {largest}" if largest >= 3 else "set blur to 0"
        raise ValueError(
            f"{key}.blur_kernel: {blur_taps(crop)} is too wide to reflect an image of size {crop.size}; {remedy}"
        )


def _check_order(crops: dict[str, Crop]) -> None:
    for (before, larger), (name, crop) in pairwise(crops.items()):
        if crop.size > larger.size:
            raise ValueError(
                f"views.crops.{name}.size: {crop.size} comes after {before} of size {larger.size};"
                " name the crops from the largest to the smallest, as methods take the first ones for the global views"
            )
