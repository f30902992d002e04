"""The embedded data set: scikit-learn's handwritten digits."""

from typing import Self

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.data.image_source import Source

_NUM_CLASSES = 10
_VAL_PER_CLASS = 50


class Digits(Source):
    """1,797 images of 8x8 pixels in 16 gray levels: 1,297 for training, 500 for validation."""

    def __init__(self, split: str):
        # Takes a second to import, which the other sources do not need.
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = rng.permutation(0, 0, len(digits.target), rng.Purpose.SPLIT)
        val_numbers = np.concatenate(
            [order[digits.target[order] == digit][:_VAL_PER_CLASS] for digit in range(_NUM_CLASSES)]
        )
        is_val = np.isin(np.arange(len(order)), val_numbers)
        self._numbers = np.flatnonzero(is_val == (split == "val"))
        classes = [str(digit) for digit in range(_NUM_CLASSES)]
        super().__init__("scikit-learn's digits", digits.target[self._numbers], classes)
        gray = np.rint(digits.images[self._numbers] * (255 / 16)).astype(np.uint8)
        self._pixels = np.repeat(gray[..., None], 3, axis=3)

    def read(self, index: int) -> np.ndarray:
        """Return the pixels of one digit, gray as RGB, uint8 (8, 8, 3)."""
        return self._pixels[index]

    def name(self, index: int) -> str:
        """Return `digits/` and the digit's number in scikit-learn's data set."""
        return f"digits/{self._numbers[index]}"

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the digits at `indices`, in that order."""
        subset = super().take(indices)
        subset._numbers, subset._pixels = self._numbers[indices], self._pixels[indices]
        return subset

    def check_present(self) -> None:
        """Do nothing, as the digits are embedded."""

    def _identity(self) -> bytes:
        return b"digits" + self._numbers.tobytes()
