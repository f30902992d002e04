"""The image, the label and the captions of an item of a user's data set."""

from collections.abc import Mapping
from typing import Any

from ssl_pretrain.data.caption_texts import CAPTION_COLUMNS, NO_CAPTIONS, are_captions
from ssl_pretrain.data.formats.table_columns import IMAGE_COLUMNS, LABEL_COLUMNS
from ssl_pretrain.data.image_values import ALLOWED_IMAGES

IMAGE_KEYS = IMAGE_COLUMNS  # usual names of an item's image
LABEL_KEYS = LABEL_COLUMNS


class ItemReader:
    """Reader of the images and the captions of a data set's items.

    The item of the last image is kept until its captions are read, so that it is read once for
    both. The next image is read anew, because a data set that changes its images must be noticed.

    Args:
        data: The data set.
        name: Name of the data set, for messages.
        caption_key: Key or position of the captions in an item, or None if there are none.
    """

    def __init__(self, data: Any, name: str, caption_key: Any):
        self.caption_key = caption_key
        self._data, self._name = data, name
        self._last_item: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last_item": None}

    def read_image(self, index: int) -> Any:
        """Return the image of an item."""
        item = self._data[index]
        if self.caption_key is not None:
            self._last_item = index, item
        return image_of(item, f"{self._name}[{index}]")

    def read_captions(self, index: int) -> Any:
        """Return the caption or the captions of an item, or None if it has none."""
        last, self._last_item = self._last_item, None  # another thread may replace it
        item = last[1] if last is not None and last[0] == index else self._data[index]
        if isinstance(item, Mapping):
            return item.get(self.caption_key)
        return item[self.caption_key]


def find_captions(item: Any, name: str, wanted: str) -> Any:
    """Return the key or the position of the captions in an item, or None if it has none.

    Args:
        item: The first item of the data set.
        name: Name of the data set, for messages.
        wanted: The setting `data.caption_column`.

    Raises:
        ValueError: If the item has no such key, or no text under it.
    """
    if wanted == NO_CAPTIONS:
        return None
    if not isinstance(item, Mapping):
        refuse_caption_column(wanted, name)
        return 1 if _is_captioned_pair(item) else None
    if wanted and not (wanted in item and are_captions(item[wanted])):
        raise ValueError(
            f"data.caption_column: {name}[0] has no text under {wanted!r}; its keys are "
            f"{', '.join(map(str, item))}; choose one of them, or set data.caption_column=none"
        )
    if wanted:
        return wanted
    usual = (key for key in CAPTION_COLUMNS if key in item and are_captions(item[key]))
    return next(usual, None)


def _is_captioned_pair(item: Any) -> bool:
    """Return True for a pair of an image and a list of captions. A single text is a label."""
    is_pair = isinstance(item, (tuple, list)) and len(item) == 2
    return is_pair and isinstance(item[1], (tuple, list)) and are_captions(item[1])


def image_of(item: Any, name: str) -> Any:
    """Return the image of an item, which may be the item itself.

    Raises:
        ValueError: If the item contains no image.
    """
    if isinstance(item, Mapping):
        key = next((key for key in IMAGE_KEYS if key in item), None)
        if key is None:
            raise ValueError(
                f"{name} has the keys {', '.join(map(str, item))}; call the image 'image'"
            )
        return item[key]
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    attributes = ("__array__", "__fspath__", "convert")  # arrays and tensors, paths, PIL images
    is_image_or_path = any(hasattr(image, attribute) for attribute in attributes)
    if isinstance(image, (str, bytes)) or is_image_or_path:
        return image
    raise ValueError(
        f"{name} is of type {type(image).__name__}, not an image; give {ALLOWED_IMAGES}"
    )


def label_of(item: Any) -> Any:
    """Return the label of an item, or None if it has none."""
    if isinstance(item, Mapping):
        return next((item[key] for key in LABEL_KEYS if key in item), None)
    is_pair = isinstance(item, (tuple, list)) and len(item) == 2
    return item[1] if is_pair and not _is_captioned_pair(item) else None


def refuse_caption_column(wanted: str, name: str) -> None:
    """Raise ValueError if `data.caption_column` names a column of a data set that has none."""
    if wanted not in ("", NO_CAPTIONS):
        raise ValueError(f"data.caption_column: {name} has no columns; leave it out")
