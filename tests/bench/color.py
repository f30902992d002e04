"""The colour part of the views, ours and kornia's: one batch of 256 x 3 x 224 x 224, the same parameters, the same result.

Kornia draws one order of jitter for a whole batch, so that is what both do here; ours usually has one for each image.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.views import color, color_parameters
from ssl_pretrain.views.color_parameters import ColorParameters, draw_colors
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
ORDER = (
    color_parameters.BRIGHTNESS,
    color_parameters.CONTRAST,
    color_parameters.SATURATION,
    color_parameters.HUE,
)


def batch(n: int, seed: int = 0) -> Tensor:
    """Smooth pictures with noise on them: uint8 (n, 3, 224, 224)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bilinear")
    return (255 * (0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=generator))).to(
        torch.uint8
    )


def parameters(n: int) -> ColorParameters:
    """SimCLR's, drawn as in a run, with one order for all."""
    drawn = draw_colors(SIMCLR, 0, 0, np.arange(n), 0)
    return replace(drawn, order=np.tile(np.array(ORDER), (n, 1)))


def ours(pixels: Tensor, drawn: ColorParameters) -> Tensor:
    return color.apply(pixels, drawn, SIMCLR, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])


def kornias(pixels: Tensor, drawn: ColorParameters) -> Tensor:
    """Kornia's functions on the images each was drawn for, as its augmentations select and put back."""
    from kornia import enhance, filters
    from kornia.color import rgb_to_grayscale

    images = pixels.to(torch.float32) / 255
    jitter = torch.from_numpy(np.flatnonzero(drawn.jitter))
    factors = torch.from_numpy(drawn.factors)[jitter]
    chosen = images[jitter]
    for operation in ORDER:
        factor = factors[:, operation]
        if operation == color_parameters.BRIGHTNESS:
            chosen = enhance.adjust_brightness_accumulative(chosen, factor)
        elif operation == color_parameters.CONTRAST:
            chosen = enhance.adjust_contrast_with_mean_subtraction(chosen, factor)
        elif operation == color_parameters.SATURATION:
            chosen = enhance.adjust_saturation_with_gray_subtraction(chosen, factor)
        else:
            chosen = enhance.adjust_hue(chosen, factor * 2 * torch.pi)
    images[jitter] = chosen
    grey = torch.from_numpy(np.flatnonzero(drawn.grayscale))
    images[grey] = rgb_to_grayscale(images[grey]).expand(-1, 3, -1, -1)
    blur = torch.from_numpy(np.flatnonzero(drawn.blur))
    sigma = torch.from_numpy(drawn.sigma)[blur, None].expand(-1, 2)
    images[blur] = filters.gaussian_blur2d(images[blur], (blur_taps(SIMCLR),) * 2, sigma, "reflect")
    return images


def compare(n: int = 256, rounds: int = 3) -> dict[str, float]:
    """Seconds of each, the best of interleaved rounds, and the largest and mean difference in grey levels."""
    pixels, drawn = batch(n), parameters(n)
    difference = (
        ours(pixels[:32], parameters(32)) - kornias(pixels[:32], parameters(32))
    ).abs() * 255
    seconds: dict[str, list[float]] = {"ours": [], "kornia": []}
    for _ in range(rounds):
        for name, function in (("ours", ours), ("kornia", kornias)):
            began = time.perf_counter()
            function(pixels, drawn)
            seconds[name].append(time.perf_counter() - began)
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["kornia"])]
    return {
        "ours": float(np.median(seconds["ours"])),
        "kornia": float(np.median(seconds["kornia"])),
        "ratio": float(np.median(ratios)),
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
    }
