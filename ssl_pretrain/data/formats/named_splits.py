"""Choose the training and validation split among the splits that a file or folder contains."""

from collections.abc import Mapping
from typing import TypeVar

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.image_source import NoSuchSplit
from ssl_pretrain.data.messages import abbreviate
from ssl_pretrain.data.split_search import split_of

T = TypeVar("T")
WHOLE = ""  # name of the only split of a data set without splits


def choose_split(available: Mapping[str, T], split: str, config: DataConfig, path: str) -> T:
    """Return the value of the split that is for training or for validation.

    Args:
        available: Values by the name of their split, as the data set spells it.
        split: "train" or "val".
        config: Its keys `train` and `val` may name the splits.
        path: The data set, for messages.

    Raises:
        NoSuchSplit: If there is no validation split.
        ValueError: If there is no such split, or several have its name.
    """
    wanted = config.train if split == "train" else config.val
    if split == "val" and wanted == "none":
        raise NoSuchSplit(f"data.val: {path} has no validation split, because data.val is none")
    names = ", ".join(available)
    if wanted and not (wanted == "." and WHOLE in available):
        if wanted not in available:
            raise ValueError(
                f"data.{split}: {path} has no split {wanted!r}; it has {names or 'no splits'}"
            )
        return available[wanted]
    if split == "train" and WHOLE in available:
        return available[WHOLE]
    for kind in ["train"] if split == "train" else ["val", "test"]:
        matches = [name for name in available if split_of(name) == kind and name != config.train]
        if len(matches) > 1:
            raise ValueError(
                f"data.{split}: {path} contains {abbreviate(matches)}; choose one, as in "
                f"data.{split}={matches[0]}"
            )
        if matches:
            return available[matches[0]]
    if split == "train":
        raise ValueError(
            f"data.train: {path} has no training split; it has {names}; name the one with the "
            f"training images, as in data.train={next(iter(available))}"
        )
    has = f"; it has {names}" if names else ""
    raise NoSuchSplit(
        f"data.val: {path} has no split for validation, such as val or test{has}; name the one "
        "that contains the validation images, or leave out evaluations that need them"
    )
