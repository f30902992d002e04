"""Describe a source: its splits and labels, and the sizes, values and colors of its images."""

import copy
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.image_source import ImageFiles, Source
from ssl_pretrain.data.images import ImageHeader, UnreadableImage, describe_values
from ssl_pretrain.data.messages import printable, report_progress
from ssl_pretrain.data.pixels import ValueRange, WrongChannels
from ssl_pretrain.data.sources import open_source

_MAX_CLASSES_SHOWN = 3
_MIN_RANGE_SHARE = 0.25  # smallest share of the 16-bit range that images may use, 14 bits
_NUM_CHECKED_IMAGES = 32  # images whose values are measured before a run


def layout_lines(config: DataConfig, train: Source) -> list[str]:
    """Return lines about the splits, their images and labels, and the skipped files.

    Args:
        config: The data set.
        train: Its training images.
    """
    notes = list(train.notes)
    try:
        val = open_source(config, "val", train.classes)
    except (ValueError, OSError) as error:
        validation = f"none ({error})"
    else:
        validation = f"{val.full_path}: {describe_counts(val)}"
        notes += [note for note in val.notes if note not in notes] + _overlap_notes(train, val)
    summary = f"training {train.full_path}: {describe_counts(train)}; validation {validation}"
    return [printable(f"data: {line}") for line in (summary, *notes)]


def describe_counts(source: Source) -> str:
    """Return the numbers of items, of classes and of items without a label as text."""
    noun = "image" if source.has_images else "text" if source.num_texts == 1 else "group"
    items = f"{len(source):,} {noun}" + ("s" if len(source) != 1 else "")
    if not source.has_images and source.num_texts > 1:
        items += f" of {source.num_texts} texts"
    num_unlabeled = int((source.labels < 0).sum())
    if num_unlabeled == len(source):
        return f"{items}, no labels"
    present_labels = np.unique(source.labels[source.labels >= 0])
    names = [source.classes[label] for label in present_labels[:_MAX_CLASSES_SHOWN]]
    if len(present_labels) > _MAX_CLASSES_SHOWN:
        names.append("...")
    of_total = f" of {len(source.classes):,}" if len(present_labels) < len(source.classes) else ""
    classes = "class" if len(present_labels) == 1 and not of_total else "classes"
    without_label = f", {num_unlabeled:,} without a label" if num_unlabeled else ""
    return (
        f"{items}, {len(present_labels):,}{of_total} {classes} ({', '.join(names)}){without_label}"
    )


def _overlap_notes(train: Source, val: Source) -> list[str]:
    """Return a note if some validation images are also training images.

    Paths are only compared if both splits are in the same folder, or one folder contains the other.
    """
    if not isinstance(train, ImageFiles) or not isinstance(val, ImageFiles):
        return []
    train_root, val_root = (
        os.path.join(os.path.realpath(source.files.root), source.files.folder_in_zip, "")
        for source in (train, val)
    )
    if not train_root.startswith(val_root) and not val_root.startswith(train_root):
        return []
    val_paths = {val_root + path for path in val.files.paths()}
    shared = sorted(val_paths.intersection(train_root + path for path in train.files.paths()))
    if not shared:
        return []
    return [
        f"{len(shared):,} of {len(val):,} validation images are also training images "
        f"(first: {shared[0]})"
    ]


@dataclass
class ImageStatistics:
    """Statistics of the images that were read."""

    num_channels: int = 3  # channels in which the images were read
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) as stored
    modes: Counter[str] = field(default_factory=Counter)  # Pillow's names of the pixel formats
    # Images by their channels without alpha, and by whether they have alpha.
    stored_channels: Counter[tuple[int, bool]] = field(default_factory=Counter)
    # Range of each image of more than 8 bits. With other than 1 or 3 channels, one per channel.
    ranges: list[ValueRange] = field(default_factory=list)
    num_animated: int = 0  # images with several frames, of which the first is read
    unreadable: list[str] = field(default_factory=list)  # names of images, each with the reason
    num_colors: int = 0  # images whose mean was measured, which floats without a range lack
    # Mean and standard deviation of pixels in [0, 1], per channel. All images weigh the same.
    mean: np.ndarray = field(init=False)
    std: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.std = np.zeros(self.num_channels), np.ones(self.num_channels)

    @property
    def value_range(self) -> ValueRange:
        """Range of the values in use, as in `data.range`.

        A single value is widened to a range of length 1.
        """
        usual_length = Counter(map(len, self.ranges)).most_common(1)[0][0]
        ranges = np.array([limits for limits in self.ranges if len(limits) == usual_length])
        lows, highs = ranges[:, ::2].min(axis=0), ranges[:, 1::2].max(axis=0)
        highs = np.where(lows < highs, highs, lows + 1)
        return tuple(np.stack([lows, highs], axis=-1).reshape(-1).tolist())

    @property
    def narrowest_range(self) -> tuple[float, float]:
        """Range of the channel with the least values."""
        pairs = zip(self.value_range[::2], self.value_range[1::2])
        return min(pairs, key=lambda pair: pair[1] - pair[0])

    @property
    def num_gray_levels(self) -> int:
        """Number of the 256 levels that a channel uses at least without `data.range`."""
        low, high = self.narrowest_range
        return max(1, round((high - low) / 257))


def open_with_own_channels(config: DataConfig) -> tuple[DataConfig, Source]:
    """Open the training images with the number of channels that they have.

    Gray images are read as RGB, as by default.

    Returns:
        The configuration with that number as `channels`, and the images.
    """
    try:
        source = open_source(config, "train")
    except WrongChannels as error:  # an array, whose shape is known
        config = replace(config, channels=error.found)
        return config, open_source(config, "train")
    if source.supports_range:
        try:
            check_channels(source)
        except WrongChannels as error:
            config = replace(config, channels=error.found)
            return config, open_source(config, "train")
    return config, source


def measure_images(source: Source, num_images: int = 0, num_threads: int = 4) -> ImageStatistics:
    """Measure images that are evenly spaced in the source, and report progress on stderr.

    Args:
        source: The images.
        num_images: Number of images to read, or 0 to read all.
        num_threads: Number of threads that read and decode.
    """
    indices = _evenly_spaced_indices(source, num_images)
    statistics = ImageStatistics(source.num_channels)
    moments = np.zeros((2, source.num_channels))
    with ThreadPoolExecutor(num_threads) as pool:
        results = pool.map(partial(_measure_image, source), indices)
        for result in report_progress(results, len(indices), "read"):
            header, image_moments, reason = result
            if header is not None:
                statistics.stored_channels[header.num_channels, header.has_alpha] += 1
            if header is None or reason:
                statistics.unreadable.append(reason)
                continue
            if image_moments is not None:
                moments += image_moments
                statistics.num_colors += 1
            statistics.modes[header.mode] += 1
            statistics.sizes.append((header.width, header.height))
            statistics.num_animated += header.num_frames > 1
            if header.value_range is not None:
                statistics.ranges.append(header.value_range)
    if statistics.num_colors:
        statistics.mean, mean_square = moments / statistics.num_colors
        statistics.std = np.sqrt(np.maximum(mean_square - statistics.mean**2, 0))
    return statistics


def with_measured_range(source: Source, statistics: ImageStatistics) -> Source:
    """Return the source with the measured range of its values, unless it has a range or 8 bits."""
    pixel_format = source.pixel_format
    if not statistics.ranges or pixel_format.value_range or not source.supports_range:
        return source
    source = copy.copy(source)
    source.pixel_format = replace(pixel_format, value_range=statistics.value_range)
    return source


def _evenly_spaced_indices(source: Source, num_images: int) -> list[int]:
    """Return evenly spaced image indices, which also spread over the classes. 0 returns all."""
    num_images = min(num_images or len(source), len(source))
    return np.linspace(0, len(source) - 1, num_images).astype(np.int64).tolist()


def _measure_image(source: Source, index: int) -> tuple[ImageHeader | None, np.ndarray | None, str]:
    """Return the header of an image, and its mean and mean square per channel, (2, channels).

    For an unreadable image, the third value is the reason. Floats without a range have no mean.
    """
    header = None
    try:
        header = source.header(index) if source.supports_range else None
        if header is not None and header.is_float and source.pixel_format.value_range is None:
            return header, None, ""  # without a range, floats have no gray levels
        pixels = source.read(index)
        header = header or describe_values(pixels)
    except UnreadableImage as error:
        return header, None, str(error)
    values = pixels.reshape(-1, pixels.shape[2]).astype(np.float32) / 255
    moments = np.stack(
        [values.mean(0, dtype=np.float64), np.square(values).mean(0, dtype=np.float64)]
    )
    return header, moments, ""


def check_images(source: Source) -> None:
    """Raise ValueError if the images have other channels, or would become a few dark levels.

    Only a few images are read, evenly spaced in the source. Unreadable ones are ignored, unless
    there are no others.
    """
    if not source.supports_range:
        return
    reasons: list[str] = []
    headers = _read_headers(source, reasons)
    if not headers:
        raise ValueError(
            f"data.root: {len(reasons)} of {len(reasons)} images that were tried in "
            f"{source.full_path} cannot be read; the first is {reasons[0]}"
        )
    check_channels(source, headers)
    if source.pixel_format.value_range is None:
        _check_value_range(source, headers)


def _read_headers(source: Source, reasons: list[str] | None = None) -> list[ImageHeader]:
    """Return the headers of a few images. Add the reasons of unreadable ones to `reasons`."""
    headers = []
    for index in _evenly_spaced_indices(source, _NUM_CHECKED_IMAGES):
        try:
            headers.append(source.header(index))
        except UnreadableImage as error:
            if reasons is not None:
                reasons.append(str(error))
    return headers


def check_channels(source: Source, headers: list[ImageHeader] | None = None) -> None:
    """Raise WrongChannels if most of a few images cannot be read with the source's channels."""
    if not source.supports_range:
        return
    headers = _read_headers(source) if headers is None else headers
    wrong = [header.num_stored for header in headers if not header.can_become(source.num_channels)]
    if 2 * len(wrong) > len(headers):
        raise WrongChannels(
            source.full_path, Counter(wrong).most_common(1)[0][0], source.num_channels
        )


def _check_value_range(source: Source, headers: list[ImageHeader]) -> None:
    """Raise ValueError if wide values would become a few dark levels without `data.range`."""
    are_floats = bool(headers) and all(header.is_float for header in headers)
    statistics = ImageStatistics()
    statistics.ranges = [
        header.value_range
        for header in headers
        if header.value_range is not None and header.is_float == are_floats
    ]
    if not statistics.ranges:
        return
    low, high = statistics.narrowest_range
    proposal = format_range(statistics.value_range)
    if are_floats:
        raise ValueError(
            f"data.range: not set, and the images of {source.full_path} are floats from {low:g} to "
            f"{high:g} ({len(statistics.ranges)} were measured), which have no range of their own; "
            f"give the values of black and white, such as data.range={proposal}"
        )
    if high - low >= _MIN_RANGE_SHARE * 65536:
        return
    where = "" if len(statistics.value_range) == 2 else " in one channel"
    raise ValueError(
        f"data.range: not set, and the 16-bit images of {source.full_path} use values from "
        f"{low:,.0f} to {high:,.0f}{where} ({len(statistics.ranges)} were measured), which would "
        f"leave {statistics.num_gray_levels} of 256 gray levels; give the values of black and "
        f"white, such as data.range={proposal} (python -m ssl_pretrain.planning.inspect measures "
        "them), or data.range=[0,65535] to keep the full range"
    )


def format_range(value_range: ValueRange) -> str:
    """Return a range as text for a command, such as [0,4095]."""
    texts = [f"{limit:.0f}" if limit == round(limit) else f"{limit:g}" for limit in value_range]
    return f"[{','.join(texts)}]"
