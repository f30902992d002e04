"""Images with boxes: Pascal VOC's XML in a folder or a zip, and COCO's JSON."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ssl_pretrain.data.images import decode


@dataclass
class Objects:
    """What is to be found in one image."""

    boxes: np.ndarray  # float32 (n, 4): left, top, right, bottom edge in pixels; a pixel's left edge is its number from 0
    labels: np.ndarray  # int64 (n,): 1 is the first class, 0 the background
    ignored: np.ndarray  # bool (n,): VOC's difficult, COCO's crowd; not trained on, and finding it neither helps nor hurts
    segments: list[Any] = field(
        default_factory=list
    )  # COCO's polygons or run lengths, one an object; empty: boxes alone

    def __len__(self) -> int:
        return len(self.labels)


class Images:
    """Images by number, 0 to len - 1, and their objects. Small to pickle: every loader worker gets a copy."""

    def __init__(
        self,
        where: str,
        root: Path,
        names: list[str],
        objects: list[Objects],
        classes: list[str],
        ids: Sequence[int] = (),
    ):
        self.where, self.root, self.names, self.objects, self.classes = (
            where,
            root,
            names,
            objects,
            classes,
        )
        self.ids = list(ids) or list(range(len(names)))  # COCO's numbers of the images
        self._zip: zipfile.ZipFile | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None}  # an open file belongs to its process

    def read(self, number: int) -> np.ndarray:
        """RGB pixels, uint8 (height, width, 3). Raises UnreadableImage, which names the file."""
        name = self.names[number]
        if self.root.is_dir():
            return decode((self.root / name).read_bytes(), name)
        self._zip = self._zip or zipfile.ZipFile(self.root)
        return decode(self._zip.read(name), name)

    def take(self, numbers: Sequence[int]) -> Images:
        """These images alone, in this order."""
        return Images(
            self.where, self.root, [self.names[i] for i in numbers], [self.objects[i] for i in numbers], self.classes,
            [self.ids[i] for i in numbers],
        )  # fmt: skip

    def for_training(self) -> Images:
        """Those with an object to learn from. Raises ValueError where there is none."""
        kept = [number for number, each in enumerate(self.objects) if (~each.ignored).any()]
        if not kept:
            raise ValueError(
                f"{self.where}: none of its {len(self)} images has a box to learn from; are the annotations those of these images?"
            )
        return self.take(kept)


def voc(root: str | Path, split: str, classes: Sequence[str] = ()) -> Images:
    """Pascal VOC's layout, a folder or a zip: Annotations/*.xml, JPEGImages/, ImageSets/Main/<split>.txt.

    Its boxes count pixels from 1, both ends included; ours are edges from 0. A box without area is left out.

    Args:
        split: train, val, trainval, test, or another list of ImageSets/Main.
        classes: their order gives the labels; default: the names found, sorted.

    Raises:
        ValueError: no such layout or split, an empty split, an annotation that is missing, or a name that is not in `classes`.
    """
    files = _Tree(Path(root))
    names = files.split(split)
    parsed = [_objects_of(files.read(f"Annotations/{name}.xml"), name) for name in names]
    found = sorted({kind for _, kinds, _ in parsed for kind in kinds})
    if not classes and not found:
        raise ValueError(
            f"{root}: none of the {len(names)} images of {split!r} has a box in its annotation; is it the right split?"
        )
    chosen = list(classes) or found
    unknown = [kind for kind in found if kind not in chosen]
    if unknown:
        raise ValueError(
            f"{root}: {split!r} has boxes of {', '.join(unknown)}, not among the classes {', '.join(chosen)}; name them in --classes"
        )
    number = {name: label for label, name in enumerate(chosen, start=1)}
    objects = [
        _kept(boxes, [number[kind] for kind in kinds], difficult)
        for boxes, kinds, difficult in parsed
    ]
    return Images(
        f"{Path(root).name}, {split}",
        Path(root),
        [files.image(name) for name in names],
        objects,
        chosen,
    )


def _objects_of(content: bytes, name: str) -> tuple[list[list[float]], list[str], list[bool]]:
    try:
        found = ElementTree.fromstring(content).findall("object")
        boxes = [
            [
                float(each.findtext(f"bndbox/{side}", ""))
                for side in ("xmin", "ymin", "xmax", "ymax")
            ]
            for each in found
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"Annotations/{name}.xml is not VOC's XML: {error}") from None
    kinds = [each.findtext("name", "") for each in found]
    return (
        [[x - 1, y - 1, right, bottom] for x, y, right, bottom in boxes],
        kinds,
        [each.findtext("difficult", "0") == "1" for each in found],
    )


def _kept(
    boxes: list[list[float]], labels: list[int], ignored: list[bool], segments: Sequence[Any] = ()
) -> Objects:
    """The objects whose box has an area."""
    edges = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    right = (edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])
    return Objects(
        edges[right], np.array(labels, dtype=np.int64)[right], np.array(ignored, dtype=bool)[right],
        [segment for segment, kept in zip(segments, right) if kept],
    )  # fmt: skip


class _Tree:
    """A folder or a zip in VOC's layout, whether or not one folder wraps all of it."""

    def __init__(self, root: Path):
        self.root = root
        if root.is_dir():
            self.names = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
            self._zip = None
        elif zipfile.is_zipfile(root):
            self._zip = zipfile.ZipFile(root)
            self.names = [name for name in self._zip.namelist() if not name.endswith("/")]
        else:
            raise ValueError(f"{root}: neither a folder nor a zip; give one in Pascal VOC's layout")
        lists = [name for name in self.names if "ImageSets/Main/" in name]
        if not lists:
            raise ValueError(
                f"{root}: has no ImageSets/Main; Pascal VOC's layout is Annotations/, ImageSets/Main/ and JPEGImages/"
            )
        self.prefix = lists[0].partition("ImageSets/Main/")[0]
        self.splits = {Path(name).stem: name for name in lists}
        self.images = {
            Path(name).stem: name
            for name in self.names
            if name.startswith(f"{self.prefix}JPEGImages/")
        }

    def split(self, split: str) -> list[str]:
        if split not in self.splits:
            raise ValueError(
                f"{self.root}: ImageSets/Main has no {split!r}; there are: {', '.join(sorted(self.splits))}"
            )
        names = [
            line.split()[0]
            for line in self.read(f"ImageSets/Main/{split}.txt").decode().splitlines()
            if line.strip()
        ]
        if not names:
            raise ValueError(
                f"{self.root}: ImageSets/Main/{split}.txt lists no image; give a split that has some"
            )
        return names

    def read(self, name: str) -> bytes:
        name = f"{self.prefix}{name}"
        try:
            return self._zip.read(name) if self._zip else (self.root / name).read_bytes()
        except (KeyError, FileNotFoundError):
            raise ValueError(
                f"{self.root}: {name} is missing, and a split lists its image"
            ) from None

    def image(self, name: str) -> str:
        if name not in self.images:
            raise ValueError(
                f"{self.root}: {self.prefix}JPEGImages has no image {name}, and a split lists it"
            )
        return self.images[name]


def coco(annotations: str | Path, folder: str | Path, classes: Sequence[str] = ()) -> Images:
    """COCO's JSON and the folder of its images. Labels count the categories in the order of their ids.

    Args:
        classes: what the categories have to be called, in order; default: whatever they are.

    Raises:
        ValueError: not COCO's JSON, no image, no box, or other categories than `classes`.
    """
    path = Path(annotations)
    try:
        written = json.loads(path.read_text())
        categories = sorted(written["categories"], key=lambda category: category["id"])
        entries, boxes = written["images"], written["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is not COCO's JSON with images, annotations and categories ({type(error).__name__}: {error})"
        ) from None
    names = [category["name"] for category in categories]
    if classes and names != list(classes):
        raise ValueError(
            f"{path}: its categories are {', '.join(names)}, and those trained on {', '.join(classes)}; give files of one data set"
        )
    if not entries or not boxes:
        raise ValueError(
            f"{path}: has {len(entries)} images and {len(boxes)} boxes; both are needed"
        )
    number = {category["id"]: label for label, category in enumerate(categories, start=1)}
    of_image: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in entries}
    for each in boxes:
        of_image[each["image_id"]].append(each)
    objects = [_coco_objects(of_image[entry["id"]], number) for entry in entries]
    return Images(
        path.name,
        Path(folder),
        [entry["file_name"] for entry in entries],
        objects,
        names,
        [entry["id"] for entry in entries],
    )


def _coco_objects(each: list[dict[str, Any]], number: dict[int, int]) -> Objects:
    edges = [[x, y, x + width, y + height] for x, y, width, height in (one["bbox"] for one in each)]
    segments = [one.get("segmentation") for one in each]
    crowds = [bool(one.get("iscrowd", 0)) for one in each]
    return _kept(
        edges,
        [number[one["category_id"]] for one in each],
        crowds,
        segments if all(segments) else [],
    )


def joined(parts: Sequence[Images]) -> Images:
    """Several sets of one list of classes as one, such as VOC 2007 and 2012."""
    if len(parts) == 1:
        return parts[0]
    return _Joined(parts)


class _Joined(Images):
    def __init__(self, parts: Sequence[Images]):
        names = [name for part in parts for name in part.names]
        super().__init__(
            " and ".join(part.where for part in parts),
            parts[0].root,
            names,
            [o for p in parts for o in p.objects],
            parts[0].classes,
        )
        self.places = [(part, number) for part in parts for number in range(len(part))]

    def read(self, number: int) -> np.ndarray:
        part, own = self.places[number]
        return part.read(own)

    def take(self, numbers: Sequence[int]) -> Images:
        taken = _Joined([self])
        taken.names, taken.objects = (
            [self.names[i] for i in numbers],
            [self.objects[i] for i in numbers],
        )
        taken.places, taken.ids = [self.places[i] for i in numbers], list(range(len(numbers)))
        return taken
