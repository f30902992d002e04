"""Make images with masks from real pixels: `python -m ssl_pretrain.eval.dense.composed_masks`."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_pretrain import rng
from ssl_pretrain.data.formats.idx_files import read_idx
from ssl_pretrain.data.images import decode
from ssl_pretrain.eval import command_line
from ssl_pretrain.eval.dense.masked_images import VOID, FileTree
from ssl_pretrain.eval.detection.annotation_files import load_voc
from ssl_pretrain.schema import NON_NEGATIVE_INT, POSITIVE_INT
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

HELP = """\
Write a folder with images/{train,val}, masks/{train,val} and classes.txt.

With --photos, objects are pasted into photographs: Fashion-MNIST's clothes, or scikit-learn's
digits. A mask is exact, because it is the set of the pasted pixels. No photograph and no object is
in both splits.

With --bccd, the cells of BCCD are separated from the background by a threshold (Otsu's). A pixel
has the class of the annotated box around it, and is void outside of all boxes or in boxes of
several classes. These are threshold masks, not annotations.

    python -m ssl_pretrain.eval.dense.composed_masks OUT --photos imagenet_sample.zip
    python -m ssl_pretrain.eval.dense.composed_masks OUT --bccd bccd_voc.zip"""
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
CLOTHES = [  # in the order of the labels
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
]
TEST_SHARE = 0.2  # share of the photographs and the digits that is for testing
NUM_OBJECTS = (2, 4)  # pasted into each image
OBJECT_SIDES = (0.3, 0.6)  # side of an object's square, as a share of the image's
FOREGROUND = 24  # lowest gray value of an object's pixels, of 255
NUM_PICTURED, PICTURED_SIDE, PICTURE_GAP = 8, 168, 6  # images of a picture, and pixels
GREEN = 1  # channel in which stained cells are darker than the background
Objects = tuple[np.ndarray, np.ndarray]  # gray pixels (n, side, side), uint8, and labels from 1


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    parser = ArgumentParser(
        program.usage_name("python -m ssl_pretrain.eval.dense.composed_masks"), description=HELP
    )
    parser.add_argument("out", metavar="OUT", help="folder to write, which must not exist")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--photos", metavar="ROOT", help="folder or zip of photographs")
    source.add_argument("--bccd", metavar="ROOT", help="folder or zip of BCCD in VOC's layout")
    parser.add_argument(
        "--objects",
        choices=["fashion-mnist", "digits"],
        default="fashion-mnist",
        help="what is pasted into the photographs (default: fashion-mnist)",
    )
    parser.add_argument(
        "--fashion-mnist",
        type=Path,
        default=FASHION_MNIST,
        metavar="FOLDER",
        help="folder of Fashion-MNIST's four files (default: that of Debian's package)",
    )
    parser.add_argument(
        "--count",
        nargs=2,
        type=POSITIVE_INT,
        default=[600, 150],
        metavar=("TRAIN", "TEST"),
        help="number of composed images (default: 600 150)",
    )
    parser.add_argument(
        "--size", type=POSITIVE_INT, default=96, help="side of the images in pixels (default: 96)"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="also show the first test images here"
    )
    parser.add_argument("--seed", type=NON_NEGATIVE_INT, default=0, help="seed (default: 0)")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if out.exists():
        raise ValueError(f"{out}: exists already; give a new folder")
    if options.bccd:
        counts = write_cells(out, options.bccd)
    else:
        train, test = options.count
        names = CLOTHES if options.objects == "fashion-mnist" else list("0123456789")
        objects = {
            split: load_objects(options.objects, split, options.fashion_mnist)
            for split in ("train", "val")
        }
        counts = write_composed(
            out,
            FileTree(options.photos),
            objects,
            names,
            {"train": train, "val": test},
            options.size,
            options.seed,
        )
    if options.picture:
        draw_picture(out, options.picture)
    print(f"{out}: wrote {counts['train']} training and {counts['val']} test images with masks")


def load_objects(name: str, split: str, folder: Path) -> Objects:
    """Return the objects of a split. Their labels start at 1, because 0 is the background.

    Raises:
        ValueError: If Fashion-MNIST's files are missing.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = rng.permutation(0, 0, len(digits.target), rng.Purpose.SPLIT)
        num_test = round(TEST_SHARE * len(order))
        rows = np.sort(order[:num_test] if split == "val" else order[num_test:])
        gray = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
        return gray, digits.target[rows].astype(np.uint8) + 1
    prefix = "t10k" if split == "val" else "train"
    paths = [folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(
            f"--fashion-mnist {folder}: {missing[0]} is missing; install Debian's "
            "dataset-fashion-mnist, give the folder of its four files, or give --objects digits"
        )
    pixels, labels = (read_idx(path).load() for path in paths)
    return pixels, labels + 1


def write_composed(
    out: Path,
    photos: FileTree,
    objects: dict[str, Objects],
    names: list[str],
    counts: dict[str, int],
    size: int,
    seed: int,
) -> dict[str, int]:
    """Write images with pasted objects, and return the number per split."""
    paths = list(photos.images_below("").values())
    order = rng.permutation(seed, 0, len(paths), rng.Purpose.SPLIT)
    num_test = max(1, round(TEST_SHARE * len(paths)))
    if num_test >= len(paths):
        raise ValueError(f"{photos.root}: has {len(paths)} photographs; give at least two")
    photo_rows = {"train": order[num_test:], "val": order[:num_test]}
    for epoch, split in enumerate(counts):
        for index in range(counts[split]):
            row = photo_rows[split][index % len(photo_rows[split])]
            content = photos.read(paths[row])
            numbers = _Numbers(seed, epoch, index)
            background = random_square(decode(content, paths[row]), size, numbers)
            pixels, mask = compose(background, objects[split], numbers)
            save(out, split, f"{index:05d}", pixels, mask)
    (out / "classes.txt").write_text("\n".join(["background", *names]) + "\n")
    return counts


class _Numbers:
    """Uniform numbers of one image, taken one after another."""

    def __init__(self, seed: int, epoch: int, index: int):
        numbers = rng.uniform(seed, epoch, index, 0, rng.Purpose.CROP, 64)[0]
        self._numbers: Iterator[float] = iter(numbers.tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def below(self, count: int) -> int:
        return int(next(self._numbers) * count)


def random_square(photo: np.ndarray, size: int, numbers: _Numbers) -> np.ndarray:
    """Return a random square of a photograph with at least half its short side, resized."""
    height, width = photo.shape[:2]
    side = round(min(height, width) * numbers.between(0.5, 1))
    top, left = numbers.below(height - side + 1), numbers.below(width - side + 1)
    square = Image.fromarray(photo[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).copy()


def compose(
    background: np.ndarray, objects: Objects, numbers: _Numbers
) -> tuple[np.ndarray, np.ndarray]:
    """Paste random objects in random colors, and return the image and its mask."""
    gray, labels = objects
    pixels, size = background.astype(np.float64), len(background)
    mask = np.zeros((size, size), dtype=np.uint8)
    for _ in range(NUM_OBJECTS[0] + numbers.below(NUM_OBJECTS[1] - NUM_OBJECTS[0] + 1)):
        row = numbers.below(len(labels))
        side = round(size * numbers.between(*OBJECT_SIDES))
        top, left = (numbers.below(size - side + 1) for _ in range(2))
        patch = Image.fromarray(gray[row]).resize((side, side), Image.Resampling.BILINEAR)
        values = np.asarray(patch).astype(np.float64)
        is_object = values >= FOREGROUND
        color = np.array([numbers.between(0.4, 1) for _ in range(3)])
        area = np.s_[top : top + side, left : left + side]
        pixels[area][is_object] = values[is_object][:, None] * color
        mask[area][is_object] = labels[row]
    return np.rint(pixels).astype(np.uint8), mask


def write_cells(out: Path, root: str) -> dict[str, int]:
    """Write the images of BCCD with threshold masks, and return the number per split."""
    counts = {}
    classes: list[str] = []
    for split, name in (("train", "trainval"), ("val", "test")):
        images = load_voc(root, name, classes)
        classes = images.classes
        for index in range(len(images)):
            pixels = images.read(index)
            objects = images.objects[index]
            mask = cell_mask(pixels, objects.boxes, objects.labels)
            save(out, split, Path(images.files[index][1]).stem, pixels, mask)
        counts[split] = len(images)
    (out / "classes.txt").write_text("\n".join(["background", *classes]) + "\n")
    return counts


def cell_mask(pixels: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the label of each pixel that is darker than the threshold, from the box around it.

    Args:
        pixels: uint8 (height, width, 3).
        boxes: Left, top, right and bottom edges, (n, 4).
        labels: Class of each box, from 1.
    """
    darkness = 255 - pixels[..., GREEN]
    is_cell = darkness > otsu_threshold(darkness)
    inside = np.zeros(darkness.shape, dtype=np.uint8)
    for (left, top, right, bottom), label in zip(boxes.astype(int).tolist(), labels.tolist()):
        area = inside[top:bottom, left:right]
        area[:] = np.where((area == 0) | (area == label), label, VOID)
    return np.where(is_cell, np.where(inside == 0, VOID, inside), 0).astype(np.uint8)


def otsu_threshold(values: np.ndarray) -> int:
    """Return the level up to which pixels are background, by Otsu's method.

    It maximizes the variance between the two groups of pixels.
    """
    histogram = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below, sums = np.cumsum(histogram), np.cumsum(histogram * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nanargmax(np.nan_to_num(variance)))


def save(out: Path, split: str, name: str, pixels: np.ndarray, mask: np.ndarray) -> None:
    """Write an image and its mask as PNG. The mask has a palette, so that viewers show colors."""
    for kind, image in (("images", Image.fromarray(pixels)), ("masks", _with_palette(mask))):
        folder = out / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        image.save(content, format="PNG")
        (folder / f"{name}.png").write_bytes(content.getvalue())


def draw_picture(root: Path, path: Path) -> None:
    """Draw the first test images above their masks."""
    files = sorted((root / "images/val").iterdir())[:NUM_PICTURED]
    side = PICTURED_SIDE + PICTURE_GAP
    picture = Image.new("RGB", (side * len(files) - PICTURE_GAP, 2 * side - PICTURE_GAP), "white")
    for column, file in enumerate(files):
        for row, kind in enumerate(("images", "masks")):
            with Image.open(root / kind / "val" / file.name) as image:
                filter_ = Image.Resampling.NEAREST if kind == "masks" else Image.Resampling.BICUBIC
                shown = image.convert("RGB").resize((PICTURED_SIDE, PICTURED_SIDE), filter_)
            picture.paste(shown, (column * side, row * side))
    picture.save(path)


def _with_palette(mask: np.ndarray) -> Image.Image:
    """Return a mask with the colors of Pascal VOC, in which the bits of a label are spread."""
    labels = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (((labels >> channel) & 1) << (7 - bit)).astype(np.uint8)
        labels >>= 3
    image = Image.fromarray(mask, mode="P")
    image.putpalette(colors.tobytes())
    return image


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.dense.composed_masks")
