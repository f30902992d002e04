"""Average precision as defined by Pascal VOC, in 2007 and in 2010, and by COCO (pycocotools)."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torchvision.ops import box_iou

from ssl_pretrain.eval.detection.annotations import Objects
from ssl_pretrain.eval.detection.published_protocols import Metric
from ssl_pretrain.system import optional_packages

IOU_THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # AP is averaged over these overlaps


@dataclass
class Detections:
    """Output of a detector for one image, in the pixels of the original image.

    Attributes:
        boxes: float32 (n, 4), as in Objects.
        scores: float32 (n,).
        labels: int64 (n,), counted from 1.
        masks: One mask per box in COCO's run-length encoding, or empty for boxes without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[Any] = field(default_factory=list)


def require_packages(metric: Metric, predicts_masks: bool) -> None:
    """Raise ValueError with the install line if pycocotools is needed and not installed."""
    if predicts_masks:
        optional_packages.require(
            "--protocol with masks", "pycocotools", "detection", "use a protocol without masks"
        )
    elif metric == "coco":
        optional_packages.require("--metric coco", "pycocotools", "detection", "use --metric voc12")


def average_precision(
    metric: Metric,
    truth: Sequence[Objects],
    detections: Sequence[Detections],
    classes: Sequence[str],
    sizes: Sequence[tuple[int, int]] = (),
) -> dict[str, float]:
    """Return "AP", "AP50", "AP75" and the "AP50 <class>" of each class, in percent.

    AP is the mean over the overlap thresholds from 0.5 to 0.95.

    Args:
        metric: Definition to use, "voc07", "voc12" or "coco".
        truth: Annotated objects of each image.
        detections: Detections in each image.
        classes: Names of the classes.
        sizes: Height and width of each image, for rasterizing polygons. If they are given and the
            detections have masks, "coco" also returns "mask AP", "mask AP50" and so on.

    Raises:
        ValueError: If there is no image or no object, or the numbers of images differ.
    """
    if not truth or len(truth) != len(detections):
        raise ValueError(
            f"average precision: there are detections for {len(detections)} images and annotations "
            f"for {len(truth)}; give both for the same images, at least one"
        )
    if not any((~objects.ignored).any() for objects in truth):
        raise ValueError(
            f"average precision: none of the {len(truth)} test images has a box to detect; "
            "give test images with annotations"
        )
    if metric != "coco":
        return voc_average_precision(
            truth, detections, classes, uses_eleven_points=metric == "voc07"
        )
    numbers = coco_average_precision(truth, detections, classes, sizes, "bbox")
    has_annotated_masks = all(objects.segments or not len(objects) for objects in truth)
    if sizes and has_annotated_masks and any(output.masks for output in detections):
        masks = coco_average_precision(truth, detections, classes, sizes, "segm")
        numbers |= {f"mask {name}": value for name, value in masks.items()}
    return numbers


def voc_average_precision(
    truth: Sequence[Objects],
    detections: Sequence[Detections],
    classes: Sequence[str],
    uses_eleven_points: bool,
) -> dict[str, float]:
    """Return Pascal VOC's average precision, the mean over the classes that have an object.

    A detection belongs to the object that it overlaps most. It is correct if the overlap reaches
    the threshold and no detection with a higher score has matched that object. Box coordinates
    start at 0. Box areas equal those of VOC's development kit, which counts both end pixels.

    Args:
        truth: Annotated objects of each image.
        detections: Detections in each image.
        classes: Names of the classes.
        uses_eleven_points: Average the precision at recalls 0, 0.1, ..., 1, as in 2007, instead of
            taking the area under the monotone curve, as since 2010.
    """
    table = np.full((len(classes), len(IOU_THRESHOLDS)), np.nan)
    for label in range(1, len(classes) + 1):
        matches, num_objects = _ranked_matches(truth, detections, label)
        for column in range(len(IOU_THRESHOLDS) if num_objects else 0):
            outcomes = matches[matches[:, column] >= 0, column]
            table[label - 1, column] = _area_under_curve(
                outcomes == 1, num_objects, uses_eleven_points
            )
    return _summarize(table, classes)


def _ranked_matches(
    truth: Sequence[Objects], detections: Sequence[Detections], label: int
) -> tuple[np.ndarray, int]:
    """Match the detections of one class to its objects.

    Returns:
        Matches (detections, thresholds), highest score first, and the number of objects to detect.
        A match is 1 for a correct detection, 0 for a wrong one, and -1 for an ignored one.
    """
    scores, matches, num_objects = [], [], 0
    for objects, output in zip(truth, detections):
        is_class = objects.labels == label
        boxes, ignored = objects.boxes[is_class], objects.ignored[is_class]
        num_objects += int((~ignored).sum())
        rows = np.flatnonzero(output.labels == label)
        rows = rows[np.argsort(-output.scores[rows], kind="stable")]
        scores.append(output.scores[rows])
        matches.append(_match_image(output.boxes[rows], boxes, ignored))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return np.concatenate(matches)[order], num_objects


def _match_image(
    detection_boxes: np.ndarray, object_boxes: np.ndarray, ignored: np.ndarray
) -> np.ndarray:
    """Return the matches (detections, thresholds) of one image and class, sorted by score."""
    matches = np.zeros((len(detection_boxes), len(IOU_THRESHOLDS)), dtype=np.int8)
    if not len(object_boxes) or not len(detection_boxes):
        return matches
    pair = (torch.from_numpy(boxes).double() for boxes in (detection_boxes, object_boxes))
    overlaps = box_iou(*pair).numpy()
    best_objects = overlaps.argmax(axis=1).tolist()
    for column, threshold in enumerate(IOU_THRESHOLDS):
        matched_objects: set[int] = set()
        for row, object_index in enumerate(best_objects):
            if overlaps[row, object_index] < threshold - 1e-9:
                continue
            if ignored[object_index]:
                matches[row, column] = -1
            elif object_index not in matched_objects:
                matches[row, column] = 1
                matched_objects.add(object_index)
    return matches


def _area_under_curve(is_correct: np.ndarray, num_objects: int, uses_eleven_points: bool) -> float:
    """Return the area under the curve of precision over recall, for detections sorted by score."""
    hits = np.cumsum(is_correct)
    recall, precision = hits / num_objects, hits / np.arange(1, len(is_correct) + 1)
    if uses_eleven_points:
        levels = np.linspace(0, 1, 11)
        return float(np.mean([precision[recall >= level].max(initial=0.0) for level in levels]))
    recall = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(((recall[1:] - recall[:-1]) * envelope[1:]).sum())


def coco_average_precision(
    truth: Sequence[Objects],
    detections: Sequence[Detections],
    classes: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    kind: Literal["bbox", "segm"],
) -> dict[str, float]:
    """Return COCO's average precision of the boxes or the masks, computed by pycocotools.

    Raises:
        ValueError: If pycocotools is not installed.
    """
    require_packages("coco", predicts_masks=False)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco_results = [
        result
        for image, output in enumerate(detections)
        for result in _coco_results(image, output, kind)
    ]
    if not coco_results:
        return _summarize(np.zeros((len(classes), len(IOU_THRESHOLDS))), classes)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        annotations = COCO()
        annotations.dataset = coco_dataset(truth, classes, sizes)
        annotations.createIndex()
        evaluation = COCOeval(annotations, annotations.loadRes(coco_results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    # (thresholds, recalls, classes) for objects of all areas and 100 boxes per image
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    precision = np.where(precision < 0, np.nan, precision)  # -1 marks a class without objects
    return _summarize(precision.mean(axis=1).T, classes)


def coco_dataset(
    truth: Sequence[Objects], classes: Sequence[str], sizes: Sequence[tuple[int, int]] = ()
) -> dict[str, Any]:
    """Return the objects in COCO's JSON format. Images are numbered from 0, categories from 1."""
    images: list[dict[str, Any]] = [{"id": image} for image in range(len(truth))]
    for image, size in zip(images, sizes):
        image |= dict(zip(("height", "width"), size))
    annotations: list[dict[str, Any]] = [
        {
            "image_id": image,
            "category_id": int(objects.labels[row]),
            "iscrowd": int(objects.ignored[row]),
            "bbox": [left, top, width, height],
            "area": width * height,
            **({"segmentation": objects.segments[row]} if objects.segments else {}),
        }
        for image, objects in enumerate(truth)
        for row, (left, top, width, height) in enumerate(_coco_boxes(objects.boxes))
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _coco_boxes(boxes: np.ndarray) -> list[list[float]]:
    """Return boxes (n, 4) as left, top, width and height."""
    edges = boxes.astype(float)
    edges[:, 2:] -= edges[:, :2]
    return edges.tolist()


def _coco_results(image: int, output: Detections, kind: str) -> list[dict[str, Any]]:
    """Return the detections of one image in COCO's result format."""
    key = "segmentation" if kind == "segm" else "bbox"
    regions = output.masks if kind == "segm" else _coco_boxes(output.boxes)
    return [
        {"image_id": image, "category_id": int(label), "score": float(score), key: region}
        for label, score, region in zip(output.labels, output.scores, regions)
    ]


def _summarize(table: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Summarize precision (classes, thresholds), which is NaN for classes without objects."""
    numbers = {
        "AP": np.nanmean(table),
        "AP50": np.nanmean(table[:, 0]),
        "AP75": np.nanmean(table[:, 5]),
        **{f"AP50 {name}": precision for name, precision in zip(classes, table[:, 0])},
    }
    return {name: 100 * float(value) for name, value in numbers.items()}
