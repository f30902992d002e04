"""Color and normalize a whole group of crops on CUDA with four kernel launches.

`color_torch` runs one operation at a time. That takes 289 kernels per view and moves 66 MiB per
224-pixel view. A program of these kernels applies all operations to a tile of pixels in registers.
Contrast needs the mean of its image, so a first kernel applies the operations before contrast and
computes the mean. The blur is separable. Images to be blurred pass through two buffers, one before
the blur along the rows and one before the blur along the columns. The arithmetic is the same as in
`color_torch`.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_pretrain.views.batch import upload
from ssl_pretrain.views.color_parameters import ColorParameters, jitter_strengths
from ssl_pretrain.views.recipe import Crop, blur_taps

_PIXELS = 1024  # pixels per program
_MEAN_PIXELS = 2048  # pixels per iteration of the loop over an image in `_compute_means`

# Columns of the table of `pack_parameters`. The first four contain the operations of the stages.
_FACTORS = tl.constexpr(4)
_SIGMA = tl.constexpr(8)
_GRAYSCALE = tl.constexpr(9)
_SOLARIZE = tl.constexpr(10)
_SLOT = tl.constexpr(11)
_VIEW_IN_SLOT = tl.constexpr(12)
_NUM_COLUMNS = tl.constexpr(13)


def pack_parameters(parameters: ColorParameters, crop: Crop) -> np.ndarray:
    """Return the parameters of n views as one float32 table (n, 13), to upload in one copy.

    The columns are the operations of the four stages (-1 for none), their factors, the sigma of the
    blur, two flags for grayscale and solarization, the view's slot in the blur buffers (-1 for
    none) and, in row k, the view in slot k.
    """
    order, blurred_views = parameters.jitter_order, np.flatnonzero(parameters.is_blurred)
    is_active = parameters.is_jittered[:, None] & (jitter_strengths(crop)[order] > 0)
    slots, views_in_slots = np.full(len(order), -1), np.zeros(len(order), np.int64)
    slots[blurred_views] = np.arange(len(blurred_views))
    views_in_slots[: len(blurred_views)] = blurred_views
    columns = (
        np.where(is_active, order, -1),
        np.take_along_axis(parameters.jitter_factors, order, axis=1),
        parameters.blur_sigma,
        parameters.is_gray,
        parameters.is_solarized,
        slots,
        views_in_slots,
    )
    return np.column_stack(columns).astype(np.float32)


def apply(
    pixels: Tensor,
    parameters: ColorParameters,
    crop: Crop,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the normalized views, (n, 3, height, width) in channels_last. Do not block the host.

    Args:
        pixels: Crops, uint8 (n, 3, height, width).
        parameters: Random color parameters of the n views.
        crop: Recipe of the views.
        mean: Means of red, green and blue, for values in [0, 1].
        std: Standard deviations of red, green and blue.
        dtype: Type of the views, float32 or bfloat16.
    """
    n, _, height, width = pixels.shape
    area, num_blurred = height * width, int(parameters.is_blurred.sum())
    pixels = pixels.contiguous()
    table = upload(torch.from_numpy(pack_parameters(parameters, crop)), pixels.device)
    views = torch.empty_like(pixels, dtype=dtype, memory_format=torch.channels_last)
    means = torch.empty(n, 3, device=pixels.device)
    buffers = torch.empty(2, num_blurred, 3, area, device=pixels.device)
    modes = {"ADDS": crop.brightness_mode == "add", "HSV": crop.saturation_mode == "hsv"}
    _compute_means[(n,)](
        pixels,
        table,
        means,
        area,
        CHANNEL_MEAN=crop.contrast_mean == "channel",
        PIXELS=_MEAN_PIXELS,
        num_warps=8,
        **modes,
    )
    tile = {"PIXELS": _PIXELS, "num_warps": 4}
    outputs = (views, crop.solarize_threshold, *mean, *(1 / value for value in std))
    _apply_colors[(n, triton.cdiv(area, _PIXELS))](
        pixels, table, means, buffers, area, *outputs, **modes, **tile
    )
    if num_blurred:
        grid = (num_blurred, 3, triton.cdiv(area, _PIXELS))
        blur = {"TAPS": blur_taps(crop), "ZERO_BORDER": crop.blur_border == "zero"}
        _blur_rows[grid](buffers[0], buffers[1], table, height, width, **blur, **tile)
        _blur_columns[grid](buffers[1], table, height, width, *outputs, **blur, **tile)
    return views


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(red, green, blue):
    return red * 0.2989 + green * 0.587 + blue * 0.114


@triton.jit
def _load(pixels, image, offsets, mask, area):
    """Return red, green and blue of an image's pixels at `offsets`, as values in [0, 1]."""
    source = pixels + image.to(tl.int64) * 3 * area + offsets
    red = tl.load(source, mask=mask, other=0).to(tl.float32) / 255.0
    green = tl.load(source + area, mask=mask, other=0).to(tl.float32) / 255.0
    blue = tl.load(source + 2 * area, mask=mask, other=0).to(tl.float32) / 255.0
    return red, green, blue


@triton.jit
def _saturate(red, green, blue, factor, HSV: tl.constexpr):
    """Scale the saturation in HSV, or blend with gray."""
    if HSV:
        value = tl.maximum(tl.maximum(red, green), blue)
        chroma = value - tl.minimum(tl.minimum(red, green), blue)
        # S = chroma / value is limited to 1, so chroma is limited to value. Gray does not change.
        ratio = tl.minimum(factor, value / tl.maximum(chroma, 1.1754944e-38))
        return (
            value - (value - red) * ratio,
            value - (value - green) * ratio,
            value - (value - blue) * ratio,
        )
    else:
        gray = _gray(red, green, blue) * (1.0 - factor)
        return (
            _clamp(red * factor + gray),
            _clamp(green * factor + gray),
            _clamp(blue * factor + gray),
        )


@triton.jit
def _rotate_hue(red, green, blue, shift):
    """Rotate the hue by `shift` turns of the HSV hexagon, at constant value and chroma."""
    low = tl.minimum(tl.minimum(red, green), blue)
    high = tl.maximum(tl.maximum(red, green), blue)
    chroma = high - low
    divisor = tl.maximum(chroma, 1.1754944e-38)  # gray has chroma 0, and any hue suits it
    sixths = tl.where(
        high == red,
        (green - blue) / divisor,
        tl.where(high == green, (blue - red) / divisor + 2.0, (red - green) / divisor + 4.0),
    )
    sixths = sixths + 6.0 * shift
    sixths = sixths - 6.0 * tl.floor(sixths / 6.0)
    red = _clamp(tl.abs(sixths - 3.0) - 1.0) * chroma + low
    green = _clamp(2.0 - tl.abs(sixths - 2.0)) * chroma + low
    blue = _clamp(2.0 - tl.abs(sixths - 4.0)) * chroma + low
    return red, green, blue


@triton.jit
def _adjust(
    red,
    green,
    blue,
    operation,
    factor,
    mean_red,
    mean_green,
    mean_blue,
    ADDS: tl.constexpr,
    HSV: tl.constexpr,
):
    """Apply one stage of the jitter.

    `operation` is 0 for brightness, 1 for contrast, 2 for saturation, 3 for hue, or -1 for none.
    """
    if operation == 0:
        if ADDS:
            red, green, blue = _clamp(red + factor), _clamp(green + factor), _clamp(blue + factor)
        else:
            red, green, blue = _clamp(red * factor), _clamp(green * factor), _clamp(blue * factor)
    elif operation == 1:
        mean_weight = 1.0 - factor
        red = _clamp(red * factor + mean_red * mean_weight)
        green = _clamp(green * factor + mean_green * mean_weight)
        blue = _clamp(blue * factor + mean_blue * mean_weight)
    elif operation == 2:
        red, green, blue = _saturate(red, green, blue, factor, HSV)
    elif operation == 3:
        red, green, blue = _rotate_hue(red, green, blue, factor)
    return red, green, blue


@triton.jit
def _compute_means(
    pixels,
    table,
    means,
    area,
    ADDS: tl.constexpr,
    HSV: tl.constexpr,
    CHANNEL_MEAN: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Apply the stages before contrast, and store the means that contrast blends each image with.

    Images without contrast are skipped.
    """
    image = tl.program_id(0)
    row = table + image * _NUM_COLUMNS
    contrast_stage = 4
    for k in tl.static_range(4):
        contrast_stage = tl.where(tl.load(row + k) == 1.0, k, contrast_stage)
    if contrast_stage < 4:
        red_sum = tl.zeros([PIXELS], tl.float32)
        green_sum = tl.zeros([PIXELS], tl.float32)
        blue_sum = tl.zeros([PIXELS], tl.float32)
        for start in range(0, area, PIXELS):
            offsets = start + tl.arange(0, PIXELS)
            mask = offsets < area
            red, green, blue = _load(pixels, image, offsets, mask, area)
            for k in tl.static_range(3):
                operation = tl.where(k < contrast_stage, tl.load(row + k), -1.0).to(tl.int32)
                red, green, blue = _adjust(
                    red,
                    green,
                    blue,
                    operation,
                    tl.load(row + _FACTORS + k),
                    0.0,
                    0.0,
                    0.0,
                    ADDS,
                    HSV,
                )
            red_sum += tl.where(mask, red, 0.0)
            green_sum += tl.where(mask, green, 0.0)
            blue_sum += tl.where(mask, blue, 0.0)
        red_mean = tl.sum(red_sum) / area
        green_mean = tl.sum(green_sum) / area
        blue_mean = tl.sum(blue_sum) / area
        if not CHANNEL_MEAN:
            gray = _gray(red_mean, green_mean, blue_mean)
            red_mean, green_mean, blue_mean = gray, gray, gray
        tl.store(means + image * 3, red_mean)
        tl.store(means + image * 3 + 1, green_mean)
        tl.store(means + image * 3 + 2, blue_mean)


@triton.jit
def _solarize(values, threshold):
    return tl.where(values >= threshold, 1.0 - values, values)


@triton.jit
def _store_normalized(target, values, mean, scale, mask):
    """Store (values - mean) * scale, where `scale` is 1 / std."""
    tl.store(target, ((values - mean) * scale).to(target.dtype.element_ty), mask=mask)


@triton.jit
def _apply_colors(
    pixels,
    table,
    means,
    buffer,
    area,
    views,
    threshold,
    mean_red,
    mean_green,
    mean_blue,
    scale_red,
    scale_green,
    scale_blue,
    ADDS: tl.constexpr,
    HSV: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Apply jitter and grayscale to a tile, then complete it or store it for the blur."""
    image = tl.program_id(0)
    row = table + image * _NUM_COLUMNS
    offsets = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    mask = offsets < area
    red, green, blue = _load(pixels, image, offsets, mask, area)
    for k in tl.static_range(4):
        operation = tl.load(row + k).to(tl.int32)
        image_mean_red = tl.load(means + image * 3, mask=operation == 1, other=0.0)
        image_mean_green = tl.load(means + image * 3 + 1, mask=operation == 1, other=0.0)
        image_mean_blue = tl.load(means + image * 3 + 2, mask=operation == 1, other=0.0)
        red, green, blue = _adjust(
            red,
            green,
            blue,
            operation,
            tl.load(row + _FACTORS + k),
            image_mean_red,
            image_mean_green,
            image_mean_blue,
            ADDS,
            HSV,
        )
    if tl.load(row + _GRAYSCALE) > 0.0:
        gray = _gray(red, green, blue)
        red, green, blue = gray, gray, gray
    slot = tl.load(row + _SLOT).to(tl.int64)
    if slot >= 0:
        blur_input = buffer + slot * 3 * area + offsets
        tl.store(blur_input, red, mask=mask)
        tl.store(blur_input + area, green, mask=mask)
        tl.store(blur_input + 2 * area, blue, mask=mask)
    else:
        if tl.load(row + _SOLARIZE) > 0.0:
            red = _solarize(red, threshold)
            green = _solarize(green, threshold)
            blue = _solarize(blue, threshold)
        target = views + image.to(tl.int64) * 3 * area + offsets * 3
        _store_normalized(target, red, mean_red, scale_red, mask)
        _store_normalized(target + 1, green, mean_green, scale_green, mask)
        _store_normalized(target + 2, blue, mean_blue, scale_blue, mask)


@triton.jit
def _blur_axis(
    source, positions, length, step, mask, sigma, TAPS: tl.constexpr, ZERO_BORDER: tl.constexpr
):
    """Return a tile's pixels after a Gaussian blur along one axis.

    `positions` are the coordinates of the pixels on the axis, `source` points to the start of the
    axis, and `step` is the distance between its pixels in memory.
    """
    radius: tl.constexpr = TAPS // 2
    total = tl.zeros(positions.shape, tl.float32)
    weights = 0.0
    for tap in range(TAPS):
        distance = (tap - radius) / sigma
        weight = tl.exp(-0.5 * distance * distance)
        weights += weight
        index = positions + tap - radius
        if ZERO_BORDER:
            values = tl.load(
                source + index * step,
                mask=mask & (index >= 0) & (index < length),
                other=0.0,
            )
        else:
            index = tl.abs(index)
            index = tl.where(index < length, index, 2 * length - 2 - index)
            values = tl.load(source + index * step, mask=mask, other=0.0)
        total += values * weight
    return total / weights


@triton.jit
def _blur_tile(table, area, PIXELS: tl.constexpr):
    """Return a program's image, channel, sigma, start in the buffers, pixel offsets and mask."""
    slot, channel = tl.program_id(0), tl.program_id(1)
    image = tl.load(table + slot * _NUM_COLUMNS + _VIEW_IN_SLOT).to(tl.int32)
    sigma = tl.load(table + image * _NUM_COLUMNS + _SIGMA)
    start = (slot.to(tl.int64) * 3 + channel) * area
    offsets = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    return image, channel, sigma, start, offsets, offsets < area


@triton.jit
def _blur_rows(
    source_buffer,
    target_buffer,
    table,
    height,
    width,
    TAPS: tl.constexpr,
    ZERO_BORDER: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Blur a tile of one channel along the rows, from the first buffer into the second."""
    _, _, sigma, start, offsets, mask = _blur_tile(table, height * width, PIXELS)
    x = offsets % width
    source = source_buffer + start + (offsets - x)
    values = _blur_axis(source, x, width, 1, mask, sigma, TAPS, ZERO_BORDER)
    tl.store(target_buffer + start + offsets, values, mask=mask)


@triton.jit
def _blur_columns(
    buffer,
    table,
    height,
    width,
    views,
    threshold,
    mean_red,
    mean_green,
    mean_blue,
    scale_red,
    scale_green,
    scale_blue,
    TAPS: tl.constexpr,
    ZERO_BORDER: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Blur a tile of one channel along the columns, solarize, normalize and store it."""
    area = height * width
    image, channel, sigma, start, offsets, mask = _blur_tile(table, area, PIXELS)
    source, y = buffer + start + offsets % width, offsets // width
    values = _blur_axis(source, y, height, width, mask, sigma, TAPS, ZERO_BORDER)
    if tl.load(table + image * _NUM_COLUMNS + _SOLARIZE) > 0.0:
        values = _solarize(values, threshold)
    mean = tl.where(channel == 0, mean_red, tl.where(channel == 1, mean_green, mean_blue))
    scale = tl.where(channel == 0, scale_red, tl.where(channel == 1, scale_green, scale_blue))
    target = views + image.to(tl.int64) * 3 * area + offsets * 3 + channel
    _store_normalized(target, values, mean, scale, mask)
