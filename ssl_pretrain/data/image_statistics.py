"""Measure the sizes, pixel formats, values and colors of a source."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ssl_pretrain.data.image_files import ImageFiles
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import ImageHeader, UnreadableImage, read_header
from ssl_pretrain.data.pixels import Range
from ssl_pretrain.data.progress_report import report_progress

_MIN_SHARE = 0.25  # smallest share of the 16-bit values that may be in use: 14 bits
_NUM_MEASURED = 32  # images that are measured before a run


@dataclass
class ImageStatistics:
    """Measurements of the images that were read."""

    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) as stored
    modes: Counter[str] = field(default_factory=Counter)  # Pillow's names of the pixel formats
    ranges: list[Range] = field(default_factory=list)  # per image wider than 8 bits
    num_animated: int = 0  # images with several frames, of which the first is read
    bad: list[str] = field(default_factory=list)  # file and reason
    # Of pixels in [0, 1], per channel. Each image has the same weight.
    mean: np.ndarray = field(default_factory=lambda: np.zeros(3))
    std: np.ndarray = field(default_factory=lambda: np.ones(3))

    @property
    def range(self) -> Range:
        """The values in use. A single value is widened to a range."""
        low, high = min(low for low, _ in self.ranges), max(high for _, high in self.ranges)
        return (low, high) if low < high else (low, low + 1)


def measure(source: Source, num_images: int = 0, num_threads: int = 4) -> ImageStatistics:
    """Read some images, evenly spaced in the source, and report progress on stderr.

    Args:
        source: The images.
        num_images: Number of images to read; 0 reads all.
        num_threads: Threads that read and decode.
    """
    indices = np.arange(len(source))
    if 0 < num_images < len(source):  # evenly through the sorted list, so through the classes
        indices = np.linspace(0, len(source) - 1, num_images).astype(np.int64)
    statistics = ImageStatistics()
    moments = np.zeros((2, 3))

    def measure_one(index: int) -> tuple[ImageHeader, np.ndarray] | str:
        try:
            return _measure_image(source, index)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(num_threads) as pool:
        results = pool.map(measure_one, indices.tolist())
        for result in report_progress(results, len(indices), "read"):
            if isinstance(result, str):
                statistics.bad.append(result)
                continue
            header, image_moments = result
            moments += image_moments
            statistics.modes[header.mode] += 1
            statistics.sizes.append((header.width, header.height))
            statistics.num_animated += header.num_frames > 1
            if header.low is not None and header.high is not None:
                statistics.ranges.append((header.low, header.high))
    if statistics.sizes:
        mean, mean_square = moments / len(statistics.sizes)
        statistics.mean = mean
        statistics.std = np.sqrt(np.maximum(mean_square - mean**2, 0))
    return statistics


def _measure_image(source: Source, index: int) -> tuple[ImageHeader, np.ndarray]:
    """Return the header of an image, and its mean and mean square per channel, shape (2, 3)."""
    if isinstance(source, ImageFiles):
        header = read_header(source.read_bytes(index), source.name(index))
    pixels = source.read(index)
    if not isinstance(source, ImageFiles):
        header = ImageHeader("RGB", pixels.shape[1], pixels.shape[0], num_frames=1)
    values = pixels.reshape(-1, 3).astype(np.float32) / 255
    moments = [power.mean(0, dtype=np.float64) for power in (values, np.square(values))]
    return header, np.stack(moments)


def check_range(source: Source) -> None:
    """Raise ValueError if 16-bit images would become a few dark levels without `data.range`.

    Some images are read, evenly spaced in the source. Those of 8 bits and of floats are ignored.
    """
    if not isinstance(source, ImageFiles) or source.value_range is not None:
        return
    ranges = list(_measured_ranges(source))
    if not ranges:
        return
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if high - low >= _MIN_SHARE * 65536:
        return
    num_levels = max(1, round((high - low) / 257))
    raise ValueError(
        f"data.range: not set, and the 16-bit images of {source.where} use values from {low:,.0f} "
        f"to {high:,.0f} ({len(ranges)} of them measured), which would leave {num_levels} of 256 "
        "gray levels; give the values that are to be black and white, such as "
        f"data.range=[{low:.0f},{high:.0f}] (python -m ssl_pretrain.data.inspect measures them), "
        "or data.range=[0,65535] to leave them as they are"
    )


def _measured_ranges(source: ImageFiles) -> Iterator[tuple[float, float]]:
    """Yield the lowest and highest value of each 16-bit image in a sample."""
    sample = np.linspace(0, len(source) - 1, min(_NUM_MEASURED, len(source)))
    for index in sample.astype(np.int64).tolist():
        try:
            header = read_header(source.read_bytes(index), source.name(index))
        except UnreadableImage:
            continue
        if header.low is not None and header.high is not None and header.mode != "F":
            yield header.low, header.high
