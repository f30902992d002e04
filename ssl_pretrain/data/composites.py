"""Small images with generated captions, to try methods that learn from images and texts.

An image shows one digit or garment in one color, at one of nine places on a background of another
color. Its captions say all of this, so they say more than the class:

    data.source=ssl_pretrain.data.composites:open_split
    data.args={dataset: fashion_mnist}

Everything is a pure function of the seed, the split and the index. The validation images show
held-out digits or garments, and only combinations of object, color and place that no training image
shows. These are a fixed fifth of all combinations. A model that remembers whole captions therefore
gains nothing from it.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

from ssl_pretrain import rng
from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.file_dataset import SplitName
from ssl_pretrain.data.image_source import NumberedSource, Source
from ssl_pretrain.data.named_datasets import Digits
from ssl_pretrain.data.sources import open_source

SIDE = 48  # pixels of an image
_OBJECT_SIDE = 16
_OFFSETS = (2, 16, 30)  # pixels from the left or the top edge
_MAX_JITTER = 2  # pixels in each direction
_NOISE = 8  # largest change of a channel value, out of 255
_HELD_OUT_SHARE = 0.2
_OPACITY_GAIN = 1.5  # makes dark garments visible
_FORMAT = "composites 1"  # change it when the same settings give other images

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GARMENTS = (
    *("T-shirt", "pair of trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
COLORS = {
    "red": (235, 50, 45),
    "orange": (250, 150, 40),
    "yellow": (245, 230, 70),
    "green": (70, 205, 80),
    "turquoise": (60, 215, 215),
    "blue": (85, 135, 255),
    "pink": (250, 130, 200),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "dark red": (95, 15, 20),
    "brown": (90, 55, 25),
    "olive": (75, 75, 20),
    "dark green": (15, 70, 30),
    "teal": (15, 75, 80),
    "dark blue": (20, 30, 100),
    "purple": (75, 25, 90),
    "gray": (85, 85, 85),
}
PLACES = (
    *("at the top left", "at the top", "at the top right"),
    *("on the left", "in the center", "on the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)


_DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
_WHATS = {"digits": DIGITS, "fashion_mnist": GARMENTS}
_NUM_LAYOUT_LANES = 8  # random numbers of an image before those of its noise


class _Layout(NamedTuple):
    """The content of an image, as indices into the names of its attributes, and its geometry."""

    what: int
    color: int
    place: int
    background: int
    object_index: int
    left: int  # pixels
    top: int


def describe(attributes: Mapping[str, str]) -> list[str]:
    """Return the captions of an image with these attributes. Each of them names all attributes."""
    what, color, place = attributes["what"], attributes["color"], attributes["place"]
    background = attributes["background"]
    colored_object, colored_image = _with_article(f"{color} {what}"), _with_article(background)
    return [
        f"{colored_object} {place}, on {colored_image} background",
        f"on {colored_image} background, {colored_object} {place}",
        f"{place} of {colored_image} image there is {colored_object}",
        f"{_with_article(what)} in {color}, drawn {place} on {background}",
        f"the image shows {colored_object} {place} and is otherwise {background}",
    ]


def held_out_combinations(num_whats: int) -> np.ndarray:
    """Return a bool array (what, color, place), True for combinations of validation images only.

    The combinations do not depend on the seed of the images.
    """
    shape = (num_whats, len(COLORS), len(PLACES))
    order = rng.permutation(0, 1, math.prod(shape), rng.Purpose.COMPOSITES)
    is_held_out = np.zeros(len(order), np.bool_)
    is_held_out[order[: round(_HELD_OUT_SHARE * len(order))]] = True
    return is_held_out.reshape(shape)


class Composites(NumberedSource):
    """Images of one object each, with captions. The label is the object.

    Args:
        split: "train" or "val".
        objects: Gray images of the objects, with labels. The objects are bright on black.
        whats: Names of the objects, by their labels.
        num_images: Number of images.
        seed: Seed of the random numbers.
    """

    def __init__(
        self, split: str, objects: Source, whats: tuple[str, ...], num_images: int, seed: int
    ):
        self._objects, self._seed, self._view = objects, seed, int(split == "val")
        self._object_order = np.argsort(objects.labels, kind="stable").astype(np.int32)
        self._object_ends = np.cumsum(np.bincount(objects.labels, minlength=len(whats)))
        self._combinations = np.argwhere(held_out_combinations(len(whats)) == (split == "val"))
        numbers = self._random_numbers(np.arange(num_images), 1)
        labels = self._combinations[_choose(numbers[:, 0], len(self._combinations)), 0]
        super().__init__(f"composites of {objects.full_path}", labels, list(whats))
        self.num_texts = 1
        self.attribute_values = {
            "what": whats,
            "color": tuple(COLORS),
            "place": PLACES,
            "background": tuple(BACKGROUNDS),
        }
        identity = f"{_FORMAT} {split} {seed} {objects.fingerprint} {self.attribute_values}"
        self._digest = hashlib.sha256(identity.encode()).digest()

    def attributes(self, index: int) -> dict[str, str]:
        """Return what an image shows, in the words of its captions.

        The keys are those of `attribute_values`, which has all values of each attribute.
        """
        layout = self._layout(index)._asdict()
        return {key: values[layout[key]] for key, values in self.attribute_values.items()}

    def texts(self, index: int) -> list[list[str]]:
        """Return the captions of one image in a list."""
        return [describe(self.attributes(index))] if self.num_texts else []

    def read(self, index: int) -> np.ndarray:
        """Draw one image, uint8 (48, 48, 3).

        Raises:
            UnreadableImage: If the file of the garments cannot be read.
        """
        layout = self._layout(index)
        color = list(COLORS.values())[layout.color]
        background = list(BACKGROUNDS.values())[layout.background]
        opacity = np.zeros((SIDE, SIDE, 1))
        rows = slice(layout.top, layout.top + _OBJECT_SIDE)
        columns = slice(layout.left, layout.left + _OBJECT_SIDE)
        opacity[rows, columns, 0] = self._opacity(layout.object_index)
        pixels = opacity * np.array(color) + (1 - opacity) * np.array(background)
        item = int(self._item_numbers[index])
        numbers = self._random_numbers(item, _NUM_LAYOUT_LANES + pixels.size)[0]
        noise = numbers[_NUM_LAYOUT_LANES:].reshape(pixels.shape)
        return np.clip(np.rint(pixels + _NOISE * (2 * noise - 1)), 0, 255).astype(np.uint8)

    def check_present(self) -> None:
        """Raise FileNotFoundError if the file of the objects no longer exists."""
        self._objects.check_present()

    def _layout(self, index: int) -> _Layout:
        numbers = self._random_numbers(int(self._item_numbers[index]), 5)[0]
        combination = self._combinations[_choose(numbers[0], len(self._combinations))]
        what, color, place = combination.tolist()
        # Each background has the hue of the color with the same index, which is left out.
        background = (color + 1 + int(_choose(numbers[2], len(COLORS) - 1))) % len(COLORS)
        first = int(self._object_ends[what - 1]) if what else 0
        object_number = first + int(_choose(numbers[1], int(self._object_ends[what]) - first))
        jitter = _choose(numbers[3:5], 2 * _MAX_JITTER + 1) - _MAX_JITTER
        row, column = divmod(place, len(_OFFSETS))
        return _Layout(
            what,
            color,
            place,
            background,
            int(self._object_order[object_number]),
            left=_OFFSETS[column] + int(jitter[0]),
            top=_OFFSETS[row] + int(jitter[1]),
        )

    def _opacity(self, object_index: int) -> np.ndarray:
        """Return the opacity of an object, in [0, 1], at its size in the image."""
        gray = Image.fromarray(self._objects.read(object_index)[..., 0])
        resized = gray.resize((_OBJECT_SIDE, _OBJECT_SIDE), Image.Resampling.BICUBIC)
        return np.minimum(np.asarray(resized) * (_OPACITY_GAIN / 255), 1)

    def _random_numbers(self, items: np.ndarray | int, num_values: int) -> np.ndarray:
        purpose = rng.Purpose.COMPOSITES
        return rng.uniform(self._seed, 0, items, self._view, purpose, num_values)


def open_split(
    split: str,
    dataset: str = "digits",
    root: str = _DEBIAN_FOLDER,
    train_images: int = 20_000,
    val_images: int = 2_000,
    seed: int = 0,
    cache_dir: str = "",
) -> Composites:
    """Return the composites of a split.

    Args:
        split: "train" or "val".
        dataset: "digits" for the digits of scikit-learn, or "fashion_mnist".
        root: Folder with the IDX files of Fashion-MNIST.
        train_images: Number of training images.
        val_images: Number of validation images.
        seed: Seed of the random numbers. The held-out combinations do not depend on it.
        cache_dir: Folder for the unpacked files of Fashion-MNIST. If empty, it is
            ~/.cache/ssl_pretrain.

    Raises:
        ValueError: If the data set is unknown, or its files are missing.
    """
    if dataset not in _WHATS:
        raise ValueError(f"dataset: {dataset!r} is not known; choose one of: {', '.join(_WHATS)}")
    num_images = train_images if split == "train" else val_images
    if num_images < 1:
        raise ValueError(f"{split}_images: {num_images} is too small; give 1 or more")
    if dataset == "digits":
        objects: Source = Digits(split, num_channels=1)
    elif not Path(root).is_dir():
        raise ValueError(
            f"root: {root} is not a folder; install the package dataset-fashion-mnist of Debian or "
            "Ubuntu, or give the folder of the IDX files"
        )
    else:
        config = DataConfig(root=root, channels=1, cache_dir=cache_dir)
        objects = open_source(config, cast(SplitName, split))
    return Composites(split, objects, _WHATS[dataset], num_images, seed)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def _choose(numbers: np.ndarray, num_choices: int) -> np.ndarray:
    """Turn uniform numbers into choices from range(num_choices)."""
    return (np.asarray(numbers) * num_choices).astype(np.int64)
