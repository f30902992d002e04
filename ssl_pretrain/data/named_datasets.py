"""scikit-learn's handwritten digits and torchvision's CIFAR-10, data sets that need no path."""

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
from ssl_pretrain.data.pixels import PixelFormat, check_conversion

_NUM_VAL_PER_CLASS = 50


class Digits(Source):
    """Gray images of 8x8 pixels, 1,297 for training and 500 for validation."""

    def __init__(self, split: str, num_channels: int = 3):
        check_conversion("data.source: digits", 1, num_channels)
        # This import takes a second, and the other sources do not need it.
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = rng.permutation(0, 0, len(digits.target), rng.Purpose.SPLIT)
        targets = digits.target[order]
        val_indices = [order[targets == digit][:_NUM_VAL_PER_CLASS] for digit in range(10)]
        is_val = np.isin(np.arange(len(order)), val_indices)
        self._sklearn_indices = np.flatnonzero(is_val == (split == "val"))
        super().__init__(
            "scikit-learn's digits",
            labels=digits.target[self._sklearn_indices],
            classes=[str(digit) for digit in range(10)],
            pixel_format=PixelFormat(num_channels),
        )
        gray = np.rint(digits.images[self._sklearn_indices] * (255 / 16)).astype(np.uint8)
        self._pixels = np.repeat(gray[..., None], num_channels, axis=3)

    def read(self, index: int) -> np.ndarray:
        """Return the gray pixels of one digit, uint8 (8, 8, num_channels)."""
        return self._pixels[index]

    def name(self, index: int) -> str:
        """Return `digits/` and the image's index in scikit-learn's data set."""
        return f"digits/{self._sklearn_indices[index]}"

    def take(self, indices: np.ndarray) -> Self:
        """Return a source of the digits at `indices`, in that order."""
        subset = super().take(indices)
        subset._sklearn_indices = self._sklearn_indices[indices]
        subset._pixels = self._pixels[indices]
        return subset

    def check_present(self) -> None:
        """Do nothing, because the digits are part of scikit-learn."""

    def _identity(self) -> bytes:
        return b"digits" + self._sklearn_indices.tobytes()


def pack_cifar10(root: str, cache_dir: Path) -> Path:
    """Write CIFAR-10 to `cache_dir`/cifar10.zip unless that file exists, and return its path.

    The zip contains train/<class>/ and test/<class>/.

    Args:
        root: Folder of torchvision's CIFAR-10. An empty string downloads the data set.
        cache_dir: Folder for the zip.

    Raises:
        ValueError: If the images can be neither read nor downloaded.
    """
    path = cache_dir / "cifar10.zip"
    if path.exists():
        return path
    from torchvision.datasets import CIFAR10  # slow to import

    with tempfile.TemporaryDirectory() as download_folder:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            splits = {
                split: CIFAR10(root or download_folder, train=split == "train", download=not root)
                for split in ("train", "test")
            }
        except Exception as error:  # urllib, tarfile and torchvision raise many kinds of errors
            raise ValueError(
                f"data.root: CIFAR-10 cannot be loaded with torchvision ({error}); without a "
                "network, set data.root to a folder or a .zip with train/<class>/ and "
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
