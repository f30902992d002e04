"""Common corruptions of images at five severities (Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261).

Written from the definitions and constants of hendrycks/robustness at its `create_c` scripts: those of CIFAR-10-C for images
of up to SMALL pixels, those of ImageNet-C above. Twelve of the fifteen: snow and motion blur are ImageMagick's, frost needs
the authors' photographs. Each is a pure function of (image, severity, number of the image, seed); all severities of an image
use the same draws.

Elastic transformation interpolates exactly where OpenCV rounds places to 1/32 pixel; the random numbers are not numpy's.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage, special, stats

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose
from ssl_pretrain.system.jit import njit

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 64


@dataclass
class Draws:
    """Uniform numbers in [0, 1) of one corruption of one image, one after the other."""

    seed: int
    index: int
    number: int  # of the corruption
    taken: int = 0

    def uniform(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        lanes = rng.uniform(
            self.seed, 0, self.index, self.number, Purpose.CORRUPTION, self.taken + count
        )[0, self.taken :]
        self.taken += count
        return lanes.reshape(shape)

    def normal(self, *shape: int) -> np.ndarray:
        return special.ndtri(self.uniform(*shape).clip(1e-12, 1 - 1e-12))


Corruption = Callable[
    [np.ndarray, int, Draws], np.ndarray
]  # float64 (h, w, 3) in [0, 1], severity, draws -> the same, unclipped


def apply(name: str, image: np.ndarray, severity: int, index: int, seed: int = 0) -> np.ndarray:
    """The image, uint8 (height, width, 3), corrupted: the same kind.

    Args:
        name: one of NAMES.
        severity: 1 to 5.
        index: the image's number in its data set, which names its draws.

    Raises:
        ValueError: no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption: {name!r} is none; choose among: {', '.join(NAMES)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: {severity} is not one of 1 to 5")
    corrupted = CORRUPTIONS[name](image / 255.0, severity, Draws(seed, index, NAMES.index(name)))
    return (corrupted.clip(0, 1) * 255).astype(np.uint8)  # cut off, as the authors do


def of_size(image: np.ndarray, severity: int, small: tuple, large: tuple):
    """The constant for the severity: CIFAR-10-C's or ImageNet-C's."""
    return (small if max(image.shape[:2]) <= SMALL else large)[severity - 1]


def gaussian_noise(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    return image + drawn.normal(*image.shape) * of_size(
        image, severity, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)
    )


def shot_noise(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    photons = of_size(image, severity, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3))
    return stats.poisson.ppf(drawn.uniform(*image.shape), image * photons).clip(min=0) / photons


def impulse_noise(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    share = of_size(image, severity, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))
    hit, white = drawn.uniform(*image.shape) < share, drawn.uniform(*image.shape) < 0.5
    return np.where(hit, white, image)


def defocus_blur(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    radius, alias = of_size(
        image,
        severity,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    )
    kernel = disk(radius, alias)
    return np.stack(
        [ndimage.correlate(image[..., channel], kernel, mode="mirror") for channel in range(3)],
        axis=-1,
    )


def disk(radius: float, alias: float) -> np.ndarray:
    """A disk of total weight 1 whose edge is then smoothed by a Gaussian of deviation `alias`, over 3 places, 5 for a large one."""
    reach, taps = (8, 1) if radius <= 8 else (radius, 2)
    places = np.arange(-reach, reach + 1)
    inside = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float64)
    inside /= inside.sum()
    weights = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * alias**2))
    for axis in (0, 1):
        inside = ndimage.correlate1d(inside, weights / weights.sum(), axis=axis, mode="mirror")
    return inside


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def glass_blur(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    sigma, reach, rounds = of_size(
        image, severity, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    )  # fmt: skip
    pixels = (blurred(image, sigma) * 255).astype(np.uint8)
    height, width = pixels.shape[:2]
    moves = np.floor(drawn.uniform(rounds, height, width, 2) * 2 * reach).astype(np.int64) - reach
    _exchange(pixels, moves, reach)
    return blurred(pixels / 255.0, sigma)


@njit(cache=True, nogil=True)
def _exchange(pixels, moves, reach):
    """Each pixel, from the last to the first, changes places with one near it."""
    height, width, channels = pixels.shape
    for turn in range(moves.shape[0]):
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                if row >= height or column >= width:
                    continue
                other_row, other_column = (
                    row + moves[turn, row, column, 1],
                    column + moves[turn, row, column, 0],
                )
                for channel in range(channels):
                    kept = pixels[row, column, channel]
                    pixels[row, column, channel] = pixels[other_row, other_column, channel]
                    pixels[other_row, other_column, channel] = kept


def zoom_blur(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    end, step = of_size(
        image, severity, ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    )  # fmt: skip
    factors = np.arange(1, end, step)
    return (image + sum(zoomed(image, factor) for factor in factors)) / (len(factors) + 1)


def zoomed(image: np.ndarray, factor: float) -> np.ndarray:
    """The middle of a square image enlarged to its own size."""
    side = len(image)
    kept = int(np.ceil(side / factor))
    first = (side - kept) // 2
    larger = ndimage.zoom(
        image[first : first + kept, first : first + kept], (factor, factor, 1), order=1
    )
    first = (len(larger) - side) // 2
    return larger[first : first + side, first : first + side]


def fog(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    amount, decay = of_size(
        image,
        severity,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    )
    height, width = image.shape[:2]
    clouds = plasma(1 << (max(height, width) - 1).bit_length(), decay, drawn)[:height, :width, None]
    return (image + amount * clouds) * image.max() / (image.max() + amount)


def plasma(side: int, decay: float, drawn: Draws) -> np.ndarray:
    """Clouds in [0, 1], (side, side), by midpoint displacement on a torus: the noise falls by `decay` a level."""
    grid, noise, step = np.zeros((side, side)), 100.0, side

    def displaced(total: np.ndarray) -> np.ndarray:
        return total / 4 + noise * noise * (2 * drawn.uniform(*total.shape) - 1)

    while step >= 2:
        half = step // 2
        corners = grid[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        centres = displaced(pairs + np.roll(pairs, -1, axis=1))
        grid[half::step, half::step] = centres
        grid[::step, half::step] = displaced(
            centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        )
        grid[half::step, ::step] = displaced(
            centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        )
        step, noise = half, noise / decay
    grid -= grid.min()
    return grid / grid.max()


def brightness(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    """The value of hue, saturation and value raised: each pixel scaled, black ones grey."""
    value = image.max(axis=-1, keepdims=True)
    raised = (
        value + of_size(image, severity, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))
    ).clip(max=1)
    return np.where(value > 0, image / np.where(value > 0, value, 1), 1.0) * raised


def contrast(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * of_size(
        image, severity, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)
    ) + mean


def elastic_transform(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    side = min(image.shape[:2])
    small = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )
    wide = (
        (2, 0.7, 0.1),
        (2, 0.08, 0.2),
        (0.05, 0.01, 0.02),
        (0.07, 0.01, 0.02),
        (0.12, 0.01, 0.02),
    )
    unit = (
        side if side <= SMALL else side * 244 / 224
    )  # the authors' constants are of 244 pixels, at images of 224
    strength, sigma, affine = (unit * share for share in of_size(image, severity, small, wide))
    rows, columns = np.meshgrid(*(np.arange(length) for length in image.shape[:2]), indexing="ij")
    centre, third = np.array(image.shape[:2]) // 2, side // 3
    corners = np.array(
        [centre + third, [centre[0] + third, centre[1] - third], centre - third], dtype=np.float64
    )  # as (x, y)
    moved = corners + affine * (2 * drawn.uniform(3, 2) - 1)
    back = np.linalg.solve(
        np.column_stack([moved, np.ones(3)]), corners
    )  # from a place of the result to the image's
    x, y = np.moveaxis(np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back, -1, 0)
    bent = sampled(image, y, x, "mirror")
    across, down = (
        ndimage.gaussian_filter(
            2 * drawn.uniform(*image.shape[:2]) - 1, sigma, mode="reflect", truncate=3
        )
        * strength
        for _ in range(2)
    )
    return sampled(bent, rows + down, columns + across, "reflect")


def sampled(image: np.ndarray, rows: np.ndarray, columns: np.ndarray, mode: str) -> np.ndarray:
    """The image at these places, linear between pixels."""
    return np.stack(
        [
            ndimage.map_coordinates(image[..., channel], [rows, columns], order=1, mode=mode)
            for channel in range(3)
        ],
        axis=-1,
    )


def pixelate(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    share = of_size(image, severity, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))
    height, width = image.shape[:2]
    whole = Image.fromarray(np.rint(image * 255).astype(np.uint8))
    fewer = whole.resize(
        (max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX
    )
    return np.asarray(fewer.resize((width, height), Image.Resampling.BOX)) / 255.0


def jpeg_compression(image: np.ndarray, severity: int, drawn: Draws) -> np.ndarray:
    quality = of_size(image, severity, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7))
    content = io.BytesIO()
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(content, "JPEG", quality=quality)
    return np.asarray(Image.open(content)) / 255.0


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, zoom_blur, fog, brightness, contrast, elastic_transform,
        pixelate, jpeg_compression,
    )
}  # fmt: skip
NAMES = tuple(CORRUPTIONS)
