"""The interface through which the loader and the evaluations read images, and a source of files."""

import copy
import errno
import hashlib
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from ssl_pretrain.data.caption_texts import PackedCaptions, clean_captions
from ssl_pretrain.data.images import (
    MAX_BYTES,
    ImageHeader,
    UnreadableImage,
    decode,
    read_header,
)
from ssl_pretrain.data.listing import Listing, Span
from ssl_pretrain.data.pixels import RGB, PixelFormat
from ssl_pretrain.data.zip_archive import read_span
from ssl_pretrain.system.platform_support import BINARY, NONBLOCK

_NUM_PROBED_ITEMS = 256  # evenly spaced items whose content is part of the fingerprint

# A function from the number of an item to its caption or captions, which may be missing.
ReadCaptions = Callable[[int], Any]


class NoSuchSplit(ValueError):
    """The data set has no folder or list for this split."""


class Source(ABC):
    """The images of one split in a fixed order, indexed from 0.

    A source is small when pickled, because every loader worker gets a copy. Several threads and
    processes may read from it at the same time.

    Attributes:
        full_path: Path of the images' folder or file, for messages. The embedded digits have a name
            instead.
        labels: Index of each image's class, int64 (n,), or -1 for an image without a label.
            Supervised methods and evaluations need labels.
        classes: Names of the classes of the training split. The validation split uses the same
            classes.
        notes: Lines to print at the start of a run, about the layout and skipped files.
        pixel_format: Number of channels, and range of the values that become 0 and 255.
        supports_range: True if images with more than 8 bits per value are read by that range.
        num_texts: Number of texts per item. Images with captions have 1, and pairs of sentences 2
            or, with a hard negative, 3.
        has_images: False if the items consist of texts only.
    """

    supports_range = False
    num_texts: int = 0
    has_images: bool = True

    def __init__(
        self,
        full_path: str,
        labels: np.ndarray,
        classes: list[str],
        pixel_format: PixelFormat = RGB,
    ):
        self.full_path = full_path
        self.labels = labels.astype(np.int64)
        self.classes = classes
        self.notes: list[str] = []
        self.pixel_format = pixel_format

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_channels(self) -> int:
        """Channels of every image."""
        return self.pixel_format.num_channels

    def label(self, index: int) -> int:
        """Return the label of one image, or -1 if it has none."""
        return int(self.labels[index])

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Return the pixels of one image, uint8 (height, width, num_channels).

        Raises:
            UnreadableImage: If the image is absent or damaged. The message names the file.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of the image's file, for messages."""

    def header(self, index: int) -> ImageHeader:
        """Return the format, size and range of values of one image, if ranges are supported.

        Raises:
            UnreadableImage: If the image is absent or damaged.
        """
        raise NotImplementedError(f"{type(self).__name__} has images of 8 bits")

    def texts(self, index: int) -> list[list[str]]:
        """Return the alternatives of each text of an item, `num_texts` lists.

        The captions of an image are alternatives of one text. Its list is empty if it has none.

        Raises:
            UnreadableImage: If the texts cannot be read. The message names the item.
        """
        assert not self.num_texts, f"{type(self).__name__} has texts, but does not read them"
        return []

    def without_texts(self) -> Self:
        """Return a source of the same images without their texts."""
        source = copy.copy(self)
        source.num_texts = 0
        return source

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the images at `indices`, in that order."""
        subset = copy.copy(self)
        subset.labels = self.labels[indices]
        subset.notes = []
        return subset

    def with_classes(self, classes: list[str]) -> Self:
        """Return this source with its labels as indices into other classes.

        Labels that are numbers without names are such indices already. Classes of this source that
        are not among the other ones are added at the end.

        Args:
            classes: Names of the classes, those of the training split.
        """
        own_classes = self.classes
        are_indices = all(name.isdecimal() and int(name) < len(classes) for name in own_classes)
        if are_indices and not set(own_classes) & set(classes):
            own_classes = [classes[int(name)] for name in own_classes]
        all_classes = [*classes, *(name for name in own_classes if name not in set(classes))]
        new_labels = np.array([*(all_classes.index(name) for name in own_classes), -1])
        source = copy.copy(self)
        source.labels, source.classes = new_labels[self.labels], all_classes
        return source

    @abstractmethod
    def check_present(self) -> None:
        """Raise FileNotFoundError if the whole folder or file is missing.

        This is called when an image is unreadable. If the whole source is missing, no other image
        is worth trying.
        """

    def prefetch(self, first: int, count: int) -> None:  # noqa: B027
        """Ask the system to read consecutive images into memory, without waiting for it."""

    def explain_no_workers(self) -> str:
        """Return why no worker process can read these images, or an empty string if one can."""
        return ""

    @property
    def fingerprint(self) -> str:
        """Digest of the labels, the classes, the order and the identity, as 16 hexadecimal digits.

        A run can only be resumed with a source that has the same fingerprint.
        """
        digest = hashlib.sha256(self._identity())
        if self.num_texts:
            digest.update(self._identity_of_texts())
        digest.update(self.labels.tobytes())
        digest.update("\n".join(self.classes).encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    @abstractmethod
    def _identity(self) -> bytes:
        """Return bytes that identify the images in their order.

        These are the paths of files, the keys and lengths in shards, or a digest of a few images.
        """

    def _identity_of_texts(self) -> bytes:
        """Return bytes that identify the texts, where these are cheap to know."""
        return b""


class EncodedSource(Source):
    """A source of encoded images, such as JPEG files."""

    def read_bytes(self, index: int) -> bytes:
        """Return the stored bytes of one image. Raise UnreadableImage if that fails."""
        try:
            return self._stored_bytes(index)
        except OSError as error:
            raise UnreadableImage(f"{self.name(index)}: {error.strerror or error}") from error

    @abstractmethod
    def _stored_bytes(self, index: int) -> bytes:
        """Return the stored bytes of one image. Raise OSError if that fails."""


class NumberedSource(Source):
    """A source of the items of a table, array or object, whose subsets keep the items' numbers.

    Subclasses set `_digest` to a digest of the content of a few items.

    Args:
        full_path: Name of the data set, for messages.
        labels: Index of each item's class, or -1.
        classes: Names of the classes.
        pixel_format: Number of channels and range of the images.
        read_captions: Function that returns the caption or the captions of an item, or None if the
            images have no captions.
    """

    _digest: bytes

    def __init__(
        self,
        full_path: str,
        labels: np.ndarray,
        classes: list[str],
        pixel_format: PixelFormat = RGB,
        read_captions: ReadCaptions | None = None,
    ):
        super().__init__(full_path, labels, classes, pixel_format)
        self._item_numbers = np.arange(len(labels))
        self._read_captions = read_captions
        self.num_texts = int(read_captions is not None)

    def texts(self, index: int) -> list[list[str]]:
        """Return the captions of one image in a list, or nothing if the images have none."""
        if not self.num_texts or self._read_captions is None:
            return []
        try:
            value = self._read_captions(int(self._item_numbers[index]))
        except Exception as error:  # a user's data set can raise anything
            reason = f"{type(error).__name__}: {error}"
            raise UnreadableImage(f"{self.name(index)}: no caption, {reason}") from error
        return [clean_captions(value)]

    def name(self, index: int) -> str:
        """Return the name of the data set and the number of the item, for messages."""
        return f"{self.full_path}[{self._item_numbers[index]}]"

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the images at `indices`, in that order."""
        subset = super().take(indices)
        subset._item_numbers = self._item_numbers[indices]
        return subset

    def _probed_indices(self) -> list[int]:
        """Return the indices of evenly spaced items, for `_digest`."""
        indices = np.linspace(0, len(self) - 1, _NUM_PROBED_ITEMS).astype(np.int64)
        return np.unique(indices).tolist()

    def _identity(self) -> bytes:
        return self._digest + self._item_numbers.tobytes()

    def _identity_of_texts(self) -> bytes:
        texts = [self.texts(index) for index in self._probed_indices()]
        return json.dumps(texts).encode()


class ImageFiles(EncodedSource):
    """Image files in a folder or in a zip, which is read without unpacking.

    Args:
        full_path: Path of the folder, the zip or the list, for messages.
        files: Paths of the images.
        labels: Index of each image's class, or -1.
        classes: Names of the classes.
        pixel_format: Number of channels and range of the images.
        captions: Captions of each image, or None if the images have no captions.
    """

    supports_range = True

    def __init__(
        self,
        full_path: str,
        files: Listing,
        labels: np.ndarray,
        classes: list[str],
        pixel_format: PixelFormat = RGB,
        captions: PackedCaptions | None = None,
    ):
        super().__init__(full_path, labels, classes, pixel_format)
        self.files, self._captions = files, captions
        self.num_texts = int(captions is not None)
        self._archive: int | None = None  # file descriptor of the zip

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None}  # a descriptor is only valid in its own process

    def read(self, index: int) -> np.ndarray:
        """Read and decode one file, uint8 (height, width, num_channels).

        Raises:
            UnreadableImage: If the file cannot be read or decoded. The message contains the path.
        """
        return decode(self.read_bytes(index), self.name(index), self.pixel_format)

    def header(self, index: int) -> ImageHeader:
        """Return the format, size and range of values of one file."""
        return read_header(self.read_bytes(index), self.name(index), self.num_channels)

    def name(self, index: int) -> str:
        """Return the path of one file, for messages. In a zip, it starts with the zip's path."""
        return os.path.join(self.files.root, self.files.folder_in_zip, self.files.path(index))

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the files at `indices`, in that order."""
        subset = super().take(indices)
        subset.files = self.files.take(indices)
        subset._captions = self._captions.take(indices) if self._captions is not None else None
        return subset

    def texts(self, index: int) -> list[list[str]]:
        """Return the captions of one image in a list, or nothing if the images have none."""
        if not self.num_texts or self._captions is None:
            return []
        return [self._captions.captions(index)]

    def check_present(self) -> None:
        """Raise FileNotFoundError if the folder or zip no longer exists."""
        if not os.path.exists(self.files.root):
            raise FileNotFoundError(
                f"data.root: {self.files.root} no longer exists, but existed when the run began"
            )

    def _stored_bytes(self, index: int) -> bytes:
        if not len(self.files.spans):
            return _read_regular_file(os.path.join(self.files.root, self.files.path(index)))
        if self._archive is None:
            self._archive = os.open(self.files.root, os.O_RDONLY | BINARY)
        return read_span(self._archive, Span(*self.files.spans[index].tolist()))

    def _identity(self) -> bytes:
        return self.files.packed_paths.tobytes() + self.files.ends.tobytes()

    def _identity_of_texts(self) -> bytes:
        return self._captions.identity() if self._captions is not None else b""


def _read_regular_file(path: str) -> bytes:
    """Return the bytes of a file. Raise OSError for a pipe or device, which may never end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"{status.st_size:,} bytes are too many for an image")
        return file.read()


def require_labels(source: Source, purpose: str) -> None:
    """Raise ValueError unless every image has a label.

    Args:
        source: Source of the images.
        purpose: Name of the task that needs the labels, such as "k-NN", for the message.
    """
    unlabeled = np.flatnonzero(source.labels < 0)
    if not len(unlabeled):
        return
    num_labeled_text, example_text = "no", ""
    if len(unlabeled) < len(source):
        num_labeled_text = f"{len(source) - len(unlabeled)} of {len(source)}"
        example_text = f" (the first without a label: {source.name(int(unlabeled[0]))})"
    raise ValueError(
        f"data.root: {purpose} needs labels, and {source.full_path} has {num_labeled_text} "
        f"labeled images{example_text}; put the images in one folder per class "
        "(<class>/<file>), or list them in a CSV as path,label"
    )
