"""Apply the color operations of views on the CPU, in compiled code.

All operations are applied to one image before the next, so that each image stays in the processor's
cache. Otherwise each operation would read and write every image in memory. The arithmetic is that
of `color_torch`, in float32. Sums are computed in another order, which changes the seventh digit.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from ssl_pretrain.system.jit import njit
from ssl_pretrain.views.color_parameters import ColorParameters, jitter_strengths
from ssl_pretrain.views.recipe import Crop, blur_taps

# Flags for the compiler. `contract` lets it round a product and a sum together, which is twice as
# fast and more accurate. The others let it compute a sum in the lanes of a vector.
_CONTRACT = {"contract"}
_SUM = {"contract", "reassoc", "nsz"}
# With these flags, the code of a helper that is compiled alone differs from its code within
# `_apply`. A process that compiles would run the former, and a process that loads from the cache
# the latter. Every helper is inlined into `_apply`, so that both compute the same bits.
_helper = partial(njit, nogil=True, forceinline=True)
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
ZERO, ONE, TWO, THREE, FOUR, SIX = (np.float32(number) for number in (0, 1, 2, 3, 4, 6))
TINY = np.finfo(np.float32).tiny


def apply(
    pixels: np.ndarray,
    parameters: ColorParameters,
    crop: Crop,
    mean: np.ndarray,
    std: np.ndarray,
    num_threads: int,
    out: np.ndarray,
) -> None:
    """Apply the color operations, normalize, and write the views to `out`.

    Args:
        pixels: Crops, uint8 (n, C, height, width).
        parameters: Random parameters of the n views.
        crop: Recipe of the views.
        mean: Mean of each channel in [0, 1], float32 (C,).
        std: Standard deviation of each channel, float32 (C,).
        num_threads: Number of threads that share the images.
        out: Output, float32 (n, C, height, width).
    """
    recipe = (
        jitter_strengths(crop),
        crop.brightness_mode == "add",
        crop.contrast_mean == "channel",
        crop.saturation_mode == "hsv",
        blur_taps(crop),
        crop.blur_border == "zero",
        np.float32(crop.solarize_threshold),
        mean,
        std,
    )
    columns = (
        pixels,
        parameters.is_jittered,
        parameters.jitter_order,
        parameters.jitter_factors,
        parameters.is_gray,
        parameters.is_blurred,
        parameters.blur_sigma,
        parameters.is_solarized,
        out,
    )
    num_rows = max(1, -(-len(pixels) // num_threads))
    slices = [
        tuple(column[first : first + num_rows] for column in columns)
        for first in range(0, len(pixels), num_rows)
    ]
    if len(slices) == 1:
        _apply(recipe, slices[0])
    elif slices:
        with ThreadPoolExecutor(len(slices)) as pool:
            list(pool.map(partial(_apply, recipe), slices))


@njit(nogil=True, cache=True, error_model="numpy")
def _apply(recipe, rows):
    strengths, _, _, _, taps, zero_border, threshold, mean, std = recipe
    pixels, is_jittered, order, factors, is_gray, is_blurred, sigma, is_solarized, out = rows
    _, channels, height, width = pixels.shape
    kernel = np.empty(taps, np.float32)
    padded_row = np.empty(width + taps, np.float32)
    # The last row stays zero. It stands for the rows outside of the view if the border is zero.
    blurred_rows = np.zeros((height + 1, width), np.float32)
    for index in range(len(pixels)):
        image = out[index].reshape(channels, height * width)
        source = pixels[index].reshape(channels, height * width)
        for channel in range(channels):
            _scale_to_unit(source[channel], image[channel])
        if is_jittered[index]:
            for stage in range(4):
                operation = order[index, stage]
                if strengths[operation] != 0:
                    _adjust(image, operation, factors[index, operation], recipe)
        if is_gray[index]:
            _to_gray(image[0], image[1], image[2])
        if is_blurred[index]:
            _compute_kernel(kernel, sigma[index])
            for channel in range(channels):
                _blur(out[index, channel], kernel, padded_row, blurred_rows, zero_border)
        for channel in range(channels):
            _solarize_and_normalize(
                image[channel], is_solarized[index], threshold, mean[channel], std[channel]
            )


@_helper(error_model="numpy")
def _adjust(image, operation, factor, recipe):
    """Apply brightness (operation 0), contrast (1), saturation (2) or hue (3) of the jitter."""
    adds, by_channel, in_hsv = recipe[1], recipe[2], recipe[3]
    if operation == 0 and adds:
        _shift(image.reshape(-1), factor)
    elif operation == 0:
        _scale(image.reshape(-1), factor)
    elif operation == 1 and by_channel:
        for channel in range(len(image)):
            _blend_with_mean(image[channel], factor, _mean(image[channel]))
    elif operation == 1 and len(image) != 3:
        _blend_with_mean(image.reshape(-1), factor, _mean(image.reshape(-1)))
    elif operation == 1:
        mean = _mean_gray(image[0], image[1], image[2])
        _blend_with_mean(image.reshape(-1), factor, mean)
    elif operation == 2 and in_hsv:
        _scale_saturation(image[0], image[1], image[2], factor)
    elif operation == 2:
        _blend_with_gray(image[0], image[1], image[2], factor)
    else:
        _rotate_hue(image[0], image[1], image[2], SIX * factor)


@_helper(error_model="numpy")
def _scale_to_unit(source, target):
    for i in range(len(source)):
        target[i] = np.float32(source[i]) / np.float32(255)


@_helper()
def _scale(image, factor):
    for i in range(len(image)):
        image[i] = min(max(image[i] * factor, ZERO), ONE)


@_helper()
def _shift(image, delta):
    for i in range(len(image)):
        image[i] = min(max(image[i] + delta, ZERO), ONE)


@_helper(fastmath=_SUM)
def _mean_gray(red, green, blue):
    total = 0.0
    for first in range(0, len(red), 1024):  # sums of 1024 values in float32 are added in float64
        partial_sum = ZERO
        for i in range(first, min(first + 1024, len(red))):
            partial_sum += red[i] * RED + green[i] * GREEN + blue[i] * BLUE
        total += np.float64(partial_sum)
    return np.float32(total / len(red))


@_helper(fastmath=_SUM)
def _mean(channel):
    total = 0.0
    for first in range(0, len(channel), 1024):
        partial_sum = ZERO
        for i in range(first, min(first + 1024, len(channel))):
            partial_sum += channel[i]
        total += np.float64(partial_sum)
    return np.float32(total / len(channel))


@_helper(fastmath=_CONTRACT)
def _blend_with_mean(image, factor, mean):
    offset = mean * (ONE - factor)
    for i in range(len(image)):
        image[i] = min(max(image[i] * factor + offset, ZERO), ONE)


@_helper(fastmath=_CONTRACT)
def _blend_with_gray(red, green, blue, factor):
    gray_weight = ONE - factor
    for i in range(len(red)):
        gray = (red[i] * RED + green[i] * GREEN + blue[i] * BLUE) * gray_weight
        red[i] = min(max(red[i] * factor + gray, ZERO), ONE)
        green[i] = min(max(green[i] * factor + gray, ZERO), ONE)
        blue[i] = min(max(blue[i] * factor + gray, ZERO), ONE)


@_helper(error_model="numpy")
def _scale_saturation(red, green, blue, factor):
    """Multiply the saturation of HSV at constant hue and value, as in `color_torch`."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        high = max(max(r, g), b)
        chroma = max(high - min(min(r, g), b), TINY)
        scale = min(factor, high / chroma)
        red[i] = min(max(high - (high - r) * scale, ZERO), ONE)
        green[i] = min(max(high - (high - g) * scale, ZERO), ONE)
        blue[i] = min(max(high - (high - b) * scale, ZERO), ONE)


@_helper(error_model="numpy")
def _rotate_hue(red, green, blue, shift):
    """Rotate the hue by `shift` sixths of a turn. The loop has no branches and is vectorized."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        low, high = min(min(r, g), b), max(max(r, g), b)
        chroma = high - low
        divisor = max(chroma, TINY)
        from_red, from_green = (g - b) / divisor, (b - r) / divisor + TWO
        from_blue = (r - g) / divisor + FOUR
        sixths = from_red if high == r else (from_green if high == g else from_blue)
        sixths = sixths + shift
        sixths = sixths - SIX * np.floor(sixths / SIX)
        red[i] = min(max(abs(sixths - THREE) - ONE, ZERO), ONE) * chroma + low
        green[i] = min(max(TWO - abs(sixths - TWO), ZERO), ONE) * chroma + low
        blue[i] = min(max(TWO - abs(sixths - FOUR), ZERO), ONE) * chroma + low


@_helper()
def _to_gray(red, green, blue):
    for i in range(len(red)):
        gray = red[i] * RED + green[i] * GREEN + blue[i] * BLUE
        red[i], green[i], blue[i] = gray, gray, gray


@_helper(error_model="numpy")
def _compute_kernel(kernel, sigma):
    radius, total = len(kernel) // 2, 0.0
    for tap in range(len(kernel)):
        kernel[tap] = np.exp(-0.5 * ((tap - radius) / sigma) ** 2)
        total += kernel[tap]
    for tap in range(len(kernel)):
        kernel[tap] = np.float32(kernel[tap] / total)


@_helper()
def _blur(image, kernel, padded_row, blurred_rows, zero_border):
    """Blur along the rows, then along the columns. The last of the `blurred_rows` is zero."""
    height, width = image.shape
    radius = len(kernel) // 2
    for y in range(height):
        if zero_border:
            padded_row[:radius] = ZERO
            padded_row[radius + width :] = ZERO
        for x in range(0 if zero_border else radius):
            padded_row[radius - 1 - x] = image[y, x + 1]
            padded_row[radius + width + x] = image[y, width - 2 - x]
        for x in range(width):  # numba copies a slice of an array 30 times slower
            padded_row[radius + x] = image[y, x]
        blurred_rows[y] = ZERO
        for tap in range(0, len(kernel) - 2, 3):
            a, b, c = padded_row[tap:], padded_row[tap + 1 :], padded_row[tap + 2 :]
            _add_three(blurred_rows[y], a, b, c, kernel[tap], kernel[tap + 1], kernel[tap + 2])
        for tap in range(len(kernel) // 3 * 3, len(kernel)):
            _add_one(blurred_rows[y], padded_row[tap:], kernel[tap])
    for y in range(height):
        image[y] = ZERO
        for tap in range(0, len(kernel) - 2, 3):
            first = y + tap - radius
            a = blurred_rows[_row_inside(first, height, zero_border)]
            b = blurred_rows[_row_inside(first + 1, height, zero_border)]
            c = blurred_rows[_row_inside(first + 2, height, zero_border)]
            _add_three(image[y], a, b, c, kernel[tap], kernel[tap + 1], kernel[tap + 2])
        for tap in range(len(kernel) // 3 * 3, len(kernel)):
            row = blurred_rows[_row_inside(y + tap - radius, height, zero_border)]
            _add_one(image[y], row, kernel[tap])


@_helper()
def _row_inside(row, length, zero_border):
    """Map a row outside of the image to its reflection, or to row `length`, which is zero."""
    if zero_border:
        return row if 0 <= row < length else length
    row = abs(row)
    return row if row < length else 2 * length - 2 - row


@_helper(fastmath=_CONTRACT)
def _add_three(target, a, b, c, w0, w1, w2):
    for i in range(len(target)):
        target[i] = ((target[i] + a[i] * w0) + b[i] * w1) + c[i] * w2


@_helper(fastmath=_CONTRACT)
def _add_one(target, a, weight):
    for i in range(len(target)):
        target[i] += a[i] * weight


@_helper(error_model="numpy")
def _solarize_and_normalize(image, is_solarized, threshold, mean, std):
    if is_solarized:
        for i in range(len(image)):
            image[i] = ONE - image[i] if image[i] >= threshold else image[i]
    for i in range(len(image)):
        image[i] = (image[i] - mean) / std
