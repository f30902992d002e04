"""Pascal VOC's annotations: XML files in a folder or a zip."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from ssl_pretrain.eval.detection.annotations import AnnotatedImages, objects_with_area


def load(root: str | Path, split: str, classes: Sequence[str] = ()) -> AnnotatedImages:
    """Load images in Pascal VOC's layout: Annotations/, JPEGImages/ and ImageSets/Main/.

    VOC's boxes count pixels from 1 and include both ends. Ours are edges from 0. Boxes without area
    are left out.

    Args:
        root: A folder or a zip file.
        split: train, val, trainval, test, or another list of ImageSets/Main.
        classes: Names in the order of their labels. Default: the names in the split, sorted.

    Raises:
        ValueError: The layout or the split does not exist, the split is empty, an annotation is
            missing, or a name is not in `classes`.
    """
    tree = _Tree(Path(root))
    names = tree.image_names(split)
    parsed = [parse_objects(tree.read(f"Annotations/{name}.xml"), name) for name in names]
    annotated = sorted({kind for _, kinds, _ in parsed for kind in kinds})
    if not classes and not annotated:
        raise ValueError(
            f"{root}: none of the {len(names)} images of {split!r} has a box in its annotation; "
            "is it the right split?"
        )
    classes = list(classes) or annotated
    unknown = [kind for kind in annotated if kind not in classes]
    if unknown:
        raise ValueError(
            f"{root}: {split!r} has boxes of {', '.join(unknown)}, not among the classes "
            f"{', '.join(classes)}; name them in --classes"
        )
    labels = {name: label for label, name in enumerate(classes, start=1)}
    objects = [
        objects_with_area(boxes, [labels[kind] for kind in kinds], difficult)
        for boxes, kinds, difficult in parsed
    ]
    files = [(Path(root), tree.image_path(name)) for name in names]
    return AnnotatedImages(f"{Path(root).name}, {split}", files, objects, classes)


def parse_objects(xml: bytes, name: str) -> tuple[list[list[float]], list[str], list[bool]]:
    """Read the boxes of one image, their classes, and whether they are marked as difficult.

    Raises:
        ValueError: The content is not VOC's XML.
    """
    sides = ("xmin", "ymin", "xmax", "ymax")
    try:
        elements = ElementTree.fromstring(xml).findall("object")
        corners = [
            [float(element.findtext(f"bndbox/{side}", "")) for side in sides]
            for element in elements
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"Annotations/{name}.xml is not VOC's XML: {error}") from None
    boxes = [[left - 1, top - 1, right, bottom] for left, top, right, bottom in corners]
    kinds = [element.findtext("name", "") for element in elements]
    return boxes, kinds, [element.findtext("difficult", "0") == "1" for element in elements]


class _Tree:
    """A folder or a zip in VOC's layout, which may be wrapped in one more folder."""

    def __init__(self, root: Path):
        self._root, self._zip = root, None
        if root.is_dir():
            paths = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        elif zipfile.is_zipfile(root):
            self._zip = zipfile.ZipFile(root)
            paths = [path for path in self._zip.namelist() if not path.endswith("/")]
        else:
            raise ValueError(f"{root}: neither a folder nor a zip; give one in Pascal VOC's layout")
        lists = [path for path in paths if "ImageSets/Main/" in path]
        if not lists:
            raise ValueError(
                f"{root}: has no ImageSets/Main; Pascal VOC's layout is Annotations/, "
                "ImageSets/Main/ and JPEGImages/"
            )
        self._prefix = lists[0].partition("ImageSets/Main/")[0]
        self._splits = {Path(path).stem for path in lists}
        images = [path for path in paths if path.startswith(f"{self._prefix}JPEGImages/")]
        self._images = {Path(path).stem: path for path in images}

    def image_names(self, split: str) -> list[str]:
        """Return the names of a split's images, without their suffix."""
        if split not in self._splits:
            raise ValueError(
                f"{self._root}: ImageSets/Main has no {split!r}; "
                f"there are: {', '.join(sorted(self._splits))}"
            )
        lines = self.read(f"ImageSets/Main/{split}.txt").decode().splitlines()
        names = [line.split()[0] for line in lines if line.strip()]
        if not names:
            raise ValueError(
                f"{self._root}: ImageSets/Main/{split}.txt lists no image; "
                "give a split that has some"
            )
        return names

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        path = f"{self._prefix}{name}"
        try:
            return self._zip.read(path) if self._zip else (self._root / path).read_bytes()
        except (KeyError, FileNotFoundError):
            raise ValueError(
                f"{self._root}: {path} is missing, and a split lists its image"
            ) from None

    def image_path(self, name: str) -> str:
        """Return the path of an image below the root."""
        if name not in self._images:
            raise ValueError(
                f"{self._root}: {self._prefix}JPEGImages has no image {name}, and a split lists it"
            )
        return self._images[name]
