"""COCO's annotations: a JSON file beside a folder of images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_pretrain.eval.detection.annotations import AnnotatedImages, Objects, objects_with_area


def load(
    annotations: str | Path, folder: str | Path, classes: Sequence[str] = ()
) -> AnnotatedImages:
    """Load COCO's JSON. Labels number the categories from 1 in the order of their ids.

    Args:
        annotations: The JSON file.
        folder: Folder of its images.
        classes: Names that the categories must have, in order. Default: any names.

    Raises:
        ValueError: The file is not COCO's JSON, has no image or no box, or has other categories
            than `classes`.
    """
    path = Path(annotations)
    try:
        content = json.loads(path.read_text())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        images, boxes = content["images"], content["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is not COCO's JSON with images, annotations and categories "
            f"({type(error).__name__}: {error})"
        ) from None
    names = [category["name"] for category in categories]
    if classes and names != list(classes):
        raise ValueError(
            f"{path}: its categories are {', '.join(names)}, and those trained on are "
            f"{', '.join(classes)}; give files of one data set"
        )
    if not images or not boxes:
        raise ValueError(
            f"{path}: has {len(images)} images and {len(boxes)} boxes; both are needed"
        )
    labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for box in boxes:
        by_image[box["image_id"]].append(box)
    objects = [_objects(by_image[image["id"]], labels) for image in images]
    files = [(Path(folder), image["file_name"]) for image in images]
    return AnnotatedImages(path.name, files, objects, names)


def _objects(boxes: list[dict[str, Any]], labels: dict[int, int]) -> Objects:
    """Return the objects of one image from its entries in COCO's JSON."""
    sizes = [box["bbox"] for box in boxes]
    edges = [[left, top, left + width, top + height] for left, top, width, height in sizes]
    segments = [box.get("segmentation") for box in boxes]
    return objects_with_area(
        edges,
        [labels[box["category_id"]] for box in boxes],
        [bool(box.get("iscrowd", 0)) for box in boxes],
        segments if all(segments) else [],
    )
