"""Read annotated images in the format of Pascal VOC (XML) or COCO (JSON)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ssl_pretrain.eval.detection.annotations import AnnotatedImages, Objects, build_objects
from ssl_pretrain.eval.file_tree import FileTree


def load_coco(
    annotation_file: str | Path, folder: str | Path, classes: Sequence[str] = ()
) -> AnnotatedImages:
    """Load images with annotations in COCO's JSON format.

    Categories are labeled from 1 in the order of their ids.

    Args:
        annotation_file: The JSON file.
        folder: Folder of the images.
        classes: Required names of the categories, in order. If empty, any names are accepted.

    Raises:
        ValueError: If the file is not in COCO's format, lacks images or boxes, or its categories
            differ from `classes`.
    """
    path = Path(annotation_file)
    try:
        content = json.loads(path.read_text())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        images, annotations = content["images"], content["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: cannot be read as COCO's JSON ({type(error).__name__}: {error}); give a file "
            "with images, annotations and categories"
        ) from None
    names = [category["name"] for category in categories]
    if classes and names != list(classes):
        raise ValueError(
            f"{path}: the categories are {', '.join(names)}, but those of --classes or of the "
            f"training images are {', '.join(classes)}; give files of the same data set"
        )
    if not images or not annotations:
        raise ValueError(
            f"{path}: has {len(images)} images and {len(annotations)} boxes; give a file with both"
        )
    labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
    annotations_by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for annotation in annotations:
        annotations_by_image[annotation["image_id"]].append(annotation)
    return AnnotatedImages(
        path.name,
        [(Path(folder), image["file_name"]) for image in images],
        [_parse_coco_objects(annotations_by_image[image["id"]], labels) for image in images],
        names,
    )


def _parse_coco_objects(annotations: list[dict[str, Any]], labels: dict[int, int]) -> Objects:
    """Return the objects of one image. `labels` maps category ids to labels."""
    boxes = [annotation["bbox"] for annotation in annotations]
    segments = [annotation.get("segmentation") for annotation in annotations]
    return build_objects(
        [[left, top, left + width, top + height] for left, top, width, height in boxes],
        [labels[annotation["category_id"]] for annotation in annotations],
        [bool(annotation.get("iscrowd", 0)) for annotation in annotations],
        segments if all(segments) else [],
    )


def load_voc(root: str | Path, split: str, classes: Sequence[str] = ()) -> AnnotatedImages:
    """Load images in Pascal VOC's layout, which has Annotations/, JPEGImages/ and ImageSets/Main/.

    VOC numbers pixels from 1, and its boxes include their last row and column. The boxes are
    converted to coordinates of their edges, which start at 0. Boxes without area are omitted.

    Args:
        root: A folder or a zip file.
        split: Name of a list in ImageSets/Main, such as train, val, trainval or test.
        classes: Class names in the order of their labels. Default: the split's classes, sorted.

    Raises:
        ValueError: If the layout or the split does not exist, the split is empty, an annotation is
            missing, or a box has a class that is not in `classes`.
    """
    tree = _VocTree(Path(root))
    images = tree.image_names(split)
    annotations = [parse_voc_xml(tree.read(f"Annotations/{image}.xml"), image) for image in images]
    split_classes = sorted({name for _, names, _ in annotations for name in names})
    if not classes and not split_classes:
        raise ValueError(
            f"{root}: none of the {len(images)} images of {split!r} has a box in its annotation; "
            "check the split"
        )
    classes = list(classes) or split_classes
    unknown_classes = [name for name in split_classes if name not in classes]
    if unknown_classes:
        raise ValueError(
            f"{root}: {split!r} has boxes of {', '.join(unknown_classes)}, which are not among the "
            f"classes {', '.join(classes)}; add them to --classes"
        )
    labels = {name: label for label, name in enumerate(classes, start=1)}
    objects = [
        build_objects(boxes, [labels[name] for name in names], difficult)
        for boxes, names, difficult in annotations
    ]
    files = [(Path(root), tree.image_path(image)) for image in images]
    return AnnotatedImages(f"{Path(root).name}, {split}", files, objects, classes)


def parse_voc_xml(xml: bytes, name: str) -> tuple[list[list[float]], list[str], list[bool]]:
    """Return the boxes of one image, their class names, and whether each one is difficult.

    Raises:
        ValueError: If the content is not in VOC's XML format.
    """
    sides = ("xmin", "ymin", "xmax", "ymax")
    try:
        elements = ElementTree.fromstring(xml).findall("object")
        corners = [
            [float(element.findtext(f"bndbox/{side}", "")) for side in sides]
            for element in elements
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"Annotations/{name}.xml cannot be read as VOC's XML: {error}; replace the file"
        ) from None
    return (
        [[left - 1, top - 1, right, bottom] for left, top, right, bottom in corners],
        [element.findtext("name", "") for element in elements],
        [element.findtext("difficult", "0") == "1" for element in elements],
    )


class _VocTree:
    """A folder or zip in VOC's layout. The layout may start in a subfolder."""

    def __init__(self, root: Path):
        self._root, self._tree = root, FileTree(root)
        paths = self._tree.paths
        split_files = [path for path in paths if "ImageSets/Main/" in path]
        if not split_files:
            raise ValueError(
                f"{root}: has no ImageSets/Main; give a folder or zip in Pascal VOC's layout, with "
                "Annotations/, ImageSets/Main/ and JPEGImages/"
            )
        self._prefix = split_files[0].partition("ImageSets/Main/")[0]
        self._splits = {Path(path).stem for path in split_files}
        images = [path for path in paths if path.startswith(f"{self._prefix}JPEGImages/")]
        self._images = {Path(path).stem: path for path in images}

    def image_names(self, split: str) -> list[str]:
        """Return the names of a split's images, without suffixes."""
        if split not in self._splits:
            raise ValueError(
                f"{self._root}: ImageSets/Main has no split {split!r}; "
                f"choose one of: {', '.join(sorted(self._splits))}"
            )
        lines = self.read(f"ImageSets/Main/{split}.txt").decode().splitlines()
        names = [line.split()[0] for line in lines if line.strip()]
        if not names:
            raise ValueError(
                f"{self._root}: ImageSets/Main/{split}.txt lists no images; give another split"
            )
        return names

    def read(self, name: str) -> bytes:
        """Return the content of a file, given its path in VOC's layout."""
        path = f"{self._prefix}{name}"
        try:
            return self._tree.read(path)
        except (KeyError, FileNotFoundError):
            raise ValueError(
                f"{self._root}: {path} is missing; add it, or remove its image from the lists in "
                "ImageSets/Main"
            ) from None

    def image_path(self, name: str) -> str:
        """Return the path of an image relative to the root."""
        if name not in self._images:
            raise ValueError(
                f"{self._root}: {self._prefix}JPEGImages has no image {name}; add it, or remove it "
                "from the lists in ImageSets/Main"
            )
        return self._images[name]
