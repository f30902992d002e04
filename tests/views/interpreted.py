"""Run the color kernels in Triton's interpreter and compare them with the code for CPUs.

Prints one line per case with the largest difference. TRITON_INTERPRET=1 has to be set before Triton
is imported, so tests run this file in a process of its own.
"""

from dataclasses import replace
from unittest import mock

import numpy as np
import torch

from ssl_pretrain.views import color
from ssl_pretrain.views.color_parameters import draw_colors
from ssl_pretrain.views.recipe import Crop

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
EVERYTHING = Crop(
    size=16,
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
    blur=0.5,
    solarize=0.2,
    count=2,
)
CASES = {
    "torchvision's functions": EVERYTHING,
    "SimCLR's functions": replace(
        EVERYTHING, contrast_mean="channel", saturation_mode="hsv", blur_border="zero"
    ),
    "BYOL's functions": replace(
        EVERYTHING,
        brightness_mode="add",
        contrast_mean="channel",
        saturation_mode="hsv",
        blur_border="zero",
    ),
    "a size that no tile divides": replace(EVERYTHING, size=33, blur_kernel=9),
    "hue and brightness only": replace(
        EVERYTHING, contrast=0.0, saturation=0.0, blur=0.0, solarize=0.0
    ),
    "nothing": Crop(size=16, count=1),
    "blur of all, gray of all": replace(EVERYTHING, blur=1.0, grayscale=1.0),
}


def measure_difference(crop: Crop) -> float:
    """Return the largest difference between the finished views, normalized as in a run."""
    generator = np.random.default_rng(0)
    pixels = [
        generator.integers(0, 256, (10, 3, crop.size, crop.size), dtype=np.uint8)
        for _ in range(crop.count)
    ]
    for view in pixels:
        view[0], view[1, 1:], view[2] = 255, view[1, :1], 0  # white, gray and black
    pixels = [torch.from_numpy(view) for view in pixels]
    parameters = [draw_colors(crop, 1, 2, np.arange(10), view) for view in range(crop.count)]
    expected = color.apply_to_group(pixels, parameters, crop, MEAN, STD)
    with mock.patch.object(color, "FUSED_DEVICES", ("cpu",)):
        views = color.apply_to_group(pixels, parameters, crop, MEAN, STD)
    return max(
        (view - expected_view).abs().max().item() for view, expected_view in zip(views, expected)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, crop in CASES.items():
        print(f"{measure_difference(crop):.3g}  {name}")
