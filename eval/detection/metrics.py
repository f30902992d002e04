"""Average precision: Pascal VOC's of 2007 and of 2010 on, and COCO's by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ssl_pretrain.eval.detection.annotations import Objects

Metric = Literal["voc07", "voc12", "coco"]
THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # of the overlap; AP is the mean over them


@dataclass
class Found:
    """What a detector says of one image, in the original image's pixels."""

    boxes: np.ndarray  # float32 (n, 4), as in Objects
    scores: np.ndarray  # float32 (n,)
    labels: np.ndarray  # int64 (n,), from 1
    masks: list[Any] = field(
        default_factory=list
    )  # COCO's run lengths, one a box; empty: boxes alone


def average_precision(
    metric: Metric,
    truth: Sequence[Objects],
    found: Sequence[Found],
    classes: Sequence[str],
    sizes: Sequence[tuple[int, int]] = (),
) -> dict[str, float]:
    """{"AP", "AP50", "AP75", "AP50 <class>", ...} in percent. AP: mean over overlaps of 0.5 to 0.95.

    Args:
        sizes: (height, width) of the images, for masks of polygons; with them and with masks, `coco` adds "mask AP" and so on.

    Raises:
        ValueError: no image, another number of answers, or no box to be found.
    """
    if not truth or len(truth) != len(found):
        raise ValueError(
            f"average precision: {len(found)} answers for {len(truth)} images; both must be one number, and not 0"
        )
    if not any((~each.ignored).any() for each in truth):
        raise ValueError(
            f"average precision: none of the {len(truth)} test images has a box to be found; give a test set with annotations"
        )
    if metric != "coco":
        return voc(truth, found, classes, eleven_points=metric == "voc07")
    numbers = coco(truth, found, classes, sizes, "bbox")
    if (
        sizes
        and all(each.segments or not len(each) for each in truth)
        and any(each.masks for each in found)
    ):
        numbers |= {
            f"mask {name}": value
            for name, value in coco(truth, found, classes, sizes, "segm").items()
        }
    return numbers


def voc(
    truth: Sequence[Objects], found: Sequence[Found], classes: Sequence[str], eleven_points: bool
) -> dict[str, float]:
    """Pascal VOC's average precision: a box is right if it is the first, by score, to overlap its object by the threshold.

    The mean over classes that have an object. eleven_points: the mean precision at recalls 0, 0.1, ..., 1 (2007); else the
    area under the curve made monotone (2010 on). Edges from 0 make the development kit's inclusive pixels exact.
    """
    table = np.full((len(classes), len(THRESHOLDS)), np.nan)
    for label in range(1, len(classes) + 1):
        scores, matches, total = _ranked(truth, found, label)
        if total:
            for column in range(len(THRESHOLDS)):
                right, counted = matches[:, column] == 1, matches[:, column] >= 0
                table[label - 1, column] = _area(right[counted], total, eleven_points)
        del scores
    return _summary(table, classes)


def _ranked(
    truth: Sequence[Objects], found: Sequence[Found], label: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(scores, matches (boxes, thresholds): 1 right, 0 wrong, -1 not counted; objects to be found), by falling score."""
    scores, matches, total = [], [], 0
    for objects, answer in zip(truth, found):
        own = objects.labels == label
        boxes, ignored = objects.boxes[own], objects.ignored[own]
        total += int((~ignored).sum())
        mine = np.flatnonzero(answer.labels == label)
        mine = mine[np.argsort(-answer.scores[mine], kind="stable")]
        scores.append(answer.scores[mine])
        matches.append(_matched(answer.boxes[mine], boxes, ignored))
    ranked, joined = np.concatenate(scores), np.concatenate(matches)
    order = np.argsort(-ranked, kind="stable")
    return ranked[order], joined[order], total


def _matched(answers: np.ndarray, boxes: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """(answers, thresholds): 1, 0 or -1; the answers of one image and class by falling score."""
    matches = np.zeros((len(answers), len(THRESHOLDS)), dtype=np.int8)
    if not len(boxes) or not len(answers):
        return matches
    overlaps = overlap(answers, boxes)
    best = overlaps.argmax(axis=1)
    for column, threshold in enumerate(THRESHOLDS):
        taken: set[int] = set()
        for row, box in enumerate(best):
            if overlaps[row, box] < threshold - 1e-9:
                continue
            if ignored[box]:
                matches[row, column] = -1
            elif box not in taken:
                matches[row, column] = 1
                taken.add(int(box))
    return matches


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) and (m, 4): (n, m)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    common = sides.clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    return common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-12)


def _area(right: np.ndarray, total: int, eleven_points: bool) -> float:
    hits = np.cumsum(right)
    recall, precision = hits / total, hits / np.arange(1, len(right) + 1)
    if eleven_points:
        return float(
            np.mean(
                [precision[recall >= level].max(initial=0.0) for level in np.linspace(0, 1, 11)]
            )
        )
    recall = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(((recall[1:] - recall[:-1]) * envelope[1:]).sum())


def coco(
    truth: Sequence[Objects],
    found: Sequence[Found],
    classes: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    kind: Literal["bbox", "segm"],
) -> dict[str, float]:
    """COCO's average precision, computed by pycocotools on the same boxes or masks.

    Raises:
        ValueError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ValueError(
            "--metric coco: pycocotools is not installed; pip install 'ssl_pretrain[detection]', or take --metric voc12"
        ) from None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        known = COCO()
        known.dataset = dataset(truth, classes, sizes)
        known.createIndex()
        answers = [
            entry for number, each in enumerate(found) for entry in _entries(number, each, kind)
        ]
        if not answers:
            return _summary(np.zeros((len(classes), len(THRESHOLDS))), classes)
        judge = COCOeval(known, known.loadRes(answers), kind)
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][
        :, :, :, 0, 2
    ]  # (thresholds, recalls, classes), all areas, 100 boxes an image
    precision = np.where(precision < 0, np.nan, precision)  # classes without an object
    return _summary(precision.mean(axis=1).T, classes)


def dataset(
    truth: Sequence[Objects], classes: Sequence[str], sizes: Sequence[tuple[int, int]] = ()
) -> dict[str, Any]:
    """The objects in COCO's JSON form, images and categories numbered as here (categories from 1)."""
    images = [
        {"id": number} | ({"height": sizes[number][0], "width": sizes[number][1]} if sizes else {})
        for number in range(len(truth))
    ]
    entries: list[dict[str, Any]] = []
    for image, objects in enumerate(truth):
        for row, (box, label, ignored) in enumerate(
            zip(objects.boxes.astype(float), objects.labels, objects.ignored)
        ):
            left, top, right, bottom = box.tolist()
            entry = {
                "id": len(entries) + 1, "image_id": image, "category_id": int(label), "iscrowd": int(ignored),
                "bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top),
            }  # fmt: skip
            entries.append(
                entry | ({"segmentation": objects.segments[row]} if objects.segments else {})
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    return {"info": {}, "images": images, "annotations": entries, "categories": categories}


def _entries(image: int, found: Found, kind: str) -> list[dict[str, Any]]:
    what = "segmentation" if kind == "segm" else "bbox"
    places = (
        found.masks
        if kind == "segm"
        else [
            [x, y, right - x, bottom - y]
            for x, y, right, bottom in found.boxes.astype(float).tolist()
        ]
    )
    return [
        {"image_id": image, "category_id": int(label), "score": float(score), what: place}
        for label, score, place in zip(found.labels, found.scores, places)
    ]


def _summary(table: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """From (classes, thresholds), nan where a class has no object."""
    numbers = {
        "AP": np.nanmean(table),
        "AP50": np.nanmean(table[:, 0]),
        "AP75": np.nanmean(table[:, 5]),
    }
    return {
        name: 100 * float(value)
        for name, value in (
            numbers | {f"AP50 {kind}": table[row, 0] for row, kind in enumerate(classes)}
        ).items()
    }
