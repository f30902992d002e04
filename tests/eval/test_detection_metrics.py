"""Average precision against hand calculation and pycocotools, and the export to Detectron2."""

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
from ssl_pretrain.eval.detection.metrics import Detections


def error_of(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def draw_objects(seed: int, count: int = 12) -> list[Objects]:
    generator = np.random.default_rng(seed)
    corners = [generator.uniform(0, 60, (generator.integers(0, 6), 2)) for _ in range(count)]
    boxes = []
    for corner in corners:
        edges = np.concatenate([corner, corner + generator.uniform(8, 40, corner.shape)], axis=1)
        boxes.append(edges.astype(np.float32))
    return [
        Objects(edges, generator.integers(1, 4, len(edges)), generator.random(len(edges)) < 0.15)
        for edges in boxes
    ]


def draw_detections(truth: list[Objects], seed: int) -> list[Detections]:
    """Detect each object twice, with noisy edges and in a fifth of the cases a random class."""
    generator = np.random.default_rng(seed)
    detections = []
    for objects in truth:
        count = 2 * len(objects)
        boxes = np.repeat(objects.boxes, 2, axis=0)
        boxes = boxes + generator.normal(0, 4, (count, 4)).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        is_correct = generator.random(count) < 0.8
        labels = np.where(is_correct, np.repeat(objects.labels, 2), generator.integers(1, 4, count))
        scores = generator.random(count).astype(np.float32)
        detections.append(Detections(boxes, scores, labels))
    return detections


def to_coco_box(box) -> list[float]:
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coco_numbers_equal_those_of_pycocotools(seed, tmp_path, capsys):
    """pycocotools reads the boxes from files, as it does for its users, and prints a summary."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = draw_objects(seed)
    detections = draw_detections(truth, seed)
    ours = metrics.average_precision("coco", truth, detections, ["a", "b", "c"])
    annotations, entries = [], []
    for image, (objects, output) in enumerate(zip(truth, detections, strict=True)):
        for edges, label, crowd in zip(objects.boxes, objects.labels, objects.ignored, strict=True):
            box = to_coco_box(edges)
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label)}
            annotation |= {"bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
            annotations.append(annotation)
        for edges, label, score in zip(output.boxes, output.labels, output.scores, strict=True):
            entry = {"image_id": image, "category_id": int(label), "score": float(score)}
            entries.append(entry | {"bbox": to_coco_box(edges)})
    categories = [{"id": label, "name": name} for label, name in ((1, "a"), (2, "b"), (3, "c"))]
    content = {"info": {}, "images": [{"id": i} for i in range(12)]}
    content |= {"annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "detections.json").write_text(json.dumps(entries))
    coco = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "detections.json")), "bbox")

    def summarize():
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return 100 * evaluation.stats

    numbers = [ours["AP"], ours["AP50"], ours["AP75"]]
    np.testing.assert_allclose(numbers, summarize()[:3], rtol=0, atol=1e-9)
    assert 5 < ours["AP"] < 60 < 200 * ours["AP50"]
    evaluation.params.catIds = [2]
    assert ours["AP50 b"] == pytest.approx(summarize()[1])


def build_detections(boxes: list, scores: list, labels: list | None = None) -> Detections:
    return Detections(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(scores, dtype=np.float32),
        np.array(labels or [1] * len(scores)),
    )


def build_objects(boxes: list, ignored: list) -> Objects:
    edges = np.array(boxes, dtype=np.float32)
    return Objects(edges, np.ones(len(edges), dtype=np.int64), np.array(ignored))


def compute_voc(
    truth: Objects, output: Detections, uses_eleven_points: bool = False
) -> dict[str, float]:
    return metrics.voc_average_precision(
        [truth], [output], ["a"], uses_eleven_points=uses_eleven_points
    )


def test_voc_numbers_equal_those_computed_by_hand():
    difficult = [50, 0, 60, 10]
    truth = build_objects([[0, 0, 10, 10], [20, 0, 30, 10], difficult], [False, False, True])
    first_match, duplicate, background, second_match = (
        [0, 0, 10, 10],
        [0, 0, 10, 9],
        [80, 0, 90, 10],
        [20, 0, 30, 10],
    )
    output = build_detections(
        [first_match, duplicate, difficult, background, second_match], [0.9, 0.8, 0.7, 0.6, 0.5]
    )
    # Recall is 1/2 at precision 1, and 1 at precision 2/4. The difficult object does not count.
    assert compute_voc(truth, output)["AP50"] == pytest.approx(100 * (0.5 * 1 + 0.5 * 0.5))
    eleven_point_precision = compute_voc(truth, output, uses_eleven_points=True)["AP50"]
    assert eleven_point_precision == pytest.approx(100 * (6 * 1 + 5 * 0.5) / 11)
    overlaps = build_detections([[0, 0, 10, 7.5], [20, 0, 30, 7.4]], [0.9, 0.8])  # 0.75 and 0.74
    numbers = compute_voc(truth, overlaps)
    assert (numbers["AP50"], numbers["AP75"]) == (pytest.approx(100), pytest.approx(50))
    assert compute_voc(truth, build_detections([], []))["AP"] == 0


@pytest.mark.parametrize("metric", ["voc07", "voc12", "coco"])
def test_a_class_without_objects_does_not_count(metric):
    truth = [build_objects([[0, 0, 10, 10]], [False])]
    detections = [build_detections([[0, 0, 10, 10], [0, 0, 5, 5]], [0.9, 0.8], [1, 2])]
    numbers = metrics.average_precision(metric, truth, detections, ["a", "b"])
    assert numbers["AP"] == pytest.approx(100)
    assert np.isnan(numbers["AP50 b"])


def test_a_test_set_without_objects_or_images_is_refused():
    no_objects = [Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))]
    detections = [build_detections([[0, 0, 10, 10]], [0.9])]
    assert error_of(metrics.average_precision, "coco", no_objects, detections, ["a"]) == (
        "average precision: none of the 1 test images has a box to detect; "
        "give test images with annotations"
    )
    assert error_of(metrics.average_precision, "coco", [], [], ["a"]) == (
        "average precision: there are detections for 0 images and annotations for 0; "
        "give both for the same images, at least one"
    )


def list_detectron2_names() -> set[str]:
    """Return the names of all arrays of Detectron2's R-50.

    It has a stem and stages of 3, 4, 6 and 3 blocks. The first block of a stage has a shortcut.
    """
    norm = ("weight", "bias", "running_mean", "running_var")
    layers = ["stem.conv1"]
    for stage, num_blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        layers.append(f"res{stage}.0.shortcut")
        for block in range(num_blocks):
            layers += [f"res{stage}.{block}.conv{number}" for number in (1, 2, 3)]
    norms = {f"{layer}.norm.{entry}" for layer in layers for entry in norm}
    return {f"{layer}.weight" for layer in layers} | norms


def test_an_exported_resnet50_has_the_names_of_detectron2(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=0)
    assert detectron2.export(model, tmp_path / "weights.pkl") == len(list_detectron2_names()) == 265
    with (tmp_path / "weights.pkl").open("rb") as file:
        content = pickle.load(file)
    assert set(content) == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    assert set(content["model"]) == list_detectron2_names()
    weights = model.state_dict()
    for name, key in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res4.0.shortcut.norm.bias": "layer3.0.downsample.1.bias",
        "res4.5.conv3.norm.weight": "layer3.5.bn3.weight",
        "res5.2.conv2.weight": "layer4.2.conv2.weight",
    }.items():
        np.testing.assert_array_equal(content["model"][name], weights[key].numpy())


def test_a_resnet_built_from_exported_weights_has_the_features_of_timm():
    """The stride is in the 3x3 convolution, as in Detectron2."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=0, layers=(1, 1, 1, 1)).eval().double()
    arrays = {
        name: torch.from_numpy(value).double()
        for name, value in detectron2.rename_weights(OrderedDict(model.state_dict())).items()
    }

    def apply_layer(x, name, stride=1, padding=0):
        x = nn.functional.conv2d(x, arrays[f"{name}.weight"], stride=stride, padding=padding)
        entries = ("running_mean", "running_var", "weight", "bias")
        return nn.functional.batch_norm(x, *(arrays[f"{name}.norm.{entry}"] for entry in entries))

    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    x = nn.functional.max_pool2d(apply_layer(images, "stem.conv1", 2, 3).relu(), 3, 2, 1)
    for stage, stride in ((2, 1), (3, 2), (4, 2), (5, 2)):
        block = f"res{stage}.0"
        out = apply_layer(x, f"{block}.conv1").relu()
        out = apply_layer(out, f"{block}.conv2", stride, 1).relu()
        out = apply_layer(out, f"{block}.conv3")
        x = (out + apply_layer(x, f"{block}.shortcut", stride)).relu()
    torch.testing.assert_close(x, model.forward_features(images), rtol=1e-5, atol=1e-5)


def test_other_networks_are_not_exported(tmp_path):
    model = timm.create_model("test_resnet", num_classes=0)
    assert error_of(detectron2.export, model, tmp_path / "x.pkl") == (
        "--export-detectron2: Detectron2's R_50_C4 is a bottleneck ResNet with a 7x7 stem, but "
        "this backbone is a different network; give a run of resnet50"
    )
    assert error_of(detectron2.rename_weights, {"fc.weight": torch.zeros(1)}) == (
        "--export-detectron2: Detectron2 has no weight for 'fc.weight'; "
        "give a ResNet-50, 101 or 152 with the ImageNet stem"
    )


def test_detectron2s_config_has_the_normalization_of_images():
    lines = detectron2.pixel_config([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).splitlines()
    assert lines[0] == "MODEL.PIXEL_MEAN [123.675, 116.280, 103.530]"
