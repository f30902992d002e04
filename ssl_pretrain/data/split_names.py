"""Recognize the names that people give to the splits of a data set."""

import os
import re

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
TRAIN, HELD_OUT = "train", "held out"
_PATTERNS = {
    TRAIN: re.compile(r"train(ing|set|val|imgs?|images?|data)?|trn"),
    HELD_OUT: re.compile(
        r"(val|valid|validation|dev|test|testing|eval|evaluation|holdout|heldout)"
        r"(set|imgs?|images?|data)?"
    ),
}


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" for a common name of that split, ignoring case."""
    name = name.strip().lower()
    return next((split for split, names in SPELLINGS.items() if name in names), None)


def suggested_split(name: str) -> str | None:
    """Return `TRAIN` or `HELD_OUT` if a word suggests it, as in `train2017` or `images_val`."""
    name_words = words(name)
    return next(
        (kind for kind in _PATTERNS if any(map(_PATTERNS[kind].fullmatch, name_words))), None
    )


def words(name: str) -> list[str]:
    """Split a file name without its suffix into its words, in lower case."""
    stem = os.path.splitext(name)[0]
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", stem)]
