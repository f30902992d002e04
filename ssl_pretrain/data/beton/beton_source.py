"""Source of the images in a .beton file or in a set of .beton shards."""

from typing import Self

import numpy as np

from ssl_pretrain.data.beton.beton_file import Samples
from ssl_pretrain.data.beton.tables import RAW
from ssl_pretrain.data.image_source import EncodedSource
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.jpeg import DamagedJpeg, decode_intact
from ssl_pretrain.data.pixels import PixelFormat, check_conversion, convert_channels


class Beton(EncodedSource):
    """Images of a .beton file, read one at a time without FFCV."""

    def __init__(self, samples: Samples, num_channels: int = 3):
        if samples.manifest is not None:
            classes = samples.manifest.classes
        else:  # FFCV's own writer does not store class names
            classes = [str(label) for label in range(int(samples.label.max(initial=-1)) + 1)]
        name = samples.paths[0]
        check_conversion(f"data.root: {name}", 3, num_channels)
        super().__init__(name, samples.label, classes, PixelFormat(num_channels))
        self.samples = samples
        self._subset_indices = b""  # int64 indices as bytes, empty for all images

    def read(self, index: int) -> np.ndarray:
        """Return the pixels of one image, uint8 (height, width, num_channels).

        Raises:
            UnreadableImage: If the image cannot be read, is damaged, or its size differs from its
                table entry.
        """
        rgb = self.decode(index, self.read_bytes(index))
        return convert_channels(rgb, self.num_channels)

    def decode(self, index: int, content: bytes) -> np.ndarray:
        """Return the RGB pixels of one image from its stored bytes."""
        height, width = int(self.samples.height[index]), int(self.samples.width[index])
        if self.samples.mode[index] == RAW:
            return np.frombuffer(content, np.uint8).reshape(height, width, 3).copy()
        try:
            return decode_intact(content, height, width)
        except DamagedJpeg as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        """Return the path of the file and the image's number, for messages."""
        return self.samples.name(index)

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the images at `indices`, in that order, with its own fingerprint."""
        subset = super().take(indices)
        subset.samples = self.samples.take(indices)
        subset._subset_indices = self._subset_indices + indices.astype(np.int64).tobytes()
        return subset

    def prefetch(self, first: int, count: int) -> None:
        """Ask the system to read consecutive images into memory, without waiting for it."""
        self.samples.prefetch(first, count)

    def check_present(self) -> None:
        """Raise FileNotFoundError if a file is missing, and ValueError if one was replaced."""
        self.samples.check_present()

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source images, so that a run can switch between them and the .beton.

        A subset and a file without a manifest have fingerprints of their own.
        """
        manifest = self.samples.manifest
        return (
            manifest.fingerprint if manifest and not self._subset_indices else super().fingerprint
        )

    def _stored_bytes(self, index: int) -> bytes:
        return self.samples.read_bytes(index)

    def _identity(self) -> bytes:
        samples = self.samples
        source_fingerprint = str(samples.manifest and samples.manifest.fingerprint).encode()
        columns = (samples.length, samples.offset, samples.file_index)
        table = b"".join(column.tobytes() for column in columns)
        return source_fingerprint + self._subset_indices + table
