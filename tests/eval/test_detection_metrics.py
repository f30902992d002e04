"""Detection's numbers by hand and by pycocotools, and the names that Detectron2 has."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from torch import nn

from ssl_pretrain.eval.detection import detectron2, metrics
from ssl_pretrain.eval.detection.annotations import Objects
from ssl_pretrain.eval.detection.metrics import Found


def told(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def answers(objects: list[Objects], seed: int) -> list[Found]:
    """Half-right detections: boxes moved a little or a lot, some twice, some of nothing, some of another class."""
    generator = np.random.default_rng(seed)
    found = []
    for each in objects:
        moved = np.repeat(each.boxes, 2, axis=0) + generator.normal(
            0, 4, (2 * len(each), 4)
        ).astype(np.float32)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        labels = np.where(
            generator.random(2 * len(each)) < 0.8,
            np.repeat(each.labels, 2),
            generator.integers(1, 4, 2 * len(each)),
        )
        found.append(Found(moved, generator.random(2 * len(each)).astype(np.float32), labels))
    return found


def made_up(seed: int, count: int = 12) -> list[Objects]:
    generator = np.random.default_rng(seed)
    corners = [generator.uniform(0, 60, (generator.integers(0, 6), 2)) for _ in range(count)]
    boxes = [
        np.concatenate([corner, corner + generator.uniform(8, 40, corner.shape)], axis=1).astype(
            np.float32
        )
        for corner in corners
    ]
    return [
        Objects(each, generator.integers(1, 4, len(each)), generator.random(len(each)) < 0.15)
        for each in boxes
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coco_numbers_are_pycocotools_own(seed, tmp_path, capsys):
    """The boxes go there by files, as its users do it, and its own summary is compared."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = made_up(seed), answers(made_up(seed), seed)
    ours = metrics.average_precision("coco", truth, found, ["a", "b", "c"])
    annotations, number = [], 0
    for image, objects in enumerate(truth):
        for (x, y, right, bottom), label, crowd in zip(
            objects.boxes.tolist(), objects.labels.tolist(), objects.ignored.tolist()
        ):
            number += 1
            box = [x, y, right - x, bottom - y]
            annotations.append(
                {
                    "id": number,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(crowd),
                }
            )
    answered = [
        {
            "image_id": image,
            "category_id": label,
            "score": score,
            "bbox": [x, y, right - x, bottom - y],
        }
        for image, each in enumerate(found)
        for (x, y, right, bottom), label, score in zip(
            each.boxes.tolist(), each.labels.tolist(), each.scores.tolist()
        )
    ]
    categories = [{"id": label, "name": name} for label, name in ((1, "a"), (2, "b"), (3, "c"))]
    for name, content in (
        (
            "truth",
            {
                "info": {},
                "images": [{"id": i} for i in range(12)],
                "annotations": annotations,
                "categories": categories,
            },
        ),
        ("answers", answered),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    known = COCO(str(tmp_path / "truth.json"))
    judge = COCOeval(known, known.loadRes(str(tmp_path / "answers.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    np.testing.assert_allclose(
        [ours["AP"], ours["AP50"], ours["AP75"]], 100 * judge.stats[:3], rtol=0, atol=1e-9
    )
    assert 5 < ours["AP"] < 60 < 200 * ours["AP50"]
    judge.params.catIds = [2]
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert ours["AP50 b"] == pytest.approx(100 * judge.stats[1])


def one_image(boxes: list, scores: list, labels: list | None = None) -> Found:
    return Found(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(scores, dtype=np.float32),
        np.array(labels or [1] * len(scores)),
    )


def test_voc_numbers_by_hand():
    truth = [
        Objects(
            np.array([[0, 0, 10, 10], [20, 0, 30, 10], [50, 0, 60, 10]], dtype=np.float32),
            np.array([1, 1, 1]),
            np.array([False, False, True]),
        )
    ]
    # right, again the same (wrong), the difficult one (not counted), nothing (wrong), right
    found = [
        one_image(
            [[0, 0, 10, 10], [0, 0, 10, 9], [50, 0, 60, 10], [80, 0, 90, 10], [20, 0, 30, 10]],
            [0.9, 0.8, 0.7, 0.6, 0.5],
        )
    ]
    # recall 1/2 at precision 1, recall 1 at precision 2/4
    assert metrics.voc(truth, found, ["a"], eleven_points=False)["AP50"] == pytest.approx(
        100 * (0.5 * 1 + 0.5 * 0.5)
    )
    assert metrics.voc(truth, found, ["a"], eleven_points=True)["AP50"] == pytest.approx(
        100 * (6 * 1 + 5 * 0.5) / 11
    )
    partly = [
        one_image([[0, 0, 10, 7.5], [20, 0, 30, 7.4]], [0.9, 0.8])
    ]  # overlaps of 0.75 and 0.74
    found = metrics.voc(truth, partly, ["a"], eleven_points=False)
    assert (found["AP50"], found["AP75"]) == (pytest.approx(100), pytest.approx(50))
    assert metrics.voc(truth, [one_image([], [])], ["a"], eleven_points=False)["AP"] == 0


def test_a_class_without_objects_does_not_count(capsys):
    truth = [
        Objects(np.array([[0, 0, 10, 10]], dtype=np.float32), np.array([1]), np.array([False]))
    ]
    found = [one_image([[0, 0, 10, 10], [0, 0, 5, 5]], [0.9, 0.8], [1, 2])]
    for metric in ("voc07", "voc12", "coco"):
        numbers = metrics.average_precision(metric, truth, found, ["a", "b"])
        assert numbers["AP"] == pytest.approx(100) and np.isnan(numbers["AP50 b"])
    nothing = [Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))]
    assert told(metrics.average_precision, "coco", nothing, found, ["a"]) == (
        "average precision: none of the 1 test images has a box to be found; give a test set with annotations"
    )
    assert told(metrics.average_precision, "coco", [], [], ["a"]) == (
        "average precision: 0 answers for 0 images; both must be one number, and not 0"
    )


def detectron2_names() -> set[str]:
    """Every array of Detectron2's R-50, from its structure: a stem, stages of 3, 4, 6 and 3 blocks, a shortcut in the first."""
    norm = ("weight", "bias", "running_mean", "running_var")
    layers = ["stem.conv1"]
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        for block in range(blocks):
            layers += [
                f"res{stage}.{block}.{layer}"
                for layer in ("conv1", "conv2", "conv3", *(["shortcut"] if block == 0 else []))
            ]
    return {f"{layer}.weight" for layer in layers} | {
        f"{layer}.norm.{entry}" for layer in layers for entry in norm
    }


def test_a_resnet50_has_the_names_that_detectron2_has(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=0)
    assert detectron2.export(model, tmp_path / "weights.pkl") == len(detectron2_names()) == 265
    with (tmp_path / "weights.pkl").open("rb") as file:
        written = pickle.load(file)
    assert (
        set(written) == {"model", "__author__", "matching_heuristics"}
        and written["matching_heuristics"] is True
    )
    assert set(written["model"]) == detectron2_names()
    own = model.state_dict()
    for name, key in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res4.0.shortcut.norm.bias": "layer3.0.downsample.1.bias",
        "res4.5.conv3.norm.weight": "layer3.5.bn3.weight",
        "res5.2.conv2.weight": "layer4.2.conv2.weight",
    }.items():
        np.testing.assert_array_equal(written["model"][name], own[key].numpy())


def test_detectron2s_forward_on_the_exported_names_is_ours():
    """A ResNet read from the names as Detectron2 does, with its stride in the 3x3 convolution, gives timm's features."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=0, layers=(1, 1, 1, 1)).eval().double()
    arrays = {
        name: torch.from_numpy(value).double()
        for name, value in detectron2.names(OrderedDict(model.state_dict())).items()
    }

    def layer(x, name, stride=1, padding=0):
        x = nn.functional.conv2d(x, arrays[f"{name}.weight"], stride=stride, padding=padding)
        scale, bias, mean, var = (
            arrays[f"{name}.norm.{entry}"]
            for entry in ("weight", "bias", "running_mean", "running_var")
        )
        return nn.functional.batch_norm(x, mean, var, scale, bias)

    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    x = nn.functional.max_pool2d(layer(images, "stem.conv1", 2, 3).relu(), 3, 2, 1)
    for stage, stride in ((2, 1), (3, 2), (4, 2), (5, 2)):
        block = f"res{stage}.0"
        out = layer(
            layer(layer(x, f"{block}.conv1").relu(), f"{block}.conv2", stride, 1).relu(),
            f"{block}.conv3",
        )
        x = (out + layer(x, f"{block}.shortcut", stride)).relu()
    torch.testing.assert_close(x, model.forward_features(images), rtol=1e-5, atol=1e-5)


def test_other_networks_are_not_exported(tmp_path):
    assert told(
        detectron2.export, timm.create_model("test_resnet", num_classes=0), tmp_path / "x.pkl"
    ) == (
        "--export-detectron2: Detectron2's R_50_C4 is a bottleneck ResNet with a 7x7 stem; this backbone is another network"
    )
    assert told(detectron2.names, {"fc.weight": torch.zeros(1)}) == (
        "Detectron2 has no place for 'fc.weight': the export is of ResNets 50, 101 and 152 with the ImageNet stem"
    )
    assert (
        detectron2.pixels([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).splitlines()[0]
        == "MODEL.PIXEL_MEAN [123.675, 116.280, 103.530]"
    )
