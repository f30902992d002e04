"""Print the largest difference of the fused color kernels from the compiled CPU code, by the options of a crop.

On a CPU Triton's interpreter runs the kernels: TRITON_INTERPRET=1 python tests/views/fused.py
"""

from __future__ import annotations

import numpy as np
import torch

from ssl_pretrain.views import colour
from ssl_pretrain.views.recipe import Crop

EVERYTHING = {"jitter": 0.9, "brightness": 0.6, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "grayscale": 0.2, "blur": 0.5,
              "solarize": 0.3}  # fmt: skip
OPTIONS = {
    "contrast_mean": "channel",
    "saturation_mode": "hsv",
    "blur_border": "zero",
    "brightness_mode": "add",
}
CASES = {"torchvision": {}, "byol": OPTIONS}


def main() -> None:
    generator = np.random.default_rng(0)
    for name, options in CASES.items():
        crop = Crop(size=12, count=2, **EVERYTHING, **options)
        pixels = [torch.from_numpy(generator.integers(0, 256, (10, 3, 12, 12), dtype=np.uint8)) for _ in range(2)]
        pixels[0][0] = pixels[0][0, :1]  # gray
        pixels[0][1] = 0
        drawn = [colour.draw(crop, 1, 2, np.arange(10), view) for view in range(2)]
        expected = colour.apply_to_group(pixels, drawn, crop, [0.4, 0.5, 0.6], [0.3, 0.2, 0.3])
        colour.FUSED_ON = ("cpu",)
        views = colour.apply_to_group(pixels, drawn, crop, [0.4, 0.5, 0.6], [0.3, 0.2, 0.3])
        colour.FUSED_ON = ("cuda",)
        print(name, max(float((view - wanted).abs().max()) for view, wanted in zip(views, expected)))


if __name__ == "__main__":
    main()
