"""Open the Python objects that contain images: arrays, torch data sets, Hugging Face data sets."""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
import torch

from ssl_pretrain.data.formats.array_choice import NO_LABELS
from ssl_pretrain.data.formats.hugging_face import (
    caption_reader,
    open_table,
    read_column,
    read_row,
)
from ssl_pretrain.data.image_source import NoSuchSplit, Source
from ssl_pretrain.data.image_values import count_channels, to_levels
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.messages import report_progress
from ssl_pretrain.data.pixels import (
    RGB,
    PixelFormat,
    ValueRange,
    WrongChannels,
    check_conversion,
)
from ssl_pretrain.data.python_items import (
    IMAGE_KEYS,
    LABEL_KEYS,
    ItemReader,
    find_captions,
    image_of,
    label_of,
    refuse_caption_column,
)
from ssl_pretrain.data.python_source import PythonSource


def open_object(
    data: Any,
    name: str = "data",
    num_channels: int | None = None,
    value_range: ValueRange | None = None,
    caption_column: str = "",
) -> Source:
    """Return a source of the images of a Python object, and of their captions if it has any.

    Args:
        data: A `Source`, an array or tensor of images, a Hugging Face data set, or any object with
            a length and items, such as a torch `Dataset` or a list. An item is an image, a pair of
            image and label, a pair of image and list of captions, or a dict with the key `image`
            and perhaps `label` and `caption`.
            A pair of arrays contains images and labels.
        name: Name of the data set, for messages.
        num_channels: Channels of the images that are read. If None, they are those of the first
            image, and gray images are read as RGB.
        value_range: The setting `data.range`.
        caption_column: Key or column of the captions. If it is empty, they are found by its name.
            The value "none" means that there are none.

    Raises:
        ValueError: If the object is not a data set of images with that many channels, or has no
            such column.
    """
    read_as = _ReadAs(num_channels, value_range, caption_column)
    if isinstance(data, Source):
        return _convert(data, name, read_as)
    if isinstance(data, (np.ndarray, torch.Tensor)):
        return _open_array(data, None, name, read_as)
    if isinstance(data, tuple) and len(data) == 2 and np.ndim(data[1]) == 1:
        return _open_array(data[0], data[1], name, read_as)
    if isinstance(data, tuple) and len(data) == 2 and getattr(data[0], "ndim", 0) == 4:
        raise ValueError(
            f"{name}: the labels have the shape {np.shape(data[1])}; give one number or name per "
            "image"
        )
    if hasattr(data, "column_names"):
        return _open_hugging_face(data, name, read_as)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):
        return _open_dataset(data, name, read_as)
    if hasattr(data, "convert"):  # a PIL image
        raise ValueError(f"{name}: is one image; give a list of images")
    raise ValueError(
        f"{name}: an object of type {type(data).__name__} is not a data set; give a path, an "
        "array, a torch Dataset with a length, or a Hugging Face dataset"
    )


class _ReadAs(NamedTuple):
    """Format of the images, with None for what depends on them."""

    num_channels: int | None
    value_range: ValueRange | None
    caption_column: str = ""

    def pixel_format(self, first_image: Any = None) -> PixelFormat:
        """Return the format, by the channels of the first image if they are not set."""
        return PixelFormat(self.num_channels or count_channels(first_image), self.value_range)


def _convert(source: Source, name: str, read_as: _ReadAs) -> Source:
    """Return a source that is read in another format, or raise WrongChannels."""
    refuse_caption_column(read_as.caption_column, name)
    num_channels = read_as.num_channels or source.num_channels
    if not isinstance(source, PythonSource):  # it may not read the attribute `pixel_format`
        if num_channels != source.num_channels:
            raise WrongChannels(name, source.num_channels, num_channels)
        return source
    check_conversion(name, source.num_channels, num_channels)
    source = copy.copy(source)
    value_range = read_as.value_range or source.pixel_format.value_range
    source.pixel_format = PixelFormat(num_channels, value_range)
    return source


def _open_array(images: Any, labels: Any, name: str, read_as: _ReadAs) -> PythonSource:
    refuse_caption_column(read_as.caption_column, name)
    is_tensor = isinstance(images, torch.Tensor)
    values = images.detach().cpu().numpy() if is_tensor else np.asarray(images)
    if values.ndim == 3 and values.shape[2] in (3, 4):
        raise ValueError(
            f"{name} has the shape {values.shape}, that of one color image; give the images as "
            "(n, height, width, 3)"
        )
    if values.ndim not in (3, 4):
        raise ValueError(
            f"{name} has the shape {values.shape}; give (n, height, width, 3), (n, 3, height, "
            "width) or (n, height, width)"
        )
    levels = to_levels(values, name, read_as.value_range)
    stack = torch.from_numpy(levels) if is_tensor and levels.ndim == 4 else levels
    identity = hashlib.sha256(np.ascontiguousarray(levels).data).digest()
    pixel_format = read_as.pixel_format(stack[0] if len(levels) else None)
    return PythonSource(
        name, partial(getitem, stack), labels, len(levels), None, identity, pixel_format
    )


def _open_hugging_face(data: Any, name: str, read_as: _ReadAs) -> Source:
    """Open a `datasets.Dataset`, which is recognized by its columns."""
    if isinstance(data, Mapping):
        raise ValueError(
            f"{name}: this Hugging Face dataset has several splits ({', '.join(data)}); give one "
            "of them, such as data['train'], and another as val"
        )
    if not hasattr(data, "__len__"):
        raise ValueError(
            f"{name}: this Hugging Face dataset is a stream without a length; load it with "
            "streaming=False"
        )
    kinds = {column: type(feature).__name__ for column, feature in data.features.items()}
    image_column = _choose_column(kinds, "Image", IMAGE_KEYS)
    if image_column is None:
        raise ValueError(
            f"{name}: no column of this Hugging Face dataset contains images ({', '.join(kinds)}); "
            "cast one with dataset.cast_column('image', datasets.Image())"
        )
    label_column = _choose_column(kinds, "ClassLabel", LABEL_KEYS)
    if data.format["type"] is None:
        pixel_format = read_as.pixel_format()
        return open_table(
            *(data, name, image_column, label_column or NO_LABELS, pixel_format),
            caption_column=read_as.caption_column,
        )
    # The user's format or transform replaces the images of the table.
    labels, classes = None, None
    if label_column is not None:
        labels = read_column(data, label_column)
        classes = getattr(data.features[label_column], "names", None)
    identity = str(getattr(data, "_fingerprint", "")).encode()
    read = partial(read_row, data.select_columns([image_column]), image_column)
    pixel_format = read_as.pixel_format(read(0) if len(data) else None)
    read_captions = caption_reader(
        data, read_as.caption_column, (image_column, label_column or ""), name
    )
    return PythonSource(
        name, read, labels, len(data), classes, identity, pixel_format, read_captions
    )


def _choose_column(kinds: Mapping[str, str], kind: str, usual_names: Sequence[str]) -> str | None:
    """Return the first column of a kind, or else a column with a usual name.

    Args:
        kinds: Name of the type of each column's values, by column.
        kind: Type to look for, such as "Image".
        usual_names: Names to look for if no column has the type, most usual first.
    """
    columns = [column for column, column_kind in kinds.items() if column_kind == kind]
    columns += [column for column in usual_names if column in kinds]
    return columns[0] if columns else None


def _open_dataset(data: Any, name: str, read_as: _ReadAs) -> PythonSource:
    """Open an object with a length and items, such as a torch `Dataset`."""
    if not len(data):
        raise ValueError(f"{name} contains no image; give one with images")
    first = next(_items(data, name))
    pixel_format = read_as.pixel_format(image_of(first, f"{name}[0]"))
    labels, classes = None, None
    if label_of(first) is not None:
        labels, classes = _stored_labels(data)
        if labels is None:  # reading a label reads its image, too
            items = report_progress(_items(data, name), len(data), "read labels of")
            labels = [label_of(item) for item in items]
    reader = ItemReader(data, name, find_captions(first, name, read_as.caption_column))
    read_captions = reader.read_captions if reader.caption_key is not None else None
    identity = f"{type(data).__module__}.{type(data).__qualname__}".encode()
    return PythonSource(
        name, reader.read_image, labels, len(data), classes, identity, pixel_format, read_captions
    )


def _items(data: Any, name: str) -> Iterator[Any]:
    """Yield the items of a data set, and name the item in errors."""
    for index in range(len(data)):
        try:
            yield data[index]
        except Exception as error:  # a user's data set can raise anything
            raise ValueError(f"{name}[{index}]: {type(error).__name__}: {error}") from error


def _stored_labels(data: Any) -> tuple[Sequence[Any] | None, Sequence[str] | None]:
    """Return the labels and class names that a data set stores, without reading its images.

    torchvision's data sets store them, and a `torch.utils.data.Subset` refers to another data set.
    """
    if isinstance(data, torch.utils.data.Subset):
        labels, classes = _stored_labels(data.dataset)
        return None if labels is None else [labels[index] for index in data.indices], classes
    classes = getattr(data, "classes", None)
    for attribute in ("targets", "labels"):
        labels = getattr(data, attribute, None)
        if labels is not None and hasattr(labels, "__len__") and len(labels) == len(data):
            return labels, classes
    return None, classes


def open_split(
    function: Any,
    reference: str,
    split: str,
    arguments: Mapping[str, Any],
    pixel_format: PixelFormat = RGB,
    caption_column: str = "",
) -> Source:
    """Call the user's function that `data.source` names, and open what it returns.

    Args:
        function: Function from "train" or "val" to the images of that split, or None if there are
            none.
        reference: Value of `data.source`, for messages.
        split: "train" or "val".
        arguments: Value of `data.args`, which are further arguments of the function.
        pixel_format: Number of channels and range of the images.
        caption_column: The setting `data.caption_column`.

    Raises:
        NoSuchSplit: If there is no validation split.
        ValueError: If the function fails or does not return images.
    """
    call = ", ".join([repr(split), *(f"{name}={value!r}" for name, value in arguments.items())])
    if not callable(function):
        raise ValueError(
            f"data.source: {reference} is of type {type(function).__name__}, not a function; give "
            "a function that returns the images of 'train' or 'val'"
        )
    try:
        images = function(split, **arguments)
    except (NoSuchSplit, UnreadableImage):
        raise
    except Exception as error:  # a user's function can raise anything
        raise ValueError(
            f"data.source: {reference}({call}) fails: {type(error).__name__}: {error}"
        ) from error
    if images is None and split == "val":
        raise NoSuchSplit(f"data.source: {reference} has no validation images")
    if images is None:
        raise ValueError(f"data.source: {reference}({call}) returns None; return the images")
    name = reference if split == "train" else f"{reference}({split!r})"
    return open_object(
        images, name, pixel_format.num_channels, pixel_format.value_range, caption_column
    )
