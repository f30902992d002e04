"""The view functions of SimCLR's and BYOL's code in plain numpy and float64.

They follow the published formulas and process one image at a time. They were compared once with
TensorFlow 2.21. Contrast, saturation, blur and resize agree within 0.2 gray levels of 255, and
boxes agree in distribution. All images are float (height, width, 3).
"""

import numpy as np

# google-research/simclr, tf2/data_util.py: crop_and_resize
MIN_OBJECT_COVERED, MAX_ATTEMPTS = 0.1, 100


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """tf.image.adjust_contrast, and adjust_contrast of byol/utils/augmentations.py."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * factor + mean


def rgb_to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hue in [0, 1), saturation and value, as Smith (SIGGRAPH 1978) defines them."""
    red, green, blue = np.moveaxis(image, -1, 0)
    value, chroma = image.max(axis=-1), np.ptp(image, axis=-1)
    divisor = np.where(chroma > 0, chroma, 1)
    sector = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    return (sector / 6) % 1, chroma / np.where(value > 0, value, 1), value


def hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    channels = []
    for corner in (5, 3, 1):
        k = (corner + 6 * hue) % 6
        channels.append(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(channels, axis=-1)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """tf.image.adjust_saturation, and adjust_saturation of byol/utils/augmentations.py."""
    hue, saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb(hue, np.clip(saturation * factor, 0, 1), value)


def gaussian_blur(image: np.ndarray, sigma: float, taps: int) -> np.ndarray:
    """gaussian_blur of simclr/tf2/data_util.py: padding='SAME', which is zeros."""
    radius = taps // 2
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padding = [(0, 0)] * 3
        padding[axis] = (radius, radius)
        padded, length = np.pad(image, padding), image.shape[axis]
        shifted_images = (padded.take(range(k, k + length), axis=axis) for k in range(taps))
        image = sum(weight * shifted_image for weight, shifted_image in zip(kernel, shifted_images))
    return image


def resize(image: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """tf.image.resize(image, [size, size], interpolation), antialias=False, not clipped."""
    for axis in (0, 1):
        image = np.tensordot(
            _compute_weights(image.shape[axis], size, interpolation), image, axes=([1], [axis])
        )
        image = np.moveaxis(image, 0, axis)
    return image


def _compute_weights(length: int, size: int, interpolation: str) -> np.ndarray:
    centers = (np.arange(size) + 0.5) * length / size - 0.5
    distance = np.abs(centers[:, None] - np.arange(length))
    if interpolation == "bilinear":
        weights = np.maximum(0, 1 - distance)
    else:  # Keys' cubic, a = -1/2
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def simclr_boxes(
    n: int,
    height: int,
    width: int,
    seed: int,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Draw boxes as SimCLR does: tf.image.sample_distorted_bounding_box. int (n, 4), like `Box`.

    All boxes that do not fit yet are drawn again together. The ratio is uniform. The height is
    uniform among the integers from round(sqrt(min_area / ratio)) to the largest height whose area
    is at most max_area and whose width, round(height * ratio), fits into the image.
    """
    generator = np.random.default_rng(seed)
    boxes = np.tile([0, 0, height, width], (n, 1))
    min_area, max_area = area[0] * height * width, area[1] * height * width
    pending = np.arange(n)
    for _ in range(MAX_ATTEMPTS):
        ratios = generator.uniform(*ratio, len(pending))
        heights = np.arange(1, height + 1)
        max_heights = np.minimum(np.rint(np.sqrt(max_area / ratios)), height)
        fits = np.rint(heights * ratios[:, None]) <= width
        max_heights = np.minimum(max_heights, np.where(fits, heights, 0).max(axis=1)).astype(int)
        min_heights = np.minimum(np.rint(np.sqrt(min_area / ratios)), max_heights).astype(int)
        box_heights = generator.integers(min_heights, max_heights + 1)
        box_heights = np.where(
            np.rint(box_heights * ratios) * box_heights < min_area, box_heights + 1, box_heights
        )
        box_heights = np.where(
            np.rint(box_heights * ratios) * box_heights > max_area, box_heights - 1, box_heights
        )
        widths = np.rint(box_heights * ratios).astype(int)
        areas = box_heights * widths
        is_valid = (
            (min_area <= areas)
            & (areas <= max_area)
            & (areas >= MIN_OBJECT_COVERED * height * width)
        )
        is_valid &= (widths <= width) & (box_heights <= height) & (widths > 0) & (box_heights > 0)
        box_heights, widths = box_heights[is_valid], widths[is_valid]
        tops = generator.integers(0, np.maximum(1, height - box_heights))
        lefts = generator.integers(0, np.maximum(1, width - widths))
        boxes[pending[is_valid]] = np.stack([tops, lefts, box_heights, widths], axis=1)
        pending = pending[~is_valid]
    return boxes


def byol_boxes(n: int, height: int, width: int, seed: int) -> np.ndarray:
    """_decode_and_random_crop of byol/utils/dataset.py: int (n, 4), top, left, height, width."""
    generator = np.random.default_rng(seed)
    areas = generator.uniform(0.08, 1.0, n) * height * width
    ratios = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3), n))
    widths = np.minimum(np.rint(np.sqrt(areas * ratios)), width).astype(int)
    heights = np.minimum(np.rint(np.sqrt(areas / ratios)), height).astype(int)
    return np.stack(
        [
            generator.integers(0, height - heights + 1),
            generator.integers(0, width - widths + 1),
            heights,
            widths,
        ],
        axis=1,
    )
