"""`colour.apply` on the CPU, in machine code: image after image, so that each stays in the cache through all its operations.

Operation by operation over a batch, every image comes from memory and goes back a dozen times; here it does so once.
The arithmetic is `colour`'s, in float32; sums are taken in another order, which shows in the seventh digit.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ssl_pretrain.system.jit import njit

_CONTRACT = {
    "contract"
}  # a product and a sum may be rounded once: twice the speed, and nearer to the truth
_SUM = {"contract", "reassoc", "nsz"}  # sums in lanes
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
ZERO, ONE, TWO, THREE, FOUR, SIX = (np.float32(number) for number in (0, 1, 2, 3, 4, 6))
TINY = np.finfo(np.float32).tiny


def apply(
    pixels,
    jitter,
    order,
    factors,
    modes,
    strengths,
    grayscale,
    blur,
    sigma,
    taps,
    solarize,
    threshold,
    mean,
    std,
    num_threads,
    out,
):
    """Write the finished views to `out`, float32 (n, 3, height, width); see `colour.apply`. `num_threads` threads share the rows.

    modes: whether brightness is added, contrast keeps each channel's mean, saturation is HSV's, and the blur pads with zeros.
    """
    n = len(pixels)
    rows = max(1, -(-n // num_threads))
    scaled = (np.asarray(mean, np.float32), np.asarray(std, np.float32))
    parts = [slice(first, first + rows) for first in range(0, n, rows)]

    def part(rows):
        _apply(
            pixels[rows], jitter[rows], order[rows], factors[rows], modes, strengths, grayscale[rows], blur[rows], sigma[rows], taps,
            solarize[rows], np.float32(threshold), *scaled, out[rows],
        )  # fmt: skip

    if len(parts) < 2:
        for rows_of_it in parts:
            part(rows_of_it)
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(part, parts))


@njit(nogil=True, cache=True, error_model="numpy")
def _apply(
    pixels,
    jitter,
    order,
    factors,
    modes,
    strengths,
    grayscale,
    blur,
    sigma,
    taps,
    solarize,
    threshold,
    mean,
    std,
    out,
):
    adds, by_channel, in_hsv, zero_border = modes
    _, _, height, width = pixels.shape
    kernel = np.empty(taps, np.float32)
    padded = np.empty(width + taps, np.float32)
    rows = np.zeros(
        (height + 1, width), np.float32
    )  # the last one stays zero: what lies outside, for a zero border
    for number in range(len(pixels)):
        image = out[number].reshape(3, height * width)
        source = pixels[number].reshape(3, height * width)
        for channel in range(3):
            _to_unit(source[channel], image[channel])
        if jitter[number]:
            for stage in range(4):
                operation = order[number, stage]
                factor = factors[number, operation]
                if strengths[operation] == 0:
                    continue
                if operation == 0 and adds:
                    _shift(image.reshape(-1), factor)
                elif operation == 0:
                    _scale(image.reshape(-1), factor)
                elif operation == 1 and by_channel:
                    for channel in range(3):
                        _blend_with_mean(image[channel], factor, _mean(image[channel]))
                elif operation == 1:
                    _blend_with_mean(
                        image.reshape(-1), factor, _mean_grey(image[0], image[1], image[2])
                    )
                elif operation == 2 and in_hsv:
                    _scale_saturation(image[0], image[1], image[2], factor)
                elif operation == 2:
                    _blend_with_grey(image[0], image[1], image[2], factor)
                else:
                    _turn_hue(image[0], image[1], image[2], SIX * factor)
        if grayscale[number]:
            _to_grey(image[0], image[1], image[2])
        if blur[number]:
            _fill_kernel(kernel, sigma[number])
            for channel in range(3):
                _blur(out[number, channel], kernel, padded, rows, zero_border)
        for channel in range(3):
            _finish(image[channel], solarize[number], threshold, mean[channel], std[channel])


@njit(nogil=True, error_model="numpy")
def _to_unit(source, target):
    for i in range(len(source)):
        target[i] = np.float32(source[i]) / np.float32(255)


@njit(nogil=True)
def _scale(image, factor):
    for i in range(len(image)):
        image[i] = min(max(image[i] * factor, ZERO), ONE)


@njit(nogil=True)
def _shift(image, delta):
    for i in range(len(image)):
        image[i] = min(max(image[i] + delta, ZERO), ONE)


@njit(nogil=True, fastmath=_SUM)
def _mean_grey(red, green, blue):
    total = 0.0
    for first in range(0, len(red), 1024):  # short sums in float32, their sum in float64
        part = ZERO
        for i in range(first, min(first + 1024, len(red))):
            part += red[i] * RED + green[i] * GREEN + blue[i] * BLUE
        total += np.float64(part)
    return np.float32(total / len(red))


@njit(nogil=True, fastmath=_SUM)
def _mean(channel):
    total = 0.0
    for first in range(0, len(channel), 1024):
        part = ZERO
        for i in range(first, min(first + 1024, len(channel))):
            part += channel[i]
        total += np.float64(part)
    return np.float32(total / len(channel))


@njit(nogil=True, fastmath=_CONTRACT)
def _blend_with_mean(image, factor, mean):
    other = mean * (ONE - factor)
    for i in range(len(image)):
        image[i] = min(max(image[i] * factor + other, ZERO), ONE)


@njit(nogil=True, fastmath=_CONTRACT)
def _blend_with_grey(red, green, blue, factor):
    rest = ONE - factor
    for i in range(len(red)):
        grey = (red[i] * RED + green[i] * GREEN + blue[i] * BLUE) * rest
        red[i] = min(max(red[i] * factor + grey, ZERO), ONE)
        green[i] = min(max(green[i] * factor + grey, ZERO), ONE)
        blue[i] = min(max(blue[i] * factor + grey, ZERO), ONE)


@njit(nogil=True, error_model="numpy")
def _scale_saturation(red, green, blue, factor):
    """`colour._saturation_in_hsv`: the distances to the largest channel grow by one factor, until the smallest channel is 0."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        high = max(max(r, g), b)
        chroma = max(high - min(min(r, g), b), TINY)
        scale = min(factor, high / chroma)
        red[i] = min(max(high - (high - r) * scale, ZERO), ONE)
        green[i] = min(max(high - (high - g) * scale, ZERO), ONE)
        blue[i] = min(max(high - (high - b) * scale, ZERO), ONE)


@njit(nogil=True, error_model="numpy")
def _turn_hue(red, green, blue, turn):
    """`colour._hue`: sixths of the circle, without a branch, so that it runs in lanes."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        low, high = min(min(r, g), b), max(max(r, g), b)
        chroma = high - low
        safe = max(chroma, TINY)
        at_red, at_green, at_blue = (g - b) / safe, (b - r) / safe + TWO, (r - g) / safe + FOUR
        sixths = at_red if high == r else (at_green if high == g else at_blue)
        sixths = sixths + turn
        sixths = sixths - SIX * np.floor(sixths / SIX)
        red[i] = min(max(abs(sixths - THREE) - ONE, ZERO), ONE) * chroma + low
        green[i] = min(max(TWO - abs(sixths - TWO), ZERO), ONE) * chroma + low
        blue[i] = min(max(TWO - abs(sixths - FOUR), ZERO), ONE) * chroma + low


@njit(nogil=True)
def _to_grey(red, green, blue):
    for i in range(len(red)):
        grey = red[i] * RED + green[i] * GREEN + blue[i] * BLUE
        red[i], green[i], blue[i] = grey, grey, grey


@njit(nogil=True, error_model="numpy")
def _fill_kernel(kernel, sigma):
    radius, total = len(kernel) // 2, 0.0
    for tap in range(len(kernel)):
        kernel[tap] = np.exp(-0.5 * ((tap - radius) / sigma) ** 2)
        total += kernel[tap]
    for tap in range(len(kernel)):
        kernel[tap] = np.float32(kernel[tap] / total)


@njit(nogil=True)
def _blur(image, kernel, padded, rows, zero_border):
    """Along the rows, then along the columns. `rows` has one row more than the image, of zeros."""
    height, width = image.shape
    radius = len(kernel) // 2
    for y in range(height):
        if zero_border:
            padded[:radius] = ZERO
            padded[radius + width :] = ZERO
        for x in range(0 if zero_border else radius):
            padded[radius - 1 - x] = image[y, x + 1]
            padded[radius + width + x] = image[y, width - 2 - x]
        padded[radius : radius + width] = image[y]
        rows[y] = ZERO
        for tap in range(0, len(kernel) - 2, 3):
            _add_three(
                rows[y],
                padded[tap:],
                padded[tap + 1 :],
                padded[tap + 2 :],
                kernel[tap],
                kernel[tap + 1],
                kernel[tap + 2],
            )
        for tap in range(len(kernel) // 3 * 3, len(kernel)):
            _add_one(rows[y], padded[tap:], kernel[tap])
    for y in range(height):
        image[y] = ZERO
        for tap in range(0, len(kernel) - 2, 3):
            a, b, c = (
                rows[_inside(y + tap - radius, height, zero_border)],
                rows[_inside(y + tap + 1 - radius, height, zero_border)],
                rows[_inside(y + tap + 2 - radius, height, zero_border)],
            )
            _add_three(image[y], a, b, c, kernel[tap], kernel[tap + 1], kernel[tap + 2])
        for tap in range(len(kernel) // 3 * 3, len(kernel)):
            _add_one(image[y], rows[_inside(y + tap - radius, height, zero_border)], kernel[tap])


@njit(nogil=True)
def _inside(place, length, zero_border):
    """The row that stands at `place`: its reflection, or row `length`, of zeros, where it lies outside."""
    if zero_border:
        return place if 0 <= place < length else length
    place = abs(place)
    return place if place < length else 2 * length - 2 - place


@njit(nogil=True, fastmath=_CONTRACT)
def _add_three(target, a, b, c, w0, w1, w2):
    for i in range(len(target)):
        target[i] = ((target[i] + a[i] * w0) + b[i] * w1) + c[i] * w2


@njit(nogil=True, fastmath=_CONTRACT)
def _add_one(target, a, weight):
    for i in range(len(target)):
        target[i] += a[i] * weight


@njit(nogil=True, error_model="numpy")
def _finish(image, solarized, threshold, mean, std):
    if solarized:
        for i in range(len(image)):
            image[i] = ONE - image[i] if image[i] >= threshold else image[i]
    for i in range(len(image)):
        image[i] = (image[i] - mean) / std
