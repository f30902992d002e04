"""Images with a mask each, whose pixels are classes, independent of the layout of the files."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ssl_pretrain.data.file_types import is_array
from ssl_pretrain.data.images import UnreadableImage, decode
from ssl_pretrain.data.pixels import RGB, PixelFormat
from ssl_pretrain.eval.file_tree import FileTree

VOID = 255  # label of pixels that are neither trained on nor scored
MAX_CLASSES = 255  # labels are uint8, and VOID is one of their values
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes of one number
_STRETCH = {"L;2": 85, "L;4": 17}  # factor by which Pillow stretches gray of 2 and 4 bits


@dataclass(frozen=True)
class LabelRule:
    """Meaning of a mask's pixel values.

    Attributes:
        classes: Names of the classes.
        first: Pixel value of the first class. The others follow.
        void: Pixel values that belong to no class.
    """

    classes: tuple[str, ...]
    first: int = 0
    void: tuple[int, ...] = (VOID,)

    def __post_init__(self) -> None:
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(
                f"--classes: {len(self.classes)} names; give 2 to {MAX_CLASSES} classes, with the "
                "background among them if it is one"
            )
        if repeated := {name for name in self.classes if self.classes.count(name) > 1}:
            raise ValueError(
                f"--classes: {', '.join(sorted(repeated))} is named more than once; give each "
                "class a name of its own"
            )

    def apply(self, values: np.ndarray, name: str) -> np.ndarray:
        """Return the labels, uint8 (height, width), of the pixel values of a mask.

        Raises:
            ValueError: If a value is neither a class nor void. The message names the mask.
        """
        is_void = np.isin(values, self.void)
        labels = np.where(is_void, 0, values.astype(np.int64) - self.first)
        if (outside := (labels < 0) | (labels >= len(self.classes))).any():
            value = int(values[outside][0])
            last = self.first + len(self.classes) - 1
            void = " and ".join(map(str, self.void)) or "no value"
            raise ValueError(
                f"{name}: the mask has the value {value}, but the {len(self.classes)} classes are "
                f"{self.first} to {last}, and void is {void}; add the class to --classes, or the "
                "value to --void"
            )
        return np.where(is_void, VOID, labels).astype(np.uint8)


def decode_mask(content: bytes, name: str) -> np.ndarray:
    """Return the pixel values of a mask, (height, width), as stored. Palettes are not applied.

    Raises:
        ValueError: If the file is not an image, is a JPEG, or has colors instead of class numbers.
    """
    if is_array(name):
        raise ValueError(f"{name}: the mask is a .npy; save masks as PNG with one number per pixel")
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, mode = image.format, image.mode
            stretch = _STRETCH.get(str(image.tile[0][3]), 1) if image.tile else 1
            values = np.asarray(image) if mode in _LABEL_MODES and kind != "JPEG" else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).split(" <")[0]  # Pillow adds the address of the file object
        raise ValueError(f"{name}: the mask cannot be read ({reason}); replace the file") from None
    if kind == "JPEG":
        raise ValueError(
            f"{name}: the mask is a JPEG, whose compression changes class numbers; give masks as "
            "PNG"
        )
    if values is None:
        raise ValueError(
            f"{name}: the mask is in Pillow's mode {mode}, with colors instead of class numbers; "
            "give masks with one number per pixel, such as PNG in mode L or P"
        )
    return values.astype(np.int64) // stretch


@dataclass(frozen=True)
class MaskedImages:
    """Indexed images with their masks. Pixels are read on demand.

    Attributes:
        name: Name of the data set, for messages and protocols.
        images: Files of the images.
        masks: Files of the masks.
        pairs: Path of each image and of its mask.
        rule: Meaning of the masks' values.
        pixel_format: Number of channels in which the images are read.
    """

    name: str
    images: FileTree
    masks: FileTree
    pairs: tuple[tuple[str, str], ...]
    rule: LabelRule
    pixel_format: PixelFormat = RGB

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.rule.classes

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image, uint8 (height, width, channels), and its labels, uint8 (height, width).

        Raises:
            UnreadableImage: If the image cannot be decoded.
            ValueError: If the file is not a mask, its size differs from the image's, or it has a
                value without a class.
        """
        image_path, mask_path = self.pairs[index]
        pixels = decode(self._read(self.images, image_path), image_path, self.pixel_format)
        values = self.mask_values(index)
        if values.shape != pixels.shape[:2]:
            height, width = pixels.shape[:2]
            raise ValueError(
                f"{mask_path}: the mask has {values.shape[1]} x {values.shape[0]} pixels, but its "
                f"image {image_path} has {width} x {height}; give both in one size"
            )
        return pixels, self.rule.apply(values, mask_path)

    def mask_values(self, index: int) -> np.ndarray:
        """Return the values of a mask as stored, int64 (height, width).

        Raises:
            ValueError: If the file is not a mask.
        """
        path = self.pairs[index][1]
        return decode_mask(self._read(self.masks, path), path)

    def labels(self, index: int) -> np.ndarray:
        """Return the labels of an image, uint8 (height, width), without reading its pixels.

        Raises:
            ValueError: If the file is not a mask, or has a value without a class.
        """
        return self.rule.apply(self.mask_values(index), self.pairs[index][1])

    def subset(self, indices: Sequence[int]) -> MaskedImages:
        """Return the images at `indices`, in that order."""
        return replace(self, pairs=tuple(self.pairs[index] for index in indices))

    def read_as(self, pixel_format: PixelFormat) -> MaskedImages:
        """Return the same images, read in another number of channels."""
        return replace(self, pixel_format=pixel_format)

    @staticmethod
    def _read(tree: FileTree, path: str) -> bytes:
        try:
            return tree.read(path)
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise UnreadableImage(f"{tree.root}: {path} cannot be read ({error})") from None
