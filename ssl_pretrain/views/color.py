"""Augment and normalize crops on their device: color jitter, grayscale, blur and solarization.

The random numbers come from `color_parameters`. The operations are applied in this order: color
jitter (its four operations in a random order per image), grayscale, blur, solarization, then
(x - mean) / std. The host knows which images an operation changes, so it never waits for a GPU.

The arithmetic is torchvision's (`transforms.v2.functional`), on float32 in [0, 1]. A recipe can
select the arithmetic of SimCLR's and BYOL's code (TensorFlow and JAX) instead:

- `brightness_mode: add` adds brightness instead of multiplying by it.
- `contrast_mean: channel` blends with the mean of each channel instead of the mean gray.
- `saturation_mode: hsv` scales saturation in HSV at constant value instead of blending with gray.
- `blur_border: zero` pads with zeros instead of a reflection.
"""

from dataclasses import fields
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.views import color_cpu, color_torch
from ssl_pretrain.views.color_parameters import ColorParameters
from ssl_pretrain.views.recipe import Crop

FUSED_DEVICES = ("cuda",)  # device types that use the kernels of color_triton


def apply(
    pixels: Tensor, parameters: ColorParameters, crop: Crop, mean: list[float], std: list[float]
) -> Tensor:
    """Return the normalized views, float32 (n, C, height, width), on the device of `pixels`.

    Args:
        pixels: Crops, uint8 (n, C, height, width).
        parameters: Random numbers of these n views.
        crop: Recipe of the views.
        mean: Mean of each channel in [0, 1].
        std: Standard deviation of each channel.

    Raises:
        ValueError: If `pixels` is not uint8 (n, C, height, width) with the n of `parameters` and
            one channel per mean.
    """
    _check_pixels(pixels, len(parameters.is_jittered), len(mean))
    if pixels.device.type != "cpu":
        return color_torch.apply(pixels, parameters, crop, mean, std)
    views = torch.empty(pixels.shape)
    color_cpu.apply(
        pixels.contiguous().numpy(),
        parameters,
        crop,
        np.asarray(mean, np.float32),
        np.asarray(std, np.float32),
        torch.get_num_threads(),
        views.numpy(),
    )
    return views


def apply_to_group(
    pixels: list[Tensor],
    parameters: list[ColorParameters],
    crop: Crop,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return the augmented and normalized views of one kind of crop, from a few kernels on CUDA.

    Args:
        pixels: Crops of each view, uint8 (n, C, height, width).
        parameters: Random numbers of each view.
        crop: Recipe of the views.
        mean: Mean of each channel in [0, 1].
        std: Standard deviation of each channel.
        dtype: Type of the views on CUDA, where they are channels_last. Elsewhere they are float32.
    """
    is_fused = pixels[0].device.type in FUSED_DEVICES
    # The kernels are written for three channels.
    if len(mean) != 3 or not is_fused or find_spec("triton") is None:
        views = [apply(*pair, crop, mean, std) for pair in zip(pixels, parameters)]
        if not is_fused:
            return views
        return [view.to(dtype, memory_format=torch.channels_last) for view in views]
    for view, values in zip(pixels, parameters):
        _check_pixels(view, len(values.is_jittered), 3)
    from ssl_pretrain.views import color_triton

    group = ColorParameters(
        **{
            field.name: np.concatenate([getattr(values, field.name) for values in parameters])
            for field in fields(ColorParameters)
        }
    )
    stack = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
    return list(color_triton.apply(stack, group, crop, mean, std, dtype).chunk(len(pixels)))


def normalize(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Return views without augmentation: (pixels / 255 - mean) / std, float32.

    Raises:
        ValueError: If `pixels` is not uint8 (n, C, height, width) with one channel per mean.
    """
    _check_pixels(pixels, len(pixels), len(mean))
    return color_torch.standardize(pixels.to(torch.float32).div_(255), mean, std)


def _check_pixels(pixels: Tensor, num_images: int, channels: int) -> None:
    shape = (num_images, channels)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[:2] != shape:
        raise ValueError(
            f"color: pixels must be uint8 ({num_images}, {channels}, height, width), got "
            f"{pixels.dtype} {tuple(pixels.shape)}"
        )
