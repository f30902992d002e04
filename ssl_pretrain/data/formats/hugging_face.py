"""Images in a Hugging Face data set, whose columns contain encoded files or values."""

import hashlib
import pickle
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.data.formats.table_columns import (
    choose_caption_column,
    choose_image_column,
    choose_label_column,
    column_kind,
)
from ssl_pretrain.data.image_source import (
    EncodedSource,
    NumberedSource,
    ReadCaptions,
    Source,
)
from ssl_pretrain.data.images import ImageHeader, decode, read_header
from ssl_pretrain.data.pixels import RGB, PixelFormat
from ssl_pretrain.data.python_source import PythonSource, index_labels


class EncodedColumn(NumberedSource, EncodedSource):
    """Encoded images in a column of a Hugging Face data set.

    The rows are decoded by the same rules as image files, and not by the library `datasets`.

    Args:
        name: Name of the data set, for messages.
        table: A `datasets.Dataset`, of which other columns are not read.
        column: Column of the images: bytes, or dicts with the keys `bytes` and `path`.
        labels: Index of each image's class, or -1.
        classes: Names of the classes.
        pixel_format: Number of channels and range of the images.
        location: File or folder that contains the table, or None if it is in memory.
        read_captions: Function that returns the captions of a row, or None if there are none.
    """

    supports_range = True

    def __init__(
        self,
        name: str,
        table: Any,
        column: str,
        labels: np.ndarray,
        classes: list[str],
        pixel_format: PixelFormat = RGB,
        location: Path | None = None,
        read_captions: ReadCaptions | None = None,
    ):
        super().__init__(name, labels, classes, pixel_format, read_captions)
        self._column, self._location = column, location
        self._table = _without_decoding(table.select_columns([column]), column)
        self._digest = self._probe()

    def read(self, index: int) -> np.ndarray:
        """Decode one image, uint8 (height, width, num_channels).

        Raises:
            UnreadableImage: If the image is absent or damaged. The message names it.
        """
        return decode(self.read_bytes(index), self.name(index), self.pixel_format)

    def header(self, index: int) -> ImageHeader:
        """Return the format, size and range of values of one image."""
        return read_header(self.read_bytes(index), self.name(index), self.num_channels)

    def check_present(self) -> None:
        """Raise FileNotFoundError if the file or folder of the table no longer exists."""
        if self._location is not None and not self._location.exists():
            raise FileNotFoundError(
                f"data.root: {self._location} no longer exists, but existed when the run began"
            )

    def explain_no_workers(self) -> str:
        """Return why no worker process can read these images, or an empty string if one can."""
        try:
            pickle.dumps((self._table, self._read_captions))
        except Exception as error:  # the table may have a format or a transform of the user's
            return f"it cannot be pickled ({str(error).splitlines()[0]})"
        return ""

    def _stored_bytes(self, index: int) -> bytes:
        value = self._table[int(self._item_numbers[index])][self._column]
        if isinstance(value, Mapping):
            if value.get("bytes") is None and value.get("path"):
                return Path(value["path"]).read_bytes()
            value = value.get("bytes")
        if value is None:
            raise OSError("the row has no image")
        return bytes(value)

    def _probe(self) -> bytes:
        """Return a digest of the bytes of a few images."""
        digest = hashlib.sha256()
        for index in self._probed_indices():
            try:
                content = self._stored_bytes(index)
            except OSError:
                content = b""
            digest.update(f"{index} {len(content)} ".encode() + content)
        return digest.digest()


def open_table(
    data: Any,
    name: str,
    image_column: str = "",
    label_column: str = "",
    pixel_format: PixelFormat = RGB,
    location: Path | None = None,
    caption_column: str = "",
) -> Source:
    """Open the images, labels and captions of a `datasets.Dataset`.

    Args:
        data: The data set.
        name: Its name, for messages.
        image_column: Column of the images. If it is empty, it is found by its type and name.
        label_column: Column of the labels, or "none".
        pixel_format: Number of channels and range of the images.
        location: File or folder that contains the data set, or None if it is in memory.
        caption_column: Column of the captions, or "none". If it is empty, it is found by its name.

    Raises:
        ValueError: If a column is missing or unsuitable, or several ones may be meant.
    """
    if not len(data):
        raise ValueError(f"{name} contains no image; give one with images")
    kinds = {column: column_kind(feature) for column, feature in data.features.items()}
    image_column = choose_image_column(kinds, image_column, name)
    label_column = choose_label_column(kinds, label_column, image_column, name)
    read_captions = caption_reader(data, caption_column, (image_column, label_column), name)
    labels, classes = None, None
    if label_column:
        labels = read_column(data, label_column)
        classes = getattr(data.features[label_column], "names", None)
    if kinds[image_column] not in ("Image", "bytes"):
        read = partial(read_row, data.select_columns([image_column]), image_column)
        return PythonSource(
            *(name, read, labels, len(data), classes),
            pixel_format=pixel_format,
            read_captions=read_captions,
        )
    indices, class_names = index_labels(name, labels, len(data), classes)
    return EncodedColumn(
        *(name, data, image_column, indices, class_names, pixel_format, location), read_captions
    )


def caption_reader(
    data: Any, caption_column: str, other_columns: Collection[str], name: str
) -> ReadCaptions | None:
    """Return a function that reads the captions of a row, or None if there are no captions.

    Args:
        data: The data set.
        caption_column: The setting `data.caption_column`.
        other_columns: Columns with another meaning.
        name: Name of the data set, for messages.

    Raises:
        ValueError: If the column is missing or contains no text.
    """
    kinds = {column: column_kind(feature) for column, feature in data.features.items()}
    column = choose_caption_column(kinds, caption_column, other_columns, name)
    if not column:
        return None
    return partial(_read_cell, data.with_format(None).select_columns([column]), column)


def _read_cell(table: Any, column: str, row: int) -> Any:
    """Return one cell. The other columns of the row, such as a large image, are not read."""
    return table[row][column]


def _without_decoding(table: Any, column: str) -> Any:
    """Return the table with the bytes of its images instead of decoded images."""
    feature = table.features[column]
    if type(feature).__name__ != "Image":
        return table.with_format(None)
    return table.with_format(None).cast_column(column, type(feature)(decode=False))


def read_column(data: Any, column: str) -> list[Any]:
    """Return all values of a column, as the table stores them."""
    return list(data.with_format(None).select_columns([column])[:][column])


def read_row(data: Any, column: str, index: int) -> Any:
    """Return the image of one row, as an array if it consists of nested lists."""
    values = data[index][column]
    return np.asarray(values) if isinstance(values, list) else values
