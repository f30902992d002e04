"""What a view is: the recipe of each kind of crop, as the YAML says it under `views`.

Covers the views of SimCLR (arXiv:2002.05709), BYOL (arXiv:2006.07733), SwAV's multi-crop
(arXiv:2006.09882) and DINO (arXiv:2104.14294). Each view is drawn in this order: crop,
flip, jitter, grayscale, blur, solarize.

The defaults are torchvision's functions. SimCLR and BYOL were written for TensorFlow and JAX,
whose functions of the same names differ. Their recipes set saturation_mode: hsv,
contrast_mean: channel, blur_border: zero, antialias: false and their own crop_sampler.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

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
    """One kind of view, named under `views.crops`; `flip` to `solarize` without a suffix are probabilities."""

    count: int = 2  # views of this kind per image
    size: int = 224  # pixels, height and width
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # of the image's area
    ratio: list[float] = field(
        default_factory=lambda: [0.75, 1.3333333333333333]
    )  # width / height before resizing
    crop_sampler: CropSampler = (
        "torchvision"  # tensorflow: SimCLR's; clipped: BYOL's (views/crops.py)
    )
    interpolation: Interpolation = "bilinear"
    antialias: bool = (
        True  # false: a shrunken crop is sampled without a low-pass filter, as by tf.image.resize
    )
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.0  # factors are uniform in [max(0, 1 - x), 1 + x]
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # shift, uniform in [-x, x] turns of the colour circle
    brightness_mode: BrightnessMode = (
        "multiply"  # add: pixel + uniform[-x, x], of SimCLR v1 and BYOL
    )
    contrast_mean: ContrastMean = (
        "gray"  # channel: each channel keeps its own mean, as by tf.image.adjust_contrast
    )
    saturation_mode: SaturationMode = (
        "blend"  # hsv: scale S at constant hue and value, as tf.image.adjust_saturation
    )
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])  # pixels
    blur_kernel: int = 0  # pixels; 0: size // 10 made odd, at least 3 (SimCLR: 224 -> 23)
    blur_border: BlurBorder = "reflect"  # zero: black around the view, TensorFlow's SAME padding
    solarize: float = 0.0
    solarize_threshold: float = 0.5  # pixels in [0, 1] from here up are inverted


@dataclass
class ViewsConfig:
    crops: dict[str, Crop] = field(default_factory=dict)  # global ones first
    mean: list[float] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )  # SimCLR feeds pixels in [0, 1]
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])


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
