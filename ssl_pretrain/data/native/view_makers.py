"""Read images and make their views, for one thread at a time.

`DecodedImages` reads any source and needs nothing but this package. `FFCVImages` reads a .beton in
compiled code, with the decoder in FFCV's library.
"""

import os
from contextlib import suppress
from typing import Protocol

import numpy as np

from ssl_pretrain.data.beton.beton_file import Samples
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreachableSource, UnreadableImage
from ssl_pretrain.data.native import ffcv, views
from ssl_pretrain.system.platform_support import BINARY, read_at
from ssl_pretrain.views.recipe import Crop


class ViewMaker(Protocol):
    """The reader of one thread."""

    def make_views(
        self,
        numbers: np.ndarray,
        box_indices: np.ndarray,
        first_row: int,
        epoch: int,
        batch: np.ndarray,
    ) -> dict[int, str]:
        """Write the views of images to consecutive rows of a batch.

        Args:
            numbers: Indices of the images, int64 (n,).
            box_indices: Indices of the images whose crop boxes are used, int64 (n,).
            first_row: Row of the first image in the batch.
            epoch: Number of passes over the data before this one.
            batch: Pixels of the batch, flat uint8.

        Returns:
            The reason for each unreadable image, by its position in `numbers`. The reason names the
            image.
        """
        ...

    def can_read(self, number: int) -> bool:
        """Return True if an image is readable."""
        ...

    def close(self) -> None:
        """Free the decoder."""
        ...


class Images(Protocol):
    """The images that all threads of a rank read."""

    def open(self) -> None:
        """Open the files. A second call does nothing."""
        ...

    def build_maker(self) -> ViewMaker:
        """Build the reader of one thread."""
        ...

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        ...


class DecodedImages:
    """Images of any source, decoded by the functions that the source calls.

    Args:
        source: The images.
        view_crops: Recipe of each view.
        batch_size: Images of this rank's batch.
        seed: Seed of the crop boxes.
    """

    def __init__(self, source: Source, view_crops: list[Crop], batch_size: int, seed: int):
        self.source, self.view_crops, self.seed = source, view_crops, seed
        self.views = views.pack_views(view_crops, source.num_channels, batch_size)

    def open(self) -> None:
        """Do nothing, because the source opens its files."""

    def build_maker(self) -> ViewMaker:
        """Build the reader of one thread."""
        return _DecodedViews(self)

    def close(self) -> None:
        """Do nothing."""


class _DecodedViews:
    def __init__(self, images: DecodedImages):
        self.images = images
        self.buffers: views.Buffers | None = None
        self.height, self.width = 0, 0  # largest that fit into the buffers

    def make_views(
        self,
        numbers: np.ndarray,
        box_indices: np.ndarray,
        first_row: int,
        epoch: int,
        batch: np.ndarray,
    ) -> dict[int, str]:
        reasons = {}
        for row, (number, box_index) in enumerate(zip(numbers.tolist(), box_indices.tolist())):
            try:
                pixels = self._read(number)
            except UnreadableImage as error:
                reasons[row] = str(error)
                continue
            key = self.images.seed, epoch, box_index
            views.write_views_of(
                pixels, self.images.views, key, first_row + row, self._buffers(pixels), batch
            )
        return reasons

    def can_read(self, number: int) -> bool:
        with suppress(UnreadableImage):
            self._read(number)
            return True
        return False

    def close(self) -> None:
        """Do nothing."""

    def _read(self, number: int) -> np.ndarray:
        """Return the pixels of one image, uint8 (height, channels * width), contiguous."""
        source = self.images.source
        try:
            pixels = source.read(number)
        except UnreadableImage:
            source.check_present()
            raise
        except UnreachableSource:
            raise
        except Exception as error:
            raise RuntimeError(
                f"image {number}, {source.name(number)}: {type(error).__name__}: {error}"
            ) from error
        return np.ascontiguousarray(pixels).reshape(len(pixels), -1)

    def _buffers(self, pixels: np.ndarray) -> views.Buffers:
        """Return buffers that are large enough for these pixels."""
        channels = self.images.source.num_channels
        height, width = pixels.shape[0], pixels.shape[1] // channels
        if self.buffers is None or height > self.height or width > self.width:
            self.height, self.width = max(height, self.height), max(width, self.width)
            self.buffers = views.allocate_buffers(
                channels, np.array([self.height]), np.array([self.width]), self.images.view_crops
            )
        return self.buffers


class FFCVImages:
    """Images of a .beton, read and decoded by compiled code.

    Args:
        source: The images.
        view_crops: Recipe of each view.
        batch_size: Images of this rank's batch.
        seed: Seed of the crop boxes.

    Raises:
        ValueError: If FFCV is not installed or does not load.
    """

    def __init__(self, source: Beton, view_crops: list[Crop], batch_size: int, seed: int):
        self.source, self.view_crops, self.seed = source, view_crops, seed
        self.views = views.pack_views(view_crops, source.num_channels, batch_size)
        self.functions = ffcv.load_c_functions()
        self.file_descriptors: list[int] = []

    @property
    def samples(self) -> Samples:
        """Table of the images."""
        return self.source.samples

    def open(self) -> None:
        """Open the files. A second call does nothing."""
        if not self.file_descriptors:
            paths = self.samples.paths
            self.file_descriptors = [os.open(path, os.O_RDONLY | BINARY) for path in paths]
            self.image_table = ffcv.pack_images(self.samples, self.file_descriptors)

    def build_maker(self) -> ViewMaker:
        """Build the reader of one thread."""
        return _FFCVViews(self)

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        while self.file_descriptors:
            os.close(self.file_descriptors.pop())

    def raise_read_error(self, number: int) -> None:
        """Read an image's bytes again, and raise an error that says why some are missing."""
        samples = self.samples
        descriptor = self.file_descriptors[samples.file_index[number]]
        length = int(samples.length[number])
        try:
            content = read_at(descriptor, length, int(samples.offset[number]))
        except OSError as error:
            raise OSError(error.errno, error.strerror, samples.name(number)) from None
        raise ValueError(
            f"data.root: {samples.name(number)}: the file was truncated during the run, and the "
            f"image lacks its last {length - len(content):,} bytes; copy the file again, then "
            "start the run again"
        )


class _FFCVViews:
    def __init__(self, images: FFCVImages):
        self.images = images
        self.decoder = ffcv.Decoder()
        try:
            self.workspace = ffcv.allocate_workspace(
                images.samples, images.view_crops, self.decoder
            )
        except BaseException:
            self.decoder.close()
            raise

    def make_views(
        self,
        numbers: np.ndarray,
        box_indices: np.ndarray,
        first_row: int,
        epoch: int,
        batch: np.ndarray,
    ) -> dict[int, str]:
        images, statuses = self.images, np.zeros(len(numbers), np.int8)
        ffcv.make_views(
            (images.functions, images.image_table, images.views),
            numbers,
            box_indices,
            first_row,
            images.seed,
            epoch,
            self.workspace,
            batch,
            statuses,
        )
        reasons = {}
        for row in np.flatnonzero(statuses).tolist():
            number = int(numbers[row])
            self._check_complete(int(statuses[row]), number)
            reason = ffcv.FAILURE_REASONS[int(statuses[row])]
            reasons[row] = f"{images.source.name(number)}: {reason}"
        return reasons

    def can_read(self, number: int) -> bool:
        images = self.images
        status = ffcv.decode_image(images.functions, images.image_table, number, self.workspace)
        self._check_complete(int(status), number)
        return bool(status == ffcv.DONE)

    def close(self) -> None:
        self.decoder.close()

    def _check_complete(self, status: int, number: int) -> None:
        if status == ffcv.TRUNCATED:
            self.images.raise_read_error(number)
