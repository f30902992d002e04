"""Color uint8 crops on CUDA and normalize them, in four kernel launches for a whole group of views.

`color_torch` runs one operation at a time. That takes 289 kernels per view and moves 66 MiB per
224-pixel view. Here one program applies all operations to a tile of pixels in registers. Contrast
needs the mean of its image, so a first kernel applies the operations before it and computes that
mean. The blur is separable. Images to be blurred pass through two buffers, one before the blur
along the rows and one before the blur along the columns. The arithmetic is that of `color_torch`.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_pretrain.views.upload import upload

_PIXELS = 1024  # pixels per program
_MEAN_PIXELS = 2048  # pixels per iteration of the loop over an image in `_means`

# Columns of the table that `pack` makes. The first four are the operations of the stages.
_FACTORS = tl.constexpr(4)
_SIGMA = tl.constexpr(8)
_GRAYSCALE = tl.constexpr(9)
_SOLARIZE = tl.constexpr(10)
_SLOT = tl.constexpr(11)
_VIEW_IN_SLOT = tl.constexpr(12)
_COLUMNS = tl.constexpr(13)


def pack(
    codes: np.ndarray,
    factors: np.ndarray,
    sigma: np.ndarray,
    grayscale: np.ndarray,
    blur: np.ndarray,
    solarize: np.ndarray,
) -> np.ndarray:
    """Return the parameters of n views as one float32 table (n, 13), to be copied at once.

    Its columns are the operations of the four stages, their factors, the sigma, two flags for
    grayscale and solarization, the view's slot in the blur buffers (-1 for none) and, in row k, the
    view in slot k.

    Args:
        codes: Operation of each stage of the color jitter, -1 for none, (n, 4).
        factors: Factor of each stage, (n, 4).
        sigma: Blur in pixels, (n,).
        grayscale: Views turned gray, (n,) bool.
        blur: Blurred views, (n,) bool.
        solarize: Solarized views, (n,) bool.
    """
    table = np.zeros((len(codes), _COLUMNS.value), np.float32)
    table[:, : _FACTORS.value] = codes
    table[:, _FACTORS.value : _SIGMA.value] = factors
    table[:, _SIGMA.value] = sigma
    table[:, _GRAYSCALE.value], table[:, _SOLARIZE.value] = grayscale, solarize
    rows = np.flatnonzero(blur)
    table[:, _SLOT.value] = -1
    table[rows, _SLOT.value] = np.arange(len(rows))
    table[: len(rows), _VIEW_IN_SLOT.value] = rows
    return table


def apply(
    pixels: Tensor,
    table: np.ndarray,
    num_blurred: int,
    *,
    taps: int,
    threshold: float,
    mean: list[float],
    std: list[float],
    adds: bool,
    hsv: bool = False,
    channel_mean: bool = False,
    zero_border: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """Return the finished views, (n, 3, height, width), without blocking the host.

    Args:
        pixels: Crops, uint8 (n, 3, height, width).
        table: Parameters of the n views, from `pack`, on the host.
        num_blurred: Number of blurred views among them.
        taps: Width of the blur's kernel in pixels, odd.
        threshold: Solarization inverts values of at least this, in [0, 1].
        mean: Mean of red, green and blue in [0, 1], subtracted at the end.
        std: Standard deviation of red, green and blue, by which the difference is divided.
        adds: Brightness is added instead of multiplied.
        hsv: Saturation scales HSV's S at constant value instead of blending with gray.
        channel_mean: Contrast blends with the mean of each channel instead of the mean gray.
        zero_border: The blur's border is zero instead of reflected.
        dtype: Type of the views, float32 or bfloat16.
        channels_last: Return the views in channels_last memory format, else in contiguous format.
    """
    n, _, height, width = pixels.shape
    area = height * width
    pixels = pixels.contiguous()
    parameters = upload(torch.from_numpy(table), pixels.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    views = torch.empty(pixels.shape, dtype=dtype, device=pixels.device, memory_format=layout)
    means = torch.empty(n, 3, device=pixels.device)
    buffers = torch.empty(2, num_blurred, 3, area, device=pixels.device)
    strides = (3, 1) if channels_last else (1, area)  # elements between pixels, between channels
    normalization = (*mean, *(1 / value for value in std))
    modes = {"ADDS": adds, "HSV": hsv}
    _means[(n,)](
        pixels,
        parameters,
        means,
        area,
        CHANNEL_MEAN=channel_mean,
        PIXELS=_MEAN_PIXELS,
        num_warps=8,
        **modes,
    )
    tile = {"PIXELS": _PIXELS, "num_warps": 4}
    outputs = (views, *strides, threshold, *normalization)
    _colors[(n, triton.cdiv(area, _PIXELS))](
        pixels, parameters, means, buffers, area, *outputs, **modes, **tile
    )
    if num_blurred:
        grid = (num_blurred, 3, triton.cdiv(area, _PIXELS))
        blur = {"TAPS": taps, "ZERO_BORDER": zero_border}
        _blur_rows[grid](buffers[0], buffers[1], parameters, height, width, **blur, **tile)
        _blur_columns[grid](buffers[1], parameters, height, width, *outputs, **blur, **tile)
    return views


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(red, green, blue):
    return red * 0.2989 + green * 0.587 + blue * 0.114


@triton.jit
def _load(pixels, image, place, mask, area):
    """Return red, green and blue in [0, 1] of the pixels `place` of an image."""
    at = pixels + image.to(tl.int64) * 3 * area + place
    red = tl.load(at, mask=mask, other=0).to(tl.float32) / 255.0
    green = tl.load(at + area, mask=mask, other=0).to(tl.float32) / 255.0
    blue = tl.load(at + 2 * area, mask=mask, other=0).to(tl.float32) / 255.0
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
        rest = _gray(red, green, blue) * (1.0 - factor)
        return (
            _clamp(red * factor + rest),
            _clamp(green * factor + rest),
            _clamp(blue * factor + rest),
        )


@triton.jit
def _turn_hue(red, green, blue, shift):
    """Rotate the hue by `shift` turns of HSV's hexagon, at constant value and chroma."""
    low = tl.minimum(tl.minimum(red, green), blue)
    high = tl.maximum(tl.maximum(red, green), blue)
    chroma = high - low
    safe = tl.maximum(chroma, 1.1754944e-38)  # gray has no hue: any will do, as chroma is 0
    sixths = tl.where(
        high == red,
        (green - blue) / safe,
        tl.where(high == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
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
    code,
    factor,
    mean_red,
    mean_green,
    mean_blue,
    ADDS: tl.constexpr,
    HSV: tl.constexpr,
):
    """Apply one stage of the jitter: 0 brightness, 1 contrast, 2 saturation, 3 hue, -1 nothing."""
    if code == 0:
        if ADDS:
            red, green, blue = _clamp(red + factor), _clamp(green + factor), _clamp(blue + factor)
        else:
            red, green, blue = _clamp(red * factor), _clamp(green * factor), _clamp(blue * factor)
    elif code == 1:
        rest = 1.0 - factor
        red = _clamp(red * factor + mean_red * rest)
        green = _clamp(green * factor + mean_green * rest)
        blue = _clamp(blue * factor + mean_blue * rest)
    elif code == 2:
        red, green, blue = _saturate(red, green, blue, factor, HSV)
    elif code == 3:
        red, green, blue = _turn_hue(red, green, blue, factor)
    return red, green, blue


@triton.jit
def _means(
    pixels,
    parameters,
    means,
    area,
    ADDS: tl.constexpr,
    HSV: tl.constexpr,
    CHANNEL_MEAN: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Store the mean with which each image's contrast blends, after the stages before contrast.

    Images without contrast are skipped.
    """
    image = tl.program_id(0)
    row = parameters + image * _COLUMNS
    stage = 4
    for k in tl.static_range(4):
        stage = tl.where(tl.load(row + k) == 1.0, k, stage)
    if stage < 4:
        red_sum = tl.zeros([PIXELS], tl.float32)
        green_sum = tl.zeros([PIXELS], tl.float32)
        blue_sum = tl.zeros([PIXELS], tl.float32)
        for start in range(0, area, PIXELS):
            place = start + tl.arange(0, PIXELS)
            mask = place < area
            red, green, blue = _load(pixels, image, place, mask, area)
            for k in tl.static_range(3):
                code = tl.where(k < stage, tl.load(row + k), -1.0).to(tl.int32)
                red, green, blue = _adjust(
                    red, green, blue, code, tl.load(row + _FACTORS + k), 0.0, 0.0, 0.0, ADDS, HSV
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
def _store_normalized(target, values, mean, over, mask):
    """Store (values - mean) * over, where `over` is 1 / std."""
    tl.store(target, ((values - mean) * over).to(target.dtype.element_ty), mask=mask)


@triton.jit
def _colors(
    pixels,
    parameters,
    means,
    buffer,
    area,
    views,
    pixel_stride,
    channel_stride,
    threshold,
    mean_red,
    mean_green,
    mean_blue,
    over_red,
    over_green,
    over_blue,
    ADDS: tl.constexpr,
    HSV: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Apply jitter and grayscale to a tile. Then finish it, or store it to be blurred."""
    image = tl.program_id(0)
    row = parameters + image * _COLUMNS
    place = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    mask = place < area
    red, green, blue = _load(pixels, image, place, mask, area)
    for k in tl.static_range(4):
        code = tl.load(row + k).to(tl.int32)
        first = tl.load(means + image * 3, mask=code == 1, other=0.0)
        second = tl.load(means + image * 3 + 1, mask=code == 1, other=0.0)
        third = tl.load(means + image * 3 + 2, mask=code == 1, other=0.0)
        red, green, blue = _adjust(
            red, green, blue, code, tl.load(row + _FACTORS + k), first, second, third, ADDS, HSV
        )
    if tl.load(row + _GRAYSCALE) > 0.0:
        gray = _gray(red, green, blue)
        red, green, blue = gray, gray, gray
    slot = tl.load(row + _SLOT).to(tl.int64)
    if slot >= 0:
        sharp = buffer + slot * 3 * area + place
        tl.store(sharp, red, mask=mask)
        tl.store(sharp + area, green, mask=mask)
        tl.store(sharp + 2 * area, blue, mask=mask)
    else:
        if tl.load(row + _SOLARIZE) > 0.0:
            red = _solarize(red, threshold)
            green = _solarize(green, threshold)
            blue = _solarize(blue, threshold)
        target = views + image.to(tl.int64) * 3 * area + place * pixel_stride
        _store_normalized(target, red, mean_red, over_red, mask)
        _store_normalized(target + channel_stride, green, mean_green, over_green, mask)
        _store_normalized(target + 2 * channel_stride, blue, mean_blue, over_blue, mask)


@triton.jit
def _blurred(
    source, along, length, step, mask, sigma, TAPS: tl.constexpr, ZERO_BORDER: tl.constexpr
):
    """Return the Gaussian mean along one axis.

    `along` is the place of each pixel on the axis, and `source` points to the start of the axis.
    """
    radius: tl.constexpr = TAPS // 2
    total = tl.zeros(along.shape, tl.float32)
    weights = 0.0
    for tap in range(TAPS):
        away = (tap - radius) / sigma
        weight = tl.exp(-0.5 * away * away)
        weights += weight
        at = along + tap - radius
        if ZERO_BORDER:
            values = tl.load(source + at * step, mask=mask & (at >= 0) & (at < length), other=0.0)
        else:
            at = tl.abs(at)
            at = tl.where(at < length, at, 2 * length - 2 - at)
            values = tl.load(source + at * step, mask=mask, other=0.0)
        total += values * weight
    return total / weights


@triton.jit
def _blur_tile(parameters, area, PIXELS: tl.constexpr):
    """Return image, channel, sigma, buffer offset, pixels and mask of a program's tile."""
    slot, channel = tl.program_id(0), tl.program_id(1)
    image = tl.load(parameters + slot * _COLUMNS + _VIEW_IN_SLOT).to(tl.int32)
    sigma = tl.load(parameters + image * _COLUMNS + _SIGMA)
    start = (slot.to(tl.int64) * 3 + channel) * area
    place = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    return image, channel, sigma, start, place, place < area


@triton.jit
def _blur_rows(
    buffer,
    blurred,
    parameters,
    height,
    width,
    TAPS: tl.constexpr,
    ZERO_BORDER: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Blur a tile of one channel along the rows, from the first buffer into the second."""
    _, _, sigma, start, place, mask = _blur_tile(parameters, height * width, PIXELS)
    x = place % width
    source = buffer + start + (place - x)
    values = _blurred(source, x, width, 1, mask, sigma, TAPS, ZERO_BORDER)
    tl.store(blurred + start + place, values, mask=mask)


@triton.jit
def _blur_columns(
    blurred,
    parameters,
    height,
    width,
    views,
    pixel_stride,
    channel_stride,
    threshold,
    mean_red,
    mean_green,
    mean_blue,
    over_red,
    over_green,
    over_blue,
    TAPS: tl.constexpr,
    ZERO_BORDER: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Blur a tile of one channel along the columns, solarize, normalize and store it."""
    area = height * width
    image, channel, sigma, start, place, mask = _blur_tile(parameters, area, PIXELS)
    source, y = blurred + start + place % width, place // width
    values = _blurred(source, y, height, width, mask, sigma, TAPS, ZERO_BORDER)
    if tl.load(parameters + image * _COLUMNS + _SOLARIZE) > 0.0:
        values = _solarize(values, threshold)
    mean = tl.where(channel == 0, mean_red, tl.where(channel == 1, mean_green, mean_blue))
    over = tl.where(channel == 0, over_red, tl.where(channel == 1, over_green, over_blue))
    target = views + image.to(tl.int64) * 3 * area
    target += place * pixel_stride + channel * channel_stride
    _store_normalized(target, values, mean, over, mask)
