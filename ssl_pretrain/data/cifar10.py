"""CIFAR-10 as torchvision has it, turned once into a zip of PNG files so that one way of reading serves every data set."""

import io
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

_ELSEWHERE = "where there is no network, set data.root to a folder or a .zip that holds train/<class>/ and test/<class>/"


def packed(root: str, cache: Path) -> Path:
    """`cache`/cifar10.zip with train/<class>/ and test/<class>/, made if absent: from torchvision's folder in `root`, or downloaded.

    Raises:
        ValueError: it can be neither read nor downloaded; says where else the images may come from.
    """
    path = cache / "cifar10.zip"
    if path.exists():
        return path
    from torchvision.datasets import CIFAR10  # imports half of torchvision, for this one call

    with tempfile.TemporaryDirectory() as scratch:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            parts = {
                part: CIFAR10(root or scratch, train=part == "train", download=not root)
                for part in ("train", "test")
            }
        except Exception as error:  # urllib, tarfile and torchvision each raise their own
            raise ValueError(
                f"data.root: CIFAR-10 cannot be had from torchvision ({error}); {_ELSEWHERE}"
            ) from error
    print(f"writing {path} (once)", file=sys.stderr, flush=True)
    handle, beside = tempfile.mkstemp(
        dir=cache, suffix=".part"
    )  # renamed when whole: another rank may be looking for it
    try:
        with (
            os.fdopen(handle, "wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            for part, images in parts.items():
                for number, (pixels, label) in enumerate(zip(images.data, images.targets)):
                    png = io.BytesIO()
                    Image.fromarray(pixels).save(png, "PNG")
                    archive.writestr(
                        f"{part}/{images.classes[label]}/{number:05d}.png", png.getvalue()
                    )
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    return path
