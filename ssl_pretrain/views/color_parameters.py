"""Draw random color parameters, which depend only on seed, epoch, image and view."""

from dataclasses import dataclass

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose
from ssl_pretrain.views.crops import Box
from ssl_pretrain.views.recipe import Crop

# Operations of the color jitter, numbered as in torchvision.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
OPERATIONS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class ColorParameters:
    """Random color parameters of one view of n images, one row per image.

    Attributes:
        is_jittered: bool (n,), True for images with color jitter.
        jitter_order: int64 (n, 4), operations of the jitter in the order of their application.
        jitter_factors: float32 (n, 4), the factors of brightness, contrast and saturation and the
            shift of the hue. If the recipe adds brightness, its entry is the number to add.
        is_gray: bool (n,), True for images turned gray.
        is_blurred: bool (n,), True for blurred images.
        blur_sigma: float32 (n,), standard deviation of the blur in pixels.
        is_solarized: bool (n,), True for solarized images.
    """

    is_jittered: np.ndarray
    jitter_order: np.ndarray
    jitter_factors: np.ndarray
    is_gray: np.ndarray
    is_blurred: np.ndarray
    blur_sigma: np.ndarray
    is_solarized: np.ndarray


def draw_colors(
    crop: Crop, seed: int, epoch: int, indices: np.ndarray, view: int
) -> ColorParameters:
    """Draw the parameters of one view of n images from the same ranges as torchvision.

    Args:
        crop: Recipe of the view.
        seed: Seed of the run.
        epoch: Number of completed passes over the data.
        indices: Indices of the images in the data set, integers of shape (n,).
        view: Index of the view, in the order of `recipe.crop_per_view`.
    """

    def uniform(purpose: Purpose, count: int) -> np.ndarray:
        return rng.uniform(seed, epoch, indices, view, purpose, count)

    strengths = jitter_strengths(crop)
    low, high = np.maximum(0.0, 1.0 - strengths), 1.0 + strengths
    low[HUE], high[HUE] = -crop.hue, crop.hue
    if crop.brightness_mode == "add":
        low[BRIGHTNESS], high[BRIGHTNESS] = -crop.brightness, crop.brightness
    low_sigma, high_sigma = crop.blur_sigma

    jitter, blur = uniform(Purpose.JITTER, 5), uniform(Purpose.BLUR, 2)
    return ColorParameters(
        is_jittered=jitter[:, 0] < crop.jitter,
        jitter_order=np.argsort(uniform(Purpose.JITTER_ORDER, 4), axis=1, kind="stable"),
        jitter_factors=(low + (high - low) * jitter[:, 1:]).astype(np.float32),
        is_gray=uniform(Purpose.GRAYSCALE, 1)[:, 0] < crop.grayscale,
        is_blurred=blur[:, 0] < crop.blur,
        blur_sigma=(low_sigma + (high_sigma - low_sigma) * blur[:, 1]).astype(np.float32),
        is_solarized=uniform(Purpose.SOLARIZE, 1)[:, 0] < crop.solarize,
    )


def jitter_strengths(crop: Crop) -> np.ndarray:
    """Return the strength of each operation of the jitter, shape (4,). It is 0 if unused."""
    return np.array([crop.brightness, crop.contrast, crop.saturation, crop.hue])


def describe_view(crop: Crop, box: Box, parameters: ColorParameters, row: int) -> str:
    """Describe the random choices for the view in one row, in the order of the operations."""
    words = [f"{box.width}x{box.height} pixels at ({box.left}, {box.top})"]
    if box.flip:
        words.append("flipped")
    if parameters.is_jittered[row]:
        modes = (
            " added" if crop.brightness_mode == "add" else "",
            " by channel" if crop.contrast_mean == "channel" else "",
            " in HSV" if crop.saturation_mode == "hsv" else "",
            "",
        )
        factors = parameters.jitter_factors[row]
        words += [
            f"{OPERATIONS[operation]} {factors[operation]:.2f}{modes[operation]}"
            for operation in parameters.jitter_order[row].tolist()
            if jitter_strengths(crop)[operation] > 0
        ]
    if parameters.is_gray[row]:
        words.append("gray")
    if parameters.is_blurred[row]:
        border = ", black outside" if crop.blur_border == "zero" else ""
        words.append(f"blur sigma {parameters.blur_sigma[row]:.2f}{border}")
    if parameters.is_solarized[row]:
        words.append("solarized")
    return ", ".join(words)
