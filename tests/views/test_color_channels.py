"""Color operations on images of other numbers of channels than three."""

from typing import Any

import numpy as np
import pytest
import torch

from ssl_pretrain.views import color, color_torch
from ssl_pretrain.views.color_parameters import draw_colors
from ssl_pretrain.views.recipe import Crop

OPERATIONS: dict[str, Any] = {
    "jitter": 0.8,
    "brightness": 0.8,
    "contrast": 0.8,
    "blur": 0.5,
    "solarize": 0.3,
}
OTHER_CODE: dict[str, Any] = {
    "brightness_mode": "add",
    "contrast_mean": "channel",
    "blur_border": "zero",
}


def make_views(channels, options):
    """Return crops, their color parameters, their recipe, and a mean and std per channel."""
    generator = np.random.default_rng(channels)
    pixels = torch.from_numpy(generator.integers(0, 256, (64, channels, 12, 12), np.uint8))
    crop = Crop(size=12, **OPERATIONS, **options)
    parameters = draw_colors(crop, 0, 0, np.arange(64), 0)
    levels = np.linspace(0.2, 0.6, channels).tolist()
    return pixels, parameters, crop, levels, levels[::-1]


@pytest.mark.parametrize("options", [{}, OTHER_CODE], ids=["torchvision", "TensorFlow"])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_the_operations_for_a_gpu_give_the_same_views(channels, options):
    arguments = make_views(channels, options)
    views, expected = color.apply(*arguments), color_torch.apply(*arguments)
    torch.testing.assert_close(views, expected, rtol=0.0, atol=5e-5)  # 1e-5 / std


@pytest.mark.parametrize("channels", [1, 4])
def test_views_on_a_gpu_have_the_dtype_and_layout_of_color_views(channels, monkeypatch):
    """The kernels for a GPU are for three channels, and other views are computed by torch."""
    pixels, parameters, *rest = make_views(channels, {})
    expected = color.apply(pixels, parameters, *rest)
    monkeypatch.setattr(color, "FUSED_DEVICES", ("cpu",))
    views = color.apply_to_group([pixels] * 2, [parameters] * 2, *rest, torch.bfloat16)
    assert len(views) == 2
    for view in views:
        assert torch.equal(view, expected.bfloat16())
        assert view.is_contiguous(memory_format=torch.channels_last)
