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
        jitter: bool (n,), True for images with color jitter.
        order: int64 (n, 4), operations of the color jitter in the order of their application.
        factors: float32 (n, 4), the factors of brightness, contrast and saturation and the shift of
            the hue. If the recipe adds brightness, its entry is added instead of multiplied.
        grayscale: bool (n,), True for images turned gray.
        blur: bool (n,), True for blurred images.
        sigma: float32 (n,), standard deviation of the blur in pixels.
        solarize: bool (n,), True for solarized images.
    """

    jitter: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    grayscale: np.ndarray
    blur: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray


def draw_colors(
    crop: Crop, seed: int, epoch: int, indices: np.ndarray, view: int
) -> ColorParameters:
    """Draw the parameters of one view of n images from the same ranges as torchvision.

    Args:
        crop: Recipe of the view.
        seed: Seed of the run.
        epoch: Number of completed passes over the data.
        indices: Indices of the images in the data set, integers of shape (n,).
        view: Index of the view, in the order of `recipe.expand_counts`.
    """

    def uniform(purpose: Purpose, count: int) -> np.ndarray:
        return rng.uniform(seed, epoch, indices, view, purpose, count)

    strength = strengths(crop)
    low, high = np.maximum(0.0, 1.0 - strength), 1.0 + strength
    low[HUE], high[HUE] = -crop.hue, crop.hue
    if crop.brightness_mode == "add":
        low[BRIGHTNESS], high[BRIGHTNESS] = -crop.brightness, crop.brightness
    low_sigma, high_sigma = crop.blur_sigma

    jitter, blur = uniform(Purpose.JITTER, 5), uniform(Purpose.BLUR, 2)
    return ColorParameters(
        jitter=jitter[:, 0] < crop.jitter,
        order=np.argsort(uniform(Purpose.JITTER_ORDER, 4), axis=1, kind="stable"),
        factors=(low + (high - low) * jitter[:, 1:]).astype(np.float32),
        grayscale=uniform(Purpose.GRAYSCALE, 1)[:, 0] < crop.grayscale,
        blur=blur[:, 0] < crop.blur,
        sigma=(low_sigma + (high_sigma - low_sigma) * blur[:, 1]).astype(np.float32),
        solarize=uniform(Purpose.SOLARIZE, 1)[:, 0] < crop.solarize,
    )


def strengths(crop: Crop) -> np.ndarray:
    """Return the strength of each operation of the color jitter, shape (4,). Unused ones have 0."""
    return np.array([crop.brightness, crop.contrast, crop.saturation, crop.hue])


def describe_view(crop: Crop, box: Box, parameters: ColorParameters, row: int) -> str:
    """Describe the random choices of one row's view in words, in the order of the operations."""
    words = [f"{box.width}x{box.height} pixels at ({box.left}, {box.top})"]
    if box.flip:
        words.append("flipped")
    if parameters.jitter[row]:
        modes = (
            " added" if crop.brightness_mode == "add" else "",
            " by channel" if crop.contrast_mean == "channel" else "",
            " in HSV" if crop.saturation_mode == "hsv" else "",
            "",
        )
        words += [
            f"{OPERATIONS[operation]} {parameters.factors[row, operation]:.2f}{modes[operation]}"
            for operation in parameters.order[row].tolist()
            if strengths(crop)[operation] > 0
        ]
    if parameters.grayscale[row]:
        words.append("gray")
    if parameters.blur[row]:
        border = ", black outside" if crop.blur_border == "zero" else ""
        words.append(f"blur sigma {parameters.sigma[row]:.2f}{border}")
    if parameters.solarize[row]:
        words.append("solarized")
    return ", ".join(words)
