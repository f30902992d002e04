"""A source of images that are stored in arrays of equal images."""

import bisect
import hashlib
import itertools
import math
import os
from collections.abc import Sequence
from io import FileIO
from typing import Any, Self

import numpy as np

from ssl_pretrain.data.formats.stored_array import StoredArray
from ssl_pretrain.data.image_source import NumberedSource
from ssl_pretrain.data.images import ImageHeader, UnreadableImage, describe_values
from ssl_pretrain.data.pixels import (
    RGB,
    PixelFormat,
    WrongChannels,
    check_conversion,
    convert_channels,
    to_8_bits,
)
from ssl_pretrain.system.platform_support import read_into

_REMEDY = "give (n, height, width), (n, height, width, channels) or (n, channels, height, width)"


class ArraySource(NumberedSource):
    """Images of one size in one or several files, such as .npy.

    Each image is read by its position. With mapped memory, a file that becomes shorter would kill
    the process instead of raising an error, and errors of a network file system would, too.

    Args:
        arrays: The arrays, stored with the last axis varying fastest. Their images have the same
            shape and type.
        labels: Index of each image's class, or -1.
        classes: Names of the classes.
        pixel_format: Number of channels and range of the images.
        axes: Axes of one image as stored, such as "HWC" or "CWH". None finds them by their lengths.

    Raises:
        ValueError: If the values or the shape are not those of images with that many channels.
    """

    supports_range = True

    def __init__(
        self,
        arrays: Sequence[StoredArray],
        labels: np.ndarray,
        classes: list[str],
        pixel_format: PixelFormat = RGB,
        axes: str | None = None,
    ):
        super().__init__(arrays[0].name, labels, classes, pixel_format)
        self._arrays = tuple(arrays)
        self._axes = axes or find_axes(arrays[0], pixel_format.num_channels)
        num_stored = arrays[0].shape[1 + self._axes.index("C")] if "C" in self._axes else 1
        name = f"data.root: {arrays[0].name}"
        check_conversion(name, num_stored, pixel_format.num_channels)
        self._order = [self._axes.index(axis) for axis in "HWC" if axis in self._axes]
        self._shape, self._dtype = arrays[0].shape[1:], arrays[0].dtype
        self._image_bytes = math.prod(self._shape) * self._dtype.itemsize
        self._ends = list(itertools.accumulate(array.shape[0] for array in arrays))
        self._files: dict[int, FileIO] = {}
        self._digest = self._probe()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # an open file is only valid in its own process

    def read(self, index: int) -> np.ndarray:
        """Return the pixels of one image, uint8 (height, width, num_channels), in any memory order.

        Raises:
            UnreadableImage: If the file is truncated, or its values need `data.range`.
        """
        try:
            levels = to_8_bits(self.values(index), self.pixel_format.value_range)
        except ValueError as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from None
        return convert_channels(levels, self.num_channels)

    def header(self, index: int) -> ImageHeader:
        """Return the format, size and range of values of one image."""
        return describe_values(self.values(index))

    def name(self, index: int) -> str:
        """Return the name of the array and the index of the image in it, for messages."""
        number, row = self._locate(index)
        return f"{self._arrays[number].name}[{row}]"

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the images at `indices`, in that order."""
        subset = super().take(indices)
        subset._files = {}
        return subset

    def check_present(self) -> None:
        """Raise FileNotFoundError if a file no longer exists."""
        for array in self._arrays:
            if not os.path.exists(array.path):
                raise FileNotFoundError(
                    f"data.root: {array.path} no longer exists, but existed when the run began"
                )

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of an image's array, and its index in that array."""
        item = int(self._item_numbers[index])
        number = bisect.bisect_right(self._ends, item)
        return number, item - (self._ends[number - 1] if number else 0)

    def values(self, index: int) -> np.ndarray:
        """Return the stored values of one image, (height, width, channels) in any memory order."""
        number, row = self._locate(index)
        array = self._arrays[number]
        content = np.empty(self._image_bytes, np.uint8)
        try:
            # A thread that opens the file at the same time opens it twice, which does no harm.
            file = self._files.get(number) or FileIO(array.path)
            self._files[number] = file
            offset = array.offset + row * self._image_bytes
            num_read = read_into(file.fileno(), content.data, offset)
        except OSError as error:
            raise UnreadableImage(f"{self.name(index)}: {error.strerror or error}") from error
        if num_read < self._image_bytes:
            raise UnreadableImage(f"{self.name(index)}: the file is truncated")
        values = content.view(self._dtype).reshape(self._shape).transpose(self._order)
        return values if values.ndim == 3 else values[..., None]

    def _probe(self) -> bytes:
        """Return a digest of the number of images, their format, and the values of a few."""
        digest = hashlib.sha256()
        for index in self._probed_indices():
            values = self.values(index)
            values = values.astype(values.dtype.newbyteorder("<"))
            digest.update(f"{index} {values.dtype.str} {values.shape} ".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.digest()


def find_axes(array: StoredArray, num_channels: int) -> str:
    """Return the axes of the images of an array: HW, HWC or CHW.

    Args:
        array: The array.
        num_channels: The setting `data.channels`.

    Raises:
        ValueError: If the values or the shape are not those of images with that many channels.
    """
    name, shape = array.name, array.shape
    if array.dtype.hasobject:
        raise ValueError(
            f"data.root: {name} is an array of Python objects, which only pickle can load, and a "
            "pickle can run any program; save the images as one array of numbers of the same shape"
        )
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"data.root: {name} has values of type {array.dtype}, not those of images; save them "
            "as integers or floats"
        )
    if 0 in shape:
        raise ValueError(f"data.root: {name} has the shape {shape}, without an image; give images")
    if len(shape) == 3 and shape[2] in (3, 4):
        raise ValueError(
            f"data.root: {name} has the shape {shape}, that of one color image; {_REMEDY}"
        )
    if len(shape) == 3:
        check_conversion(f"data.root: {name}", 1, num_channels)
        return "HW"
    if len(shape) == 4:
        allowed = (num_channels, 1, 3) if num_channels in (1, 3) else (num_channels,)
        for length in allowed:
            if length in (shape[3], shape[1]):
                return "HWC" if shape[3] == length else "CHW"
        name = f"data.root: {name}, of the shape {shape},"
        raise WrongChannels(name, min(shape[1], shape[3]), num_channels)
    raise ValueError(f"data.root: {name} has the shape {shape}, not that of images; {_REMEDY}")
