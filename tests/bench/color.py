"""Compare our color augmentations with kornia's, in speed and in output.

Both apply the same parameters to one batch of 256 x 3 x 224 x 224. Kornia applies the
jitter in one order for a whole batch, so both do that here. Ours usually draws one order per image.
"""

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.views import color
from ssl_pretrain.views.color_parameters import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    ColorParameters,
    draw_colors,
)
from ssl_pretrain.views.recipe import Crop, blur_taps

SIMCLR = Crop(
    size=224,
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
    blur=0.5,
    blur_kernel=23,
)
ORDER = (BRIGHTNESS, CONTRAST, SATURATION, HUE)


def smooth_images(num_images: int, seed: int = 0) -> Tensor:
    """Return smooth pictures with some noise, uint8 (n, 3, 224, 224)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_images, 3, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bilinear")
    noise = torch.rand(smooth.shape, generator=generator)
    return (255 * (0.9 * smooth + 0.1 * noise)).to(torch.uint8)


def draw_parameters(num_images: int) -> ColorParameters:
    """Draw SimCLR's parameters as in a run, but with one order for all images."""
    parameters = draw_colors(SIMCLR, 0, 0, np.arange(num_images), 0)
    return replace(parameters, jitter_order=np.tile(np.array(ORDER), (num_images, 1)))


def apply_ours(pixels: Tensor, parameters: ColorParameters) -> Tensor:
    return color.apply(pixels, parameters, SIMCLR, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])


def apply_kornia(pixels: Tensor, parameters: ColorParameters) -> Tensor:
    """Apply each of kornia's functions to the images that get it, as kornia's augmentations do."""
    from kornia import enhance, filters
    from kornia.color import rgb_to_grayscale

    images = pixels.to(torch.float32) / 255
    jitter_indices = torch.from_numpy(np.flatnonzero(parameters.is_jittered))
    factors = torch.from_numpy(parameters.jitter_factors)[jitter_indices]
    jittered = images[jitter_indices]
    for operation in ORDER:
        factor = factors[:, operation]
        if operation == BRIGHTNESS:
            jittered = enhance.adjust_brightness_accumulative(jittered, factor)
        elif operation == CONTRAST:
            jittered = enhance.adjust_contrast_with_mean_subtraction(jittered, factor)
        elif operation == SATURATION:
            jittered = enhance.adjust_saturation_with_gray_subtraction(jittered, factor)
        else:
            jittered = enhance.adjust_hue(jittered, factor * 2 * torch.pi)
    images[jitter_indices] = jittered
    gray_indices = torch.from_numpy(np.flatnonzero(parameters.is_gray))
    images[gray_indices] = rgb_to_grayscale(images[gray_indices]).expand(-1, 3, -1, -1)
    blur_indices = torch.from_numpy(np.flatnonzero(parameters.is_blurred))
    sigma = torch.from_numpy(parameters.blur_sigma)[blur_indices, None].expand(-1, 2)
    images[blur_indices] = filters.gaussian_blur2d(
        images[blur_indices], (blur_taps(SIMCLR),) * 2, sigma, "reflect"
    )
    return images


def compare(num_images: int = 256, rounds: int = 3) -> dict[str, float]:
    """Return the median seconds of interleaved rounds, and the differences in gray levels."""
    pixels, parameters = smooth_images(num_images), draw_parameters(num_images)
    subset_parameters = draw_parameters(32)
    difference = (
        apply_ours(pixels[:32], subset_parameters) - apply_kornia(pixels[:32], subset_parameters)
    ).abs() * 255
    seconds: dict[str, list[float]] = {"ours": [], "kornia": []}
    for _ in range(rounds):
        for name, function in (("ours", apply_ours), ("kornia", apply_kornia)):
            start = time.perf_counter()
            function(pixels, parameters)
            seconds[name].append(time.perf_counter() - start)
    ratios = [kornia / ours for ours, kornia in zip(seconds["ours"], seconds["kornia"])]
    return {
        "ours": float(np.median(seconds["ours"])),
        "kornia": float(np.median(seconds["kornia"])),
        "ratio": float(np.median(ratios)),
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
    }
