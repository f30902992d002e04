"""Choose the arrays of images and of labels by their names.

A name consists of what the array holds and, before or after it, of a split: `x_train`, `y_train`,
`train_images`, `train_labels`, `images`, `labels`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ssl_pretrain.data.formats.named_splits import WHOLE
from ssl_pretrain.data.formats.stored_array import StoredArray
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_search import split_of

IMAGE_NAMES = ("images", "image", "imgs", "img", "x", "data")
LABEL_NAMES = ("labels", "label", "y", "targets", "target")
NO_LABELS = "none"  # value of data.label_column


@dataclass(frozen=True)
class ArrayPair:
    """The images of a split, and their labels if there are any."""

    images: StoredArray
    labels: StoredArray | None


def parse_name(name: str) -> tuple[str, str]:
    """Return what an array holds, in lower case, and its split, which is empty if it has none."""
    words = re.split("[_-]", name)
    for position in (0, -1):
        if split_of(words[position]):
            split = words.pop(position)
            return "_".join(words).lower(), split
    return name.lower(), WHOLE


def choose_arrays(
    arrays: Mapping[str, StoredArray], image_name: str, label_name: str, path: str
) -> dict[str, ArrayPair]:
    """Return the arrays of each split, by its name.

    Args:
        arrays: Arrays by name.
        image_name: The setting `data.image_column`, which may leave out the split. If it is empty,
            the arrays are found by their names and shapes.
        label_name: The setting `data.label_column`, or "none" for no labels.
        path: The file or folder, for messages.

    Raises:
        ValueError: If no array or several ones may hold the images or the labels.
    """
    holds = _choose_images(arrays, image_name, path)
    images = {parse_name(name)[1]: name for name in arrays if holds in (name, parse_name(name)[0])}
    pairs = {}
    for split, name in images.items():
        labels = choose_labels(arrays, holds, split, label_name, path)
        pairs[split] = ArrayPair(arrays[name], labels)
    return pairs


def _choose_images(arrays: Mapping[str, StoredArray], wanted: str, path: str) -> str:
    """Return what the arrays of images hold, or the name of a single array."""
    contents = "; ".join(
        f"{name} {array.dtype.name} {array.shape}" for name, array in list(arrays.items())[:20]
    )
    if wanted:
        if wanted in arrays:
            return wanted
        if any(parse_name(name)[0] == wanted.lower() for name in arrays):
            return wanted.lower()
        raise ValueError(
            f"data.image_column: {path} has no array {wanted!r}; it has {contents or 'none'}"
        )
    candidates: dict[str, list[str]] = {}
    for name, array in arrays.items():
        content = parse_name(name)[0]
        may_be_object = array.dtype.hasobject and content in IMAGE_NAMES
        if len(array.shape) in (3, 4) or may_be_object:
            candidates.setdefault(content, []).append(name)
    usual = [name for name in IMAGE_NAMES if name in candidates]
    choices = usual or list(candidates)
    if not choices:
        raise ValueError(
            f"data.root: {path} has no array of images, with the shape (n, height, width), "
            f"(n, height, width, 3) or (n, 3, height, width); it has {contents or 'no arrays'}"
        )
    if len(choices) > 1:
        names = [name for choice in choices for name in candidates[choice]]
        raise ValueError(
            f"data.image_column: several arrays of {path} may hold the images "
            f"({abbreviate(names)}); choose one, as in data.image_column={names[0]}"
        )
    return choices[0]


def choose_labels(
    arrays: Mapping[str, StoredArray], holds: str, split: str, wanted: str, path: str
) -> StoredArray | None:
    """Return the array of labels that belongs to the images of a split, or None."""
    if wanted == NO_LABELS:
        return None
    own_split = {parse_name(name)[0]: name for name in arrays if parse_name(name)[1] == split}
    if wanted:
        if wanted not in arrays and not any(parse_name(name)[0] == wanted for name in arrays):
            raise ValueError(
                f"data.label_column: {path} has no array {wanted!r}; it has {', '.join(arrays)}"
            )
        name = wanted if wanted in arrays else own_split.get(wanted)
        return arrays[name] if name is not None else None
    content = parse_name(holds)[0]
    beside = [f"{content}_{name}" for name in LABEL_NAMES]  # cells_labels beside cells
    names = [own_split[name] for name in (*beside, *LABEL_NAMES) if name in own_split]
    if len(names) > 1:
        raise ValueError(
            f"data.label_column: several arrays of {path} may hold the labels "
            f"({abbreviate(names)}); choose one, as in data.label_column={names[0]}, or set "
            "data.label_column=none"
        )
    return arrays[names[0]] if names else None


def read_labels(pair: ArrayPair) -> tuple[list[int] | list[str] | None, list[str]]:
    """Return the label of each image, or None if there are none, and notes about them.

    Raises:
        ValueError: If the labels are not one per image, or neither numbers nor names.
    """
    array = pair.labels
    if array is None:
        return None, []
    shape = tuple(length for length in array.shape[1:] if length != 1)
    num_images = pair.images.shape[0]
    if shape or not array.shape:
        return None, [
            f"{array.name} has the shape {array.shape}, not one label per image, so the images "
            "have no labels"
        ]
    if array.shape[0] != num_images:
        raise ValueError(
            f"data.label_column: {array.name} has {array.shape[0]:,} labels, and "
            f"{pair.images.name} has {num_images:,} images; give one label per image, or set "
            "data.label_column=none"
        )
    if array.dtype.hasobject:
        raise ValueError(
            f"data.label_column: {array.name} is an array of Python objects, which only pickle can "
            "load, and a pickle can run any program; save the labels as an array of numbers or "
            "text, or set data.label_column=none"
        )
    values = array.load().reshape(-1)
    if values.dtype.kind == "f" and (values == np.rint(values)).all():
        values = values.astype(np.int64)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    if values.dtype.kind not in "buiU":
        raise ValueError(
            f"data.label_column: {array.name} has values of type {array.dtype}, neither whole "
            "numbers nor names; choose another array, or set data.label_column=none"
        )
    return (values.astype(np.int64) if values.dtype.kind == "b" else values).tolist(), []
