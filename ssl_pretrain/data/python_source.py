"""A source of images that a Python object contains or computes, and its labels."""

import hashlib
import reprlib
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

from ssl_pretrain.data.image_source import NumberedSource, ReadCaptions
from ssl_pretrain.data.image_values import to_pixels
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.pixels import RGB, PixelFormat

NUM_PROBED_IMAGES = 8  # images that are read and compared when a source is created

# A function that returns the item at an index of a data set.
ReadItem = Callable[[int], Any]


class PythonSource(NumberedSource):
    """Images that a Python object contains or computes, such as a torch `Dataset`.

    Args:
        name: Name of the data set, for messages.
        read_image: Function that returns the image at an index, in any form that `to_pixels`
            accepts.
        labels: Labels as integers or names, or None if the images have none.
        num_images: Number of images.
        classes: Names of the classes that integer labels index. If None, they are the sorted
            distinct labels.
        identity: Bytes that identify the data set, in addition to the pixels of a few images.
        pixel_format: Number of channels and range of the images.
        read_captions: Function that returns the captions at an index, or None if there are none.

    Raises:
        ValueError: If there is no image, a label is invalid, or an image or a caption changes when
            it is read again.
    """

    def __init__(
        self,
        name: str,
        read_image: ReadItem,
        labels: Sequence[Any] | np.ndarray | None,
        num_images: int,
        classes: Sequence[str] | None = None,
        identity: bytes = b"",
        pixel_format: PixelFormat = RGB,
        read_captions: ReadCaptions | None = None,
    ):
        if not num_images:
            raise ValueError(f"{name} contains no image; give one with images")
        label_indices, class_names = index_labels(name, labels, num_images, classes)
        super().__init__(name, label_indices, class_names, pixel_format, read_captions)
        self._read_image = read_image
        self._digest = self._probe(identity)

    def read(self, index: int) -> np.ndarray:
        """Return the pixels of one image, uint8 (height, width, num_channels).

        Raises:
            UnreadableImage: If the image cannot be read. The message names it.
        """
        name = self.name(index)
        try:
            return to_pixels(
                self._read_image(int(self._item_numbers[index])), name, self.pixel_format
            )
        except UnreadableImage:
            raise
        except Exception as error:  # a user's data set can raise anything
            message = (
                str(error) if name in str(error) else f"{name}: {type(error).__name__}: {error}"
            )
            raise UnreadableImage(message) from error

    def check_present(self) -> None:
        """Do nothing, because the images are in this program."""

    def explain_no_workers(self) -> str:
        """Return why no worker process can read these images, or an empty string if one can."""
        try:
            pickled = bytes(ForkingPickler.dumps(self))
        except Exception as error:  # pickling calls the object's own code
            return f"it cannot be pickled ({str(error).splitlines()[0]})"
        if b"__main__" in pickled:
            return "its class is defined in the main program instead of a module"
        return ""

    def _probe(self, identity: bytes) -> bytes:
        """Return a digest of the pixels of a few images.

        Raises:
            ValueError: If one of them is unreadable, or it or its caption changes when it is read
                again.
        """
        digest = hashlib.sha256(identity)
        for index in np.linspace(0, len(self) - 1, NUM_PROBED_IMAGES).astype(int).tolist():
            try:
                pixels = self.read(index)
                texts = self.texts(index)
                is_stable = np.array_equal(pixels, self.read(index))
                has_same_texts = texts == self.texts(index)
            except UnreadableImage as error:
                hint = "; give images, or paths that exist" if "FileNotFound" in str(error) else ""
                raise ValueError(f"data: {error}{hint}") from None
            if not is_stable:
                raise ValueError(
                    f"data: {self.name(index)} changes each time it is read; remove the random "
                    "transforms, because pretraining augments the images itself"
                )
            if not has_same_texts:
                raise ValueError(
                    f"data: the caption of {self.name(index)} changes each time it is read; return "
                    "all captions as a list, because pretraining chooses one of them itself"
                )
            digest.update(repr(pixels.shape).encode() + pixels.tobytes())
        return digest.digest()


def index_labels(
    name: str,
    labels: Sequence[Any] | np.ndarray | None,
    num_images: int,
    classes: Sequence[str] | None,
) -> tuple[np.ndarray, list[str]]:
    """Return the index of each image's class, int64 (n,), and the names of the classes.

    The index is -1 for an image without a label, whose label is None or -1.

    Raises:
        ValueError: If the number of labels is wrong, or a label is neither an integer nor a name.
    """
    if labels is None:
        return np.full(num_images, -1), []
    values = [_plain_label(label, name) for label in labels]
    if len(values) != num_images:
        raise ValueError(
            f"{name}: there are {len(values):,} labels for {num_images:,} images; give one label "
            "per image"
        )
    if classes is not None:
        names = [str(class_name) for class_name in classes]
        wrong = [value for value in values if not isinstance(value, int) or value >= len(names)]
        if wrong:
            raise ValueError(
                f"{name}: label {wrong[0]!r} is not the index of one of its {len(names)} classes"
            )
        return np.array(values, np.int64), names
    distinct = sorted({value for value in values if value != -1}, key=lambda v: (str(type(v)), v))
    indices = {value: index for index, value in enumerate(distinct)} | {-1: -1}
    return np.array([indices[value] for value in values], np.int64), list(map(str, distinct))


def _plain_label(label: Any, name: str) -> int | str:
    """Return a label as a Python integer or text, with -1 for a missing one."""
    value = label.item() if isinstance(label, (torch.Tensor, np.generic)) else label
    if value is None:
        return -1
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(
            f"{name}: label {reprlib.repr(value)} is neither an integer nor a name; give the index "
            "or the name of a class, or images without labels"
        )
    return max(value, -1) if isinstance(value, int) else value
