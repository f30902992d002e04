"""Find images and masks in the layouts of Pascal VOC and ADE20K, or in two plain folders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.eval.dense.masked_images import (
    MAX_CLASSES,
    VOID,
    LabelRule,
    MaskedImages,
)
from ssl_pretrain.eval.file_tree import FileTree

VOC_CLASSES = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus"),
    *("car", "cat", "chair", "cow", "diningtable", "dog", "horse"),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
NUM_ADE20K_CLASSES = 150
HELD_OUT_SHARE = 0.2  # share for testing in folders without train and val
SPLIT_NAMES = ("train", "val")
_VOC_LISTS, _ADE20K_NAMES = "ImageSets/Segmentation/", "objectInfo150.txt"


def read_classes(names: Sequence[str]) -> tuple[str, ...]:
    """Return the class names: those given, or the lines of the file if a single file is given.

    Raises:
        ValueError: If the file cannot be read as text, or has no names.
    """
    if len(names) != 1:
        return tuple(names)
    path = Path(names[0])
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--classes {path}: cannot be read as a list of classes ({type(error).__name__}); give "
            "a text file with one name per line, or two or more names"
        ) from None
    if not any(map(str.strip, lines)):
        raise ValueError(f"--classes {path}: has no names; write one per line")
    return tuple(line.strip() for line in lines if line.strip())


def open_voc(
    root: str | Path,
    split: str,
    classes: Sequence[str] = (),
    mask_folder: str = "SegmentationClass",
) -> MaskedImages:
    """Open a split in Pascal VOC's layout, such as VOCdevkit/VOC2012. The value 255 is void.

    Args:
        root: A folder or zip that has ImageSets/Segmentation, JPEGImages and the masks.
        split: Name of a list in ImageSets/Segmentation, such as train or val.
        classes: Class names. Default: VOC's 20 classes after the background.
        mask_folder: Folder of the masks, such as SegmentationClassAug for the extra masks of SBD.

    Raises:
        ValueError: If the layout, the split, an image or a mask is missing.
    """
    tree = FileTree(root)
    prefixes = {path.partition(_VOC_LISTS)[0] for path in tree.paths if _VOC_LISTS in path}
    if len(prefixes) != 1:
        contents = "has no" if not prefixes else f"has {', '.join(sorted(prefixes))} with their"
        raise ValueError(
            f"{root}: {contents} ImageSets/Segmentation; give one folder or zip in Pascal VOC's "
            "layout, with ImageSets/Segmentation, JPEGImages and SegmentationClass"
        )
    (prefix,) = prefixes
    lists = {
        PurePosixPath(path).stem: path
        for path in tree.paths
        if path.startswith(prefix + _VOC_LISTS) and path.endswith(".txt")
    }
    if split not in lists:
        raise ValueError(
            f"{root}: {_VOC_LISTS} has no split {split!r}; choose one of: "
            f"{', '.join(sorted(lists))}"
        )
    lines = tree.read_text(lists[split]).splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    images = tree.images_below(f"{prefix}JPEGImages/")
    if absent := [name for name in names if name not in images]:
        raise ValueError(
            f"{root}: {prefix}JPEGImages has no image {absent[0]}, which {split}.txt lists; add it "
            "or remove its line"
        )
    return _pair(
        f"{tree.root.name}, {split}",
        (tree, {name: images[name] for name in names}),
        (tree, tree.images_below(f"{prefix}{mask_folder}/"), f"{prefix}{mask_folder}"),
        LabelRule(tuple(classes or VOC_CLASSES)),
    )


def open_ade20k(root: str | Path, split: str, classes: Sequence[str] = ()) -> MaskedImages:
    """Open a split in ADE20K's layout, ADEChallengeData2016. The value 0 is void.

    Args:
        root: A folder or zip that has images/SPLIT and annotations/SPLIT.
        split: "training" or "validation".
        classes: Class names, of which the first has the value 1. Default: the names in
            objectInfo150.txt, or the numbers 1 to 150 without that file.

    Raises:
        ValueError: If the layout, the split, or a mask is missing.
    """
    tree = FileTree(root)
    folder = f"annotations/{split}/"
    prefixes = {path.partition(folder)[0] for path in tree.paths if folder in path}
    if len(prefixes) != 1:
        contents = "has no" if not prefixes else f"has {', '.join(sorted(prefixes))} with their"
        raise ValueError(
            f"{root}: {contents} annotations/{split}; give one folder or zip in ADE20K's layout, "
            "ADEChallengeData2016 with images/ and annotations/, each with training/ and "
            "validation/"
        )
    (prefix,) = prefixes
    if not classes and prefix + _ADE20K_NAMES in tree.paths:
        lines = tree.read_text(prefix + _ADE20K_NAMES).splitlines()
        classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:] if line.strip()]
        classes = _distinct(classes)
    return _pair(
        f"{tree.root.name}, {split}",
        (tree, tree.images_below(f"{prefix}images/{split}/")),
        (tree, tree.images_below(prefix + folder), (prefix + folder).rstrip("/")),
        LabelRule(
            tuple(classes or map(str, range(1, NUM_ADE20K_CLASSES + 1))), first=1, void=(0, VOID)
        ),
    )


def open_folders(
    images: str | Path,
    masks: str | Path,
    classes: Sequence[str] = (),
    void: Sequence[int] = (VOID,),
    first_label: int = 0,
) -> tuple[MaskedImages, MaskedImages]:
    """Open the training and test images of a folder of images and a folder of masks.

    A mask has the path of its image, apart from the suffix. If the folders have train/ and val/,
    these are the splits. Otherwise a fixed random fifth of the images is for testing.

    Args:
        images: Folder or zip of the images.
        masks: Folder or zip of the masks.
        classes: Class names. Default: the numbers up to the highest one in the training masks.
        void: Pixel values that belong to no class.
        first_label: Pixel value of the first class.

    Raises:
        ValueError: If there is no image or no mask, or an image has no mask.
    """
    image_tree, mask_tree = FileTree(images), FileTree(masks)
    name, rule = image_tree.root.name, LabelRule(("", "unknown"), first_label, tuple(void))
    image_files, mask_files = image_tree.images_below(""), mask_tree.images_below("")
    top_folders = {path.split("/")[0] for path in image_files if "/" in path}
    splits = {}
    for split in SPLIT_NAMES if top_folders >= set(SPLIT_NAMES) else ("",):
        prefix = f"{split}/" if split else ""
        chosen = {path: file for path, file in image_files.items() if path.startswith(prefix)}
        splits[split] = _pair(
            f"{name}, {split}" if split else name,
            (image_tree, chosen),
            (mask_tree, mask_files, str(masks)),
            rule,
        )
    if "" in splits:
        order = rng.permutation(0, 0, len(splits[""]), rng.Purpose.SPLIT)
        num_test = max(1, round(HELD_OUT_SHARE * len(order)))
        if num_test == len(order):
            raise ValueError(f"{images}: has one image; give at least two, one of them to test on")
        rows = {"train": np.sort(order[num_test:]), "val": np.sort(order[:num_test])}
        splits = {split: splits[""].subset(rows[split].tolist()) for split in rows}
    train, test = splits["train"], splits["val"]
    names = tuple(classes) or _numbered_classes(train)
    rule = LabelRule(names, first_label, tuple(void))
    return replace(train, rule=rule), replace(test, rule=rule)


def _numbered_classes(images: MaskedImages) -> tuple[str, ...]:
    """Return the numbers of the classes up to the highest one in the masks."""
    first, void = images.rule.first, images.rule.void
    highest = first
    for index in range(len(images)):
        values = images.mask_values(index)
        highest = max(highest, int(values[~np.isin(values, void)].max(initial=first)))
    if not first < highest < first + MAX_CLASSES:
        content = f"only the class {first}" if highest == first else f"values up to {highest}"
        raise ValueError(
            f"{images.masks.root}: beside the void values {', '.join(map(str, void)) or '(none)'} "
            f"the masks have {content}; store classes as consecutive numbers, such as 0 and 1, or "
            "give --void other values"
        )
    return tuple(map(str, range(first, highest + 1)))


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with a number after a name that an earlier class has."""
    return [
        f"{name} {names[:row].count(name) + 1}" if name in names[:row] else name
        for row, name in enumerate(names)
    ]


def _pair(
    name: str,
    images: tuple[FileTree, dict[str, str]],
    masks: tuple[FileTree, dict[str, str], str],
    rule: LabelRule,
) -> MaskedImages:
    """Pair images and masks by their paths without suffixes."""
    (image_tree, image_files), (mask_tree, mask_files, mask_folder) = images, masks
    if not image_files:
        raise ValueError(f"{name}: has no image; give images with masks")
    if not mask_files:
        raise ValueError(
            f"{mask_folder}: has no masks; segmentation needs one mask per image, and boxes are "
            "not masks"
        )
    if without := [path for key, path in image_files.items() if key not in mask_files]:
        raise ValueError(
            f"{mask_folder}: has no mask for {len(without)} of the {len(image_files)} images, such "
            f"as {without[0]}; add the masks or remove the images"
        )
    pairs = tuple((path, mask_files[key]) for key, path in image_files.items())
    return MaskedImages(name, image_tree, mask_tree, pairs, rule)
