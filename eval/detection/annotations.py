"""Images and their annotated objects, independent of the file format of the annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.data.images import decode, read_header
from ssl_pretrain.data.pixels import RGB, PixelFormat, check_conversion
from ssl_pretrain.eval.file_tree import read_file


@dataclass
class Objects:
    """The annotated objects of one image.

    Attributes:
        boxes: float32 (n, 4), the left, top, right and bottom edges in pixels from the top left
            corner of the image.
        labels: int64 (n,). The first class is 1, because 0 is the background.
        ignored: bool (n,), True for VOC's difficult objects and COCO's crowds. Training leaves
            these objects out, and detecting one does not change the score.
        segments: COCO's polygons or run lengths, one entry per object. Empty if there are only
            boxes.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    segments: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


def build_objects(
    boxes: list[list[float]], labels: list[int], ignored: list[bool], segments: Sequence[Any] = ()
) -> Objects:
    """Build an image's objects, without those whose boxes have no area."""
    edges = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    has_area = (edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])
    return Objects(
        edges[has_area],
        np.array(labels, dtype=np.int64)[has_area],
        np.array(ignored, dtype=bool)[has_area],
        [segment for segment, is_kept in zip(segments, has_area) if is_kept],
    )


class AnnotatedImages:
    """Indexed images with their annotated objects.

    Pixels are read on demand, so each loader worker only needs a small copy.

    Attributes:
        name: Name of the data set, for messages.
        files: Folder or zip file of each image, and the image's path inside.
        objects: Objects of each image.
        classes: Names of the classes. The first class has label 1.
        pixel_format: Number of channels in which the images are read.
    """

    def __init__(
        self,
        name: str,
        files: list[tuple[Path, str]],
        objects: list[Objects],
        classes: list[str],
        pixel_format: PixelFormat = RGB,
    ):
        self.name, self.files, self.objects, self.classes = name, files, objects, classes
        self.pixel_format = pixel_format

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> np.ndarray:
        """Return the pixels of an image, uint8 (height, width, channels).

        Raises:
            UnreadableImage: If the file is not an image. The message names the file.
        """
        return decode(self._read_file(index), self.files[index][1], self.pixel_format)

    def _read_file(self, index: int) -> bytes:
        return read_file(*self.files[index])

    def read_as(self, pixel_format: PixelFormat) -> AnnotatedImages:
        """Return the same images, read in another number of channels.

        Raises:
            WrongChannels: If the first image has another number.
        """
        name = self.files[0][1]
        num_channels = read_header(self._read_file(0), name).num_channels
        check_conversion(name, num_channels, pixel_format.num_channels)
        return AnnotatedImages(self.name, self.files, self.objects, self.classes, pixel_format)

    def subset(self, indices: Sequence[int]) -> AnnotatedImages:
        """Return the images at `indices`, in that order."""
        files = [self.files[index] for index in indices]
        objects = [self.objects[index] for index in indices]
        return AnnotatedImages(self.name, files, objects, self.classes, self.pixel_format)

    def trainable_subset(self) -> AnnotatedImages:
        """Return the images that have at least one object to learn from.

        Raises:
            ValueError: If there is no such image.
        """
        indices = [i for i, objects in enumerate(self.objects) if (~objects.ignored).any()]
        if not indices:
            raise ValueError(
                f"{self.name}: none of its {len(self)} images has a box to learn from; "
                "check that the annotations belong to these images"
            )
        return self.subset(indices)


def concatenate(data_sets: Sequence[AnnotatedImages]) -> AnnotatedImages:
    """Join data sets with the same classes, such as VOC 2007 and 2012."""
    return AnnotatedImages(
        " and ".join(images.name for images in data_sets),
        [file for images in data_sets for file in images.files],
        [objects for images in data_sets for objects in images.objects],
        data_sets[0].classes,
        data_sets[0].pixel_format,
    )
