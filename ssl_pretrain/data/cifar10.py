"""CIFAR-10 from torchvision, converted once to a zip of PNG files."""

import io
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from ssl_pretrain.data.atomic_file import atomic_file


def pack_as_zip(root: str, cache: Path) -> Path:
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

    with tempfile.TemporaryDirectory() as scratch:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            splits = {
                split: CIFAR10(root or scratch, train=split == "train", download=not root)
                for split in ("train", "test")
            }
        except Exception as error:  # urllib, tarfile and torchvision raise errors of their own
            raise ValueError(
                f"data.root: CIFAR-10 cannot be loaded with torchvision ({error}); without a "
                "network, set data.root to a folder or a .zip that holds train/<class>/ and "
                "test/<class>/"
            ) from error
    print(f"writing {path} (once)", file=sys.stderr, flush=True)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for split, images in splits.items():
            for number, (pixels, label) in enumerate(zip(images.data, images.targets)):
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                name = f"{split}/{images.classes[label]}/{number:05d}.png"
                archive.writestr(name, png.getvalue())
    return path
