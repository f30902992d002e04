"""Apply the color operations of views with torch, on any device.

Each operation is applied in one call to all images for which it was drawn.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pretrain.views.batch import upload
from ssl_pretrain.views.color_parameters import ColorParameters, jitter_strengths
from ssl_pretrain.views.recipe import Crop, blur_taps

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue (ITU-R BT.601)


def apply(
    pixels: Tensor, parameters: ColorParameters, crop: Crop, mean: list[float], std: list[float]
) -> Tensor:
    """Return the normalized views. The arguments are those of `color.apply`."""
    images = pixels.to(torch.float32).div_(255)
    rows, values = _upload_parameters(parameters, crop, pixels.device)
    operations = (
        _add_brightness if crop.brightness_mode == "add" else _scale_brightness,
        _contrast_by_channel if crop.contrast_mean == "channel" else _contrast,
        _saturation_in_hsv if crop.saturation_mode == "hsv" else _saturation,
        _hue,
    )

    for position, stage_rows in enumerate(rows[:16]):
        operation = position % 4
        if len(stage_rows):
            factor = values[:, operation].index_select(0, stage_rows).view(-1, 1, 1, 1)
            adjusted_images = operations[operation](images.index_select(0, stage_rows), factor)
            images.index_copy_(0, stage_rows, adjusted_images)
    grayscale, blur, solarize = rows[16:]
    if len(grayscale):
        gray = _gray(images.index_select(0, grayscale)).expand(-1, 3, -1, -1)
        images.index_copy_(0, grayscale, gray)
    if len(blur):
        sigma = values[:, 4].index_select(0, blur)
        sharp_images = images.index_select(0, blur)
        images.index_copy_(0, blur, _blur(sharp_images, sigma, blur_taps(crop), crop.blur_border))
    if len(solarize):
        original_images = images.index_select(0, solarize)
        images.index_copy_(0, solarize, _solarize(original_images, crop.solarize_threshold))
    return standardize(images, mean, std)


def _upload_parameters(
    parameters: ColorParameters, crop: Crop, device: torch.device
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the rows that each operation changes and the values of every row, on the device.

    The rows are 19 int64 tensors: for each stage the rows of brightness, contrast, saturation and
    hue, then those of grayscale, blur and solarization. The values are the four factors and sigma,
    float32 (n, 5).
    """
    is_jittered, order = parameters.is_jittered, parameters.jitter_order
    is_used = jitter_strengths(crop) > 0
    masks = [
        is_jittered & (order[:, stage] == operation) & is_used[operation]
        for stage in range(4)
        for operation in range(4)
    ]
    masks += [parameters.is_gray, parameters.is_blurred, parameters.is_solarized]
    rows = [np.flatnonzero(mask) for mask in masks]
    device_rows = upload(torch.from_numpy(np.concatenate(rows)), device)
    values = torch.from_numpy(np.column_stack([parameters.jitter_factors, parameters.blur_sigma]))
    return device_rows.split(list(map(len, rows))), upload(values, device)


# The operations below take images in [0, 1], float32 (m, C, height, width), and a factor per image,
# (m, 1, 1, 1). They may overwrite the images. Saturation and hue need three channels.


def _scale_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _add_brightness(images: Tensor, delta: Tensor) -> Tensor:
    return images.add_(delta).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _gray(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def _contrast_by_channel(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, images.mean(dim=(2, 3), keepdim=True), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _gray(images), factor)


def _blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).add_(others * (1 - factor)).clamp_(0, 1)


def _saturation_in_hsv(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply HSV's saturation by the factor at constant hue and value, and limit it to 1.

    Saturation is chroma / value. Hue and value stay the same if the distances of all channels to
    the largest channel are multiplied by one number. That number is the factor, but at most the
    number that makes the smallest channel 0.
    """
    low, high = images.amin(dim=1, keepdim=True), images.amax(dim=1, keepdim=True)
    chroma = (high - low).clamp_min_(torch.finfo(torch.float32).tiny)
    scale = torch.minimum(factor, high / chroma)
    return torch.sub(high, (high - images).mul_(scale)).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by `shift` turns of HSV's hexagon, at constant value and chroma."""
    red, green, blue = images.split(1, dim=1)
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    # Gray has chroma 0 and no hue, so any divisor will do.
    divisor = chroma.clamp_min(torch.finfo(torch.float32).tiny)
    from_green = (blue - red).div_(divisor).add_(2)
    from_blue = (red - green).div_(divisor).add_(4)
    sixths = torch.where(high == green, from_green, from_blue)
    sixths = torch.where(high == red, (green - blue).div_(divisor), sixths)
    sixths = sixths.add_(6 * shift).remainder_(6)
    rotated = torch.cat(
        [
            (sixths - 3).abs_().sub_(1),
            (sixths - 2).abs_().neg_().add_(2),
            (sixths - 4).abs_().neg_().add_(2),
        ],
        dim=1,
    )
    return rotated.clamp_(0, 1).mul_(chroma).add_(low)


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _solarize(images: Tensor, threshold: float) -> Tensor:
    return torch.where(images >= threshold, 1 - images, images)


def _blur(images: Tensor, sigma: Tensor, taps: int, border: str = "reflect") -> Tensor:
    """Blur each image with a Gaussian of its own sigma. The border is "reflect" or "zero".

    Two depthwise convolutions, along the rows and along the columns, treat every channel of every
    image as a separate channel. They need 2 * taps products per pixel, whereas torchvision's
    square kernel needs taps^2.
    """
    num_images, channels, height, width = images.shape
    radius = taps // 2
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=images.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1)  # one row per image
    kernel = kernel.repeat_interleave(channels, dim=0)
    mode = "constant" if border == "zero" else "reflect"
    padded_images = F.pad(images, (radius, radius, radius, radius), mode=mode)
    stack = padded_images.flatten(0, 1)[None]
    stack = F.conv2d(stack, kernel[:, None, None, :], groups=num_images * channels)
    stack = F.conv2d(stack, kernel[:, None, :, None], groups=num_images * channels)
    return stack.view(num_images, channels, height, width)


def standardize(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Return (images - mean) / std, which overwrites `images`."""
    shift, scale = _mean_and_std(tuple(mean), tuple(std), images.device)
    return images.sub_(shift).div_(scale)


@lru_cache(maxsize=16)
def _mean_and_std(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Return mean and std on the device, (2, C, 1, 1), cached because the copy blocks the host."""
    return torch.tensor([mean, std], device=device)[:, :, None, None]
