"""Tiny data sets with masks: colored rectangles on gray noise, in each layout."""

from pathlib import Path

import numpy as np
from PIL import Image

from ssl_pretrain.eval.dense.mask_sources import MaskSources

COLORS = {"ball": (220, 40, 40), "box": (40, 200, 60)}
HEIGHT, WIDTH = 40, 48
CLASSES = ["background", *COLORS]


def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one rectangle per class. Its right edge of two pixels is void.

    Returns:
        The pixels and the mask, whose values are 0 for the background, 1, 2, and 255 for void.
    """
    generator = np.random.default_rng(number)
    pixels = generator.integers(90, 140, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for column, color in enumerate(COLORS.values()):
        width, height = generator.integers(10, 20, 2)
        left = 24 * column + generator.integers(0, 24 - width + 1)
        top = generator.integers(0, HEIGHT - height)
        area = np.s_[top : top + height, left : left + width]
        pixels[area], mask[area] = color, column + 1
        mask[top : top + height, left + width - 2 : left + width] = 255
    return pixels, mask


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([7, 8, 9] * 256)
    image.save(path)
    return path


def write_folders(root: Path, num_train: int = 12, num_test: int = 6) -> Path:
    """Write images/{train,val} and masks/{train,val} and return `root`."""
    for split, numbers in (
        ("train", range(num_train)),
        ("val", range(num_train, num_train + num_test)),
    ):
        for number in numbers:
            pixels, mask = draw(number)
            save(root / "images" / split / f"{number}.png", pixels)
            save(root / "masks" / split / f"{number}.png", mask)
    return root


def write_voc(root: Path) -> Path:
    """Write VOCdevkit/VOC2012 with palette masks and return VOCdevkit."""
    folder = root / "VOCdevkit/VOC2012"
    splits = {"train": [0, 1], "val": [2]}
    for names in splits.values():
        for number in names:
            pixels, mask = draw(number)
            save(folder / "JPEGImages" / f"2007_{number}.jpg", pixels)
            save(folder / "SegmentationClass" / f"2007_{number}.png", mask, "P")
    lists = folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, names in splits.items():
        (lists / f"{split}.txt").write_text("".join(f"2007_{number}\n" for number in names))
    return root / "VOCdevkit"


def write_ade20k(root: Path) -> Path:
    """Write ADEChallengeData2016, in which 0 is void and the background is 1."""
    folder = root / "ADEChallengeData2016"
    for split, numbers in (("training", [0, 1]), ("validation", [2])):
        for number in numbers:
            pixels, mask = draw(number)
            shifted = np.where(mask == 255, 0, mask + 1).astype(np.uint8)
            save(folder / "images" / split / f"ADE_{number}.jpg", pixels)
            save(folder / "annotations" / split / f"ADE_{number}.png", shifted)
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1\t9\t9\twall", "2\t0.1\t9\t9\tscreen, monitor"]
    rows.append("3\t0.1\t9\t9\tscreen")
    (folder / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return folder


def write_sources(root: Path) -> MaskSources:
    """Write images and masks of both splits and return their locations."""
    write_folders(root)
    return MaskSources(images=str(root / "images"), masks=str(root / "masks"), classes=CLASSES)
