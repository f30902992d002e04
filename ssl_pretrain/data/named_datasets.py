"""Data sets that need no path: scikit-learn's handwritten digits, and CIFAR-10 from torchvision."""

import io
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from ssl_pretrain import rng
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.listing import open_atomically

_VAL_PER_CLASS = 50


class Digits(Source):
    """1,797 images of 8x8 pixels in 16 gray levels: 1,297 for training, 500 for validation."""

    def __init__(self, split: str):
        # Takes a second to import, which the other sources do not need.
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = rng.permutation(0, 0, len(digits.target), rng.Purpose.SPLIT)
        val_numbers = [order[digits.target[order] == digit][:_VAL_PER_CLASS] for digit in range(10)]
        is_val = np.isin(np.arange(len(order)), val_numbers)
        self._numbers = np.flatnonzero(is_val == (split == "val"))
        super().__init__(
            "scikit-learn's digits",
            labels=digits.target[self._numbers],
            classes=[str(digit) for digit in range(10)],
        )
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
        """Do nothing, as the digits are part of scikit-learn."""

    def _identity(self) -> bytes:
        return b"digits" + self._numbers.tobytes()


def pack_cifar10(root: str, cache: Path) -> Path:
    """Return `cache`/cifar10.zip with train/<class>/ and test/<class>/, written if it is absent.

    Args:
        root: The folder of torchvision's CIFAR-10. "" downloads it.
        cache: The folder for the zip.

    Raises:
        ValueError: If the images can be neither read nor downloaded.
    """
    path = cache / "cifar10.zip"
    if path.exists():
        return path
    from torchvision.datasets import CIFAR10  # imports half of torchvision

    with tempfile.TemporaryDirectory() as download_folder:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            splits = {
                split: CIFAR10(root or download_folder, train=split == "train", download=not root)
                for split in ("train", "test")
            }
        except Exception as error:  # urllib, tarfile and torchvision raise errors of their own
            raise ValueError(
                f"data.root: CIFAR-10 cannot be loaded with torchvision ({error}); without a "
                "network, set data.root to a folder or a .zip that holds train/<class>/ and "
                "test/<class>/"
            ) from error
    print(f"writing {path} (once)", file=sys.stderr, flush=True)
    with open_atomically(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for split, images in splits.items():
            for number, (pixels, label) in enumerate(zip(images.data, images.targets)):
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                archive.writestr(
                    f"{split}/{images.classes[label]}/{number:05d}.png", png.getvalue()
                )
    return path
