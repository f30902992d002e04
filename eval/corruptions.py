"""Common corruptions of images (Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261).

The definitions and constants are those of the `create_c` scripts in hendrycks/robustness. Images
whose longer side is at most MAX_SMALL_IMAGE_SIDE use the constants of CIFAR-10-C, and larger images
use those of ImageNet-C. Twelve of the fifteen corruptions are implemented. Snow and motion blur
need ImageMagick, and frost needs the authors' photographs.

A corrupted image depends only on the image, its index, the severity and the seed. All severities of
an image use the same counter-based random numbers. The elastic transform interpolates at exact
positions, whereas the authors' OpenCV rounds positions to 1/32 pixel.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage, special, stats

from ssl_pretrain import rng as counter_rng
from ssl_pretrain.system.jit import njit

SEVERITIES = (1, 2, 3, 4, 5)
# Images whose longer side is at most this many pixels use the constants of CIFAR-10-C.
MAX_SMALL_IMAGE_SIDE = 64


@dataclass
class ImageRng:
    """Counter-based random numbers for one corruption of one image."""

    seed: int
    image_index: int  # position of the image in its data set
    corruption_index: int  # position of the corruption in NAMES
    num_used: int = 0  # numbers returned so far

    def uniform(self, *shape: int) -> np.ndarray:
        """Return the next numbers from the uniform distribution on [0, 1)."""
        start, self.num_used = self.num_used, self.num_used + int(np.prod(shape))
        numbers = counter_rng.uniform(
            self.seed,
            0,
            self.image_index,
            self.corruption_index,
            counter_rng.Purpose.CORRUPTION,
            self.num_used,
        )
        return numbers[0, start:].reshape(shape)

    def normal(self, *shape: int) -> np.ndarray:
        """Return the next numbers from the standard normal distribution."""
        return special.ndtri(self.uniform(*shape).clip(1e-12, 1 - 1e-12))


def apply(name: str, image: np.ndarray, severity: int, index: int, seed: int = 0) -> np.ndarray:
    """Return the corrupted image, uint8 (height, width, channels).

    Args:
        name: Name of the corruption, one of NAMES.
        image: Image, uint8 (height, width, channels).
        severity: Severity from 1 to 5.
        index: Index of the image in its data set. The random numbers depend on it and on the seed.
        seed: Seed of the random numbers.

    Raises:
        ValueError: If the corruption or the severity is unknown.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption: {name!r} is unknown; choose among: {', '.join(NAMES)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: {severity} is out of range; choose 1 to 5")
    corruption, is_small = CORRUPTIONS[name], max(image.shape[:2]) <= MAX_SMALL_IMAGE_SIDE
    constants = corruption.cifar10_c if is_small else corruption.imagenet_c
    rng = ImageRng(seed, index, NAMES.index(name))
    corrupted = corruption.function(image / 255.0, constants[severity - 1], rng)
    return (corrupted.clip(0, 1) * 255).astype(np.uint8)  # truncates like the authors' code


# Each corruption below takes an image, float64 (height, width, channels) in [0, 1], the constants
# of one severity, and random numbers. It returns the corrupted image, which `apply` clips.


def gaussian_noise(image: np.ndarray, std: float, rng: ImageRng) -> np.ndarray:
    """Add Gaussian noise of standard deviation `std` to every value."""
    return image + rng.normal(*image.shape) * std


def shot_noise(image: np.ndarray, photons: float, rng: ImageRng) -> np.ndarray:
    """Add Poisson noise, where `photons` is the mean photon count of a value of 1."""
    return stats.poisson.ppf(rng.uniform(*image.shape), image * photons).clip(min=0) / photons


def impulse_noise(image: np.ndarray, probability: float, rng: ImageRng) -> np.ndarray:
    """Set each value to 0 or 1 with this probability, independently in each channel."""
    is_noise, is_white = rng.uniform(*image.shape) < probability, rng.uniform(*image.shape) < 0.5
    return np.where(is_noise, is_white, image)


def defocus_blur(image: np.ndarray, constants: tuple[float, float], rng: ImageRng) -> np.ndarray:
    """Blur with a disk. `constants` consists of `radius` and `sigma`, the arguments of `disk`."""
    return ndimage.correlate(image, disk(*constants)[..., None], mode="mirror")


def disk(radius: float, sigma: float) -> np.ndarray:
    """Return a disk-shaped kernel whose weights sum to 1, smoothed by a Gaussian.

    Args:
        radius: Radius of the disk in pixels.
        sigma: Standard deviation of the Gaussian in pixels. Its kernel is 3 pixels wide, or 5 if
            the radius exceeds 8.
    """
    disk_half_width, gaussian_half_width = (8, 1) if radius <= 8 else (radius, 2)
    positions = np.arange(-disk_half_width, disk_half_width + 1)
    kernel = (positions[:, None] ** 2 + positions**2 <= radius**2).astype(np.float64)
    kernel /= kernel.sum()
    offsets = np.arange(-gaussian_half_width, gaussian_half_width + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    for axis in (0, 1):
        kernel = ndimage.correlate1d(kernel, weights / weights.sum(), axis=axis, mode="mirror")
    return kernel


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur each channel with a Gaussian of standard deviation `sigma` in pixels."""
    return ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def glass_blur(image: np.ndarray, constants: tuple[float, int, int], rng: ImageRng) -> np.ndarray:
    """Blur, swap pixels with random neighbors, and blur once more.

    `constants` consists of the blur's standard deviation in pixels, the largest swap distance along
    each axis in pixels, and the number of rounds.
    """
    sigma, max_distance, num_rounds = constants
    pixels = (gaussian_blur(image, sigma) * 255).astype(np.uint8)
    offsets = np.floor(rng.uniform(num_rounds, *image.shape[:2], 2) * 2 * max_distance)
    _swap_pixels(pixels, offsets.astype(np.int64) - max_distance, max_distance)
    return gaussian_blur(pixels / 255.0, sigma)


@njit(cache=True, nogil=True)
def _swap_pixels(pixels, offsets, max_distance):
    """Swap each pixel in place with the one at its offset (x, y), starting at the last pixel."""
    height, width, num_channels = pixels.shape
    for swap_round in range(offsets.shape[0]):
        for row in range(min(height - max_distance, height - 1), max_distance, -1):
            for column in range(min(width - max_distance, width - 1), max_distance, -1):
                other_row = row + offsets[swap_round, row, column, 1]
                other_column = column + offsets[swap_round, row, column, 0]
                for channel in range(num_channels):
                    value = pixels[row, column, channel]
                    pixels[row, column, channel] = pixels[other_row, other_column, channel]
                    pixels[other_row, other_column, channel] = value


def zoom_blur(image: np.ndarray, constants: tuple[float, float], rng: ImageRng) -> np.ndarray:
    """Average an image with enlarged copies of its center.

    The zoom factors start at 1. `constants` consists of their end (exclusive) and their step.
    """
    factors = np.arange(1, *constants)
    return (image + sum(enlarge(image, factor) for factor in factors)) / (len(factors) + 1)


def enlarge(image: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge the center of an image by this factor, to the size of the image."""
    height, width = image.shape[:2]
    center = cut_center(image, int(np.ceil(height / factor)), int(np.ceil(width / factor)))
    return cut_center(ndimage.zoom(center, (factor, factor, 1), order=1), height, width)


def cut_center(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the central part of an image."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def fog(image: np.ndarray, constants: tuple[float, float], rng: ImageRng) -> np.ndarray:
    """Add clouds, and scale the image so that its maximum does not grow.

    `constants` consists of the amount of fog and the `decay` that `plasma_fractal` takes.
    """
    amount, decay = constants
    height, width = image.shape[:2]
    side = 1 << (max(height, width) - 1).bit_length()
    clouds = plasma_fractal(side, decay, rng)[:height, :width, None]
    return (image + amount * clouds) * image.max() / (image.max() + amount)


def plasma_fractal(side: int, decay: float, rng: ImageRng) -> np.ndarray:
    """Return clouds in [0, 1], (side, side), by midpoint displacement on a torus.

    Each finer level divides the noise by `decay`.
    """
    grid, noise, step = np.zeros((side, side)), 100.0, side

    def displace(neighbor_sums: np.ndarray) -> np.ndarray:
        shape = neighbor_sums.shape
        return neighbor_sums / 4 + noise * noise * (2 * rng.uniform(*shape) - 1)

    while step >= 2:
        half = step // 2
        corners = grid[::step, ::step]
        corner_pairs = corners + np.roll(corners, -1, axis=0)
        centers = displace(corner_pairs + np.roll(corner_pairs, -1, axis=1))
        vertical_pairs = centers + np.roll(centers, 1, axis=0)
        horizontal_pairs = centers + np.roll(centers, 1, axis=1)
        grid[half::step, half::step] = centers
        grid[::step, half::step] = displace(vertical_pairs + corners + np.roll(corners, -1, axis=1))
        grid[half::step, ::step] = displace(
            horizontal_pairs + corners + np.roll(corners, -1, axis=0)
        )
        step, noise = half, noise / decay
    grid -= grid.min()
    return grid / grid.max()


def brightness(image: np.ndarray, amount: float, rng: ImageRng) -> np.ndarray:
    """Scale each pixel so that its HSV value grows by `amount`. Black becomes gray.

    The HSV value is the largest of the channels, whatever their number.
    """
    value = image.max(axis=-1, keepdims=True)
    scaled = np.where(value > 0, image / np.where(value > 0, value, 1), 1.0)
    return scaled * (value + amount).clip(max=1)


def contrast(image: np.ndarray, factor: float, rng: ImageRng) -> np.ndarray:
    """Scale the distance of every value to its channel's mean by `factor`."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * factor + mean


def elastic_transform(
    image: np.ndarray, constants: tuple[float, float, float], rng: ImageRng
) -> np.ndarray:
    """Apply a random affine map, and displace every pixel by smooth noise.

    `constants` consists of the amplitude of the noise, the standard deviation of the Gaussian that
    smooths it, and the largest shift of the three points that define the affine map. All three are
    fractions of the shorter side.
    """
    side = min(image.shape[:2])
    # The authors' ImageNet-C constants are multiples of 244, although their images have 224 pixels.
    unit = side if side <= MAX_SMALL_IMAGE_SIDE else side * 244 / 224
    amplitude, sigma, max_shift = (unit * constant for constant in constants)
    rows, columns = np.meshgrid(*(np.arange(length) for length in image.shape[:2]), indexing="ij")
    center, distance = np.array(image.shape[:2]) // 2, side // 3
    corners = center + distance * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])  # (x, y)
    shifted_corners = corners + max_shift * (2 * rng.uniform(3, 2) - 1)
    to_source = np.linalg.solve(np.column_stack([shifted_corners, np.ones(3)]), corners)
    homogeneous = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
    x, y = np.moveaxis(homogeneous @ to_source, -1, 0)
    image = interpolate(image, y, x, "mirror")
    x_shift, y_shift = (
        amplitude
        * ndimage.gaussian_filter(
            2 * rng.uniform(*rows.shape) - 1, sigma, mode="reflect", truncate=3
        )
        for _ in range(2)
    )
    return interpolate(image, rows + y_shift, columns + x_shift, "reflect")


def interpolate(image: np.ndarray, rows: np.ndarray, columns: np.ndarray, mode: str) -> np.ndarray:
    """Interpolate the image linearly at these positions. `mode` is SciPy's boundary mode."""
    return np.stack(
        [
            ndimage.map_coordinates(channel, [rows, columns], order=1, mode=mode)
            for channel in np.moveaxis(image, -1, 0)
        ],
        axis=-1,
    )


def pixelate(image: np.ndarray, scale: float, rng: ImageRng) -> np.ndarray:
    """Shrink both sides by the factor `scale` and enlarge them again, with box filters."""
    height, width = image.shape[:2]
    small_size = max(1, int(width * scale)), max(1, int(height * scale))

    def pixelate_picture(picture: Image.Image) -> Image.Image:
        small = picture.resize(small_size, Image.Resampling.BOX)
        return small.resize((width, height), Image.Resampling.BOX)

    return _apply_to_pictures(pixelate_picture, image)


def jpeg_compression(image: np.ndarray, quality: int, rng: ImageRng) -> np.ndarray:
    """Encode as JPEG with Pillow's `quality`, and decode."""

    def encode_and_decode(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _apply_to_pictures(encode_and_decode, image)


def _apply_to_pictures(
    function: Callable[[Image.Image], Image.Image], image: np.ndarray
) -> np.ndarray:
    """Apply a function to an RGB image, or to each channel of another image as a gray image."""
    pixels = np.rint(image * 255).astype(np.uint8)
    if pixels.shape[2] == 3:
        return np.asarray(function(Image.fromarray(pixels))) / 255.0
    channels = [
        np.asarray(function(Image.fromarray(np.ascontiguousarray(channel))))
        for channel in np.moveaxis(pixels, 2, 0)
    ]
    return np.stack(channels, axis=2) / 255.0


@dataclass(frozen=True)
class Corruption:
    """A corruption and its constants for each severity, on small and on large images."""

    function: Callable[[np.ndarray, Any, ImageRng], np.ndarray]
    cifar10_c: tuple[Any, ...]
    imagenet_c: tuple[Any, ...]


# The position of a corruption in this table selects its random numbers.
CORRUPTIONS = {
    "gaussian_noise": Corruption(
        gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "shot_noise": Corruption(shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(
        impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    "defocus_blur": Corruption(
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "zoom_blur": Corruption(
        zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "fog": Corruption(
        fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption(
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": Corruption(pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
NAMES = tuple(CORRUPTIONS)
