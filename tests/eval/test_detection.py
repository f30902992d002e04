"""Detection: data sets in VOC and COCO format, both detectors, and the command."""

import json
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import run_ranks
from PIL import Image
from torch import nn
from untrained_run import make_run

from ssl_pretrain import rng
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import runs
from ssl_pretrain.eval.detection import __main__ as command
from ssl_pretrain.eval.detection import (
    annotations,
    backbone_comparison,
    detectors,
    metrics,
    training,
)
from ssl_pretrain.eval.detection.annotation_files import load_coco, load_voc, parse_voc_xml
from ssl_pretrain.eval.detection.published_protocols import PROTOCOLS

CPU = torch.device("cpu")
COLORS = {"ball": (220, 40, 40), "box": (40, 200, 60), "bar": (60, 80, 230)}
HEIGHT, WIDTH = 72, 96
MEAN, STD = [0.5] * 3, [0.25] * 3
TINY = replace(
    PROTOCOLS["small"],
    num_steps=3,
    warmup_steps=0,
    global_batch_size=2,
    short_sides=(64, 80),
    max_side=128,
    pyramid_channels=16,
    head_dim=16,
    num_proposals=(50, 20, 50, 20),
    num_sampled_proposals=16,
    num_precise_bn_batches=1,
)
XML = "<annotation><size><width>96</width><height>72</height></size>{}</annotation>"
OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox>"
    "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def draw_picture(number: int) -> tuple[np.ndarray, list[tuple[str, int, int, int, int]]]:
    """Draw three colored rectangles on gray noise.

    Returns:
        The pixels, and the name, left, top, right and bottom edge of each rectangle.
    """
    generator = np.random.default_rng(number)
    pixels = generator.integers(90, 140, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    objects = []
    for column, (name, color) in enumerate(COLORS.items()):
        width, height = generator.integers(14, 28, 2)
        left = 32 * column + generator.integers(0, 32 - width + 1)
        top = generator.integers(0, HEIGHT - height)
        pixels[top : top + height, left : left + width] = color
        objects.append((name, int(left), int(top), int(left + width), int(top + height)))
    return pixels, objects


def write_voc(root, num_images: int = 8, wrapper: str = "DATA/"):
    """Write a zip in Pascal VOC's layout, where pixel coordinates start at 1."""
    with zipfile.ZipFile(root, "w") as archive:

        def write(name: str, content: str | bytes) -> None:
            archive.writestr(f"{wrapper}{name}", content)

        for number in range(num_images):
            pixels, objects = draw_picture(number)
            path = root.parent / "picture.png"
            Image.fromarray(pixels).save(path)
            write(f"JPEGImages/{number}.png", path.read_bytes())
            elements = [
                OBJECT.format(name, 0, left + 1, top + 1, right, bottom)
                for name, left, top, right, bottom in objects
            ]
            write(f"Annotations/{number}.xml", XML.format("".join(elements)))
        splits = {"trainval": range(num_images), "test": range(num_images // 2), "none": []}
        for split, numbers in splits.items():
            write(f"ImageSets/Main/{split}.txt", "".join(f"{number}\n" for number in numbers))
    return root


def write_coco(folder, num_images: int = 4):
    """Write the same pictures with COCO's JSON and polygons. The category ids have gaps."""
    folder.mkdir()
    ids = {"ball": 3, "box": 7, "bar": 20}
    images, entries = [], []
    for number in range(num_images):
        pixels, objects = draw_picture(number)
        file = f"{number}.png"
        Image.fromarray(pixels).save(folder / file)
        size = {"height": HEIGHT, "width": WIDTH}
        images.append({"id": 100 + number, "file_name": file, **size})
        for name, left, top, right, bottom in objects:
            width, height = right - left, bottom - top
            entry = {
                "id": len(entries) + 1,
                "image_id": 100 + number,
                "category_id": ids[name],
                "iscrowd": 0,
                "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                "bbox": [left, top, width, height],
                "area": width * height,
            }
            entries.append(entry)
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    content = {"images": images, "annotations": entries, "categories": categories}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def voc_zip(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc") / "voc.zip")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.load_run(make_run(tmp_path_factory.mktemp("runs") / "made"), device="cpu")


def error_message(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def build_resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=0)


def test_voc_box_coordinates_start_at_zero_and_labels_at_one(voc_zip):
    images = load_voc(voc_zip, "trainval")
    assert images.classes == ["ball", "bar", "box"]
    assert len(images) == 8
    for number in range(8):
        pixels, objects = draw_picture(number)
        np.testing.assert_array_equal(images.read(number), pixels)
        assert images.objects[number].boxes.tolist() == [list(map(float, o[1:])) for o in objects]
        names = [images.classes[label - 1] for label in images.objects[number].labels]
        assert names == [o[0] for o in objects]
    left, top, right, bottom = images.objects[0].boxes[0].astype(int)
    assert (images.read(0)[top:bottom, left:right] == COLORS["ball"]).all()


def test_a_data_set_can_be_pickled_after_an_image_was_read(voc_zip):
    images = load_voc(voc_zip, "trainval")
    pixels = images.read(3)
    subset = pickle.loads(pickle.dumps(images)).subset([3, 1])
    assert len(subset) == 2
    np.testing.assert_array_equal(subset.read(0), pixels)


def test_concatenated_sets_read_each_image_from_its_own_files(voc_zip, tmp_path):
    path = write_coco(tmp_path / "coco")
    coco = load_coco(path, path.parent)
    voc = load_voc(voc_zip, "test", coco.classes)
    images = annotations.concatenate([voc, coco]).subset([5, 2])
    assert images.name == "voc.zip, test and annotations.json"
    for index, number in enumerate((1, 2)):
        np.testing.assert_array_equal(images.read(index), draw_picture(number)[0])


def test_coco_and_voc_describe_the_same_objects(voc_zip, tmp_path):
    path = write_coco(tmp_path / "coco")
    coco = load_coco(path, path.parent)
    voc = load_voc(voc_zip, "test", ["ball", "box", "bar"])
    assert coco.classes == voc.classes
    assert [name for _, name in coco.files] == ["0.png", "1.png", "2.png", "3.png"]
    for a, b in zip(coco.objects, voc.objects, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.labels, b.labels)
    masks = training.decode_masks(coco.objects[0].segments, HEIGHT, WIDTH)
    left, top, right, bottom = coco.objects[0].boxes[0].astype(int)
    assert masks[0, top:bottom, left:right].all()
    assert masks[0].sum() == (right - left) * (bottom - top)


def test_mistakes_in_voc_data_are_reported(voc_zip, tmp_path):
    assert error_message(load_voc, voc_zip, "val") == (
        f"{voc_zip}: ImageSets/Main has no split 'val'; choose one of: none, test, trainval"
    )
    assert error_message(load_voc, voc_zip, "none") == (
        f"{voc_zip}: ImageSets/Main/none.txt lists no images; give another split"
    )
    assert error_message(load_voc, voc_zip, "test", ["ball", "box"]) == (
        f"{voc_zip}: 'test' has boxes of bar, which are not among the classes ball, box; "
        "add them to --classes"
    )
    assert error_message(load_voc, tmp_path, "test").startswith(
        f"{tmp_path}: has no ImageSets/Main; give a folder or zip in Pascal VOC's layout, with "
    )
    empty = tmp_path / "empty"
    files = {
        "Annotations/0.xml": XML.format(""),
        "ImageSets/Main/test.txt": "0\n",
        "JPEGImages/0.png": "",
    }
    for name, text in files.items():
        (empty / name).parent.mkdir(parents=True, exist_ok=True)
        (empty / name).write_text(text)
    assert error_message(load_voc, empty, "test") == (
        f"{empty}: none of the 1 images of 'test' has a box in its annotation; check the split"
    )
    assert error_message(load_voc(empty, "test", ["ball"]).trainable_subset) == (
        "empty, test: none of its 1 images has a box to learn from; "
        "check that the annotations belong to these images"
    )


def test_mistakes_in_coco_data_are_reported(tmp_path):
    path = write_coco(tmp_path / "coco")
    assert error_message(load_coco, path, "", ["cat"]) == (
        f"{path}: the categories are ball, box, bar, but those of --classes or of the training "
        "images are cat; give files of the same data set"
    )
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    assert error_message(load_coco, path, "") == (
        f"{path}: has 0 images and 0 boxes; give a file with both"
    )


def test_boxes_without_area_are_left_out_and_difficult_ones_are_ignored():
    elements = [
        OBJECT.format("ball", 0, 5, 5, 5, 4),
        OBJECT.format("ball", 1, 1, 1, 9, 9),
        OBJECT.format("ball", 0, 3, 3, 3, 3),
    ]
    xml = XML.format("".join(elements)).encode()
    boxes, names, difficult = parse_voc_xml(xml, "0")
    objects = annotations.build_objects(boxes, [1] * len(names), difficult)
    assert objects.boxes.tolist() == [[0, 0, 9, 9], [2, 2, 3, 3]]
    assert objects.ignored.tolist() == [True, False]


def test_flipping_keeps_boxes_and_masks_on_their_objects():
    pixels, objects = draw_picture(1)
    left, top, right, bottom = objects[0][1:]
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.uint8)
    mask[0, top:bottom, left:right] = 1
    box = torch.tensor([[left, top, right, bottom]]).float()
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    image, target = training.flip(image, {"boxes": box, "masks": mask})
    left, top, right, bottom = target["boxes"][0].int().tolist()
    ball = torch.tensor(COLORS["ball"])[:, None, None]
    assert (image[:, top:bottom, left:right] == ball).all()
    assert target["masks"][0, top:bottom, left:right].all()


@pytest.mark.parametrize(
    ("architecture", "masks"), [("fpn", False), ("c4", False), ("c4", True), ("fpn", True)]
)
def test_each_detector_trains_its_pretrained_backbone_and_returns_boxes_in_image_pixels(
    run, tmp_path, architecture, masks
):
    path = write_coco(tmp_path / "coco")
    images = load_coco(path, path.parent)
    protocol = replace(TINY, architecture=architecture, predicts_masks=masks, norm="batch")
    model = build_resnet()
    model.load_state_dict(run.backbone.model.state_dict())
    detector = detectors.build(model, 3, protocol, MEAN, STD)
    # The detector shares the backbone's weights. None is copied or left out.
    weights = {id(parameter) for parameter in model.parameters()}
    assert weights <= {id(parameter) for parameter in detector.parameters()}
    losses = training.train(detector, images, protocol, 0, CPU)
    assert len(losses) == 3
    pretrained = run.backbone.model.state_dict()
    for name, value in model.named_parameters():
        assert not torch.equal(value, pretrained[name]), name
    detections, sizes = training.detect(detector, images, CPU)
    assert sizes == [(HEIGHT, WIDTH)] * 4
    for output in detections:
        assert (output.boxes >= 0).all()
        assert (output.boxes <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()
    if masks:
        numbers = metrics.average_precision(
            "coco", images.objects, detections, images.classes, sizes
        )
        nothing_detected = not any(len(output.labels) for output in detections)
        assert {"AP", "mask AP"} <= set(numbers) or nothing_detected


def test_a_detector_that_knows_the_objects_scores_100(voc_zip):
    """Boxes, scales and labels survive resizing and its inverse."""
    images = load_voc(voc_zip, "test")
    protocol = replace(TINY, short_sides=(160,), max_side=400)
    detector = detectors.build(build_resnet(), 3, protocol, MEAN, STD)

    class Oracle(nn.Module):
        """A replacement for the region heads that returns the annotated objects, resized."""

        number = 0

        def forward(self, features, proposals, image_shapes, targets=None):
            objects = images.objects[self.number]
            self.number += 1
            scale = torch.tensor([image_shapes[0][1] / WIDTH, image_shapes[0][0] / HEIGHT] * 2)
            output = {
                "boxes": torch.from_numpy(objects.boxes) * scale,
                "labels": torch.from_numpy(objects.labels),
                "scores": torch.ones(len(objects)),
            }
            return [output], {}

    detector.roi_heads = Oracle()
    detections, sizes = training.detect(detector, images, CPU)
    numbers = metrics.average_precision("coco", images.objects, detections, images.classes, sizes)
    assert numbers["AP75"] == pytest.approx(100)
    assert numbers["AP"] > 99


def test_the_learning_rate_warms_up_and_drops():
    protocol = replace(
        TINY, num_steps=24000, lr=0.02, warmup_steps=100, lr_drop_fractions=(0.75, 22 / 24)
    )
    expected_rates = {
        0: 0.00002,
        50: 0.02 * (0.001 + 0.999 / 2),
        100: 0.02,
        17999: 0.02,
        18000: 0.002,
        21999: 0.002,
        22000: 0.0002,
        23999: 0.0002,
    }
    for step, rate in expected_rates.items():
        assert training.learning_rate(protocol, step) == pytest.approx(rate)


def test_batches_are_a_function_of_the_step(voc_zip):
    images = load_voc(voc_zip, "trainval")
    batches = training.TrainingBatches(images, replace(TINY, global_batch_size=3), seed=1)
    image, target = batches[5][0]
    assert len(batches[0]) == 3  # needs the order of another epoch
    assert torch.equal(image, batches[5][0][0])
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.dtype == torch.float32
    assert target["labels"].min() >= 1
    order = [number for epoch in range(3) for number in rng.permutation(1, epoch, 8)]
    assert len(set(order[:8])) == 8
    pixels = torch.from_numpy(images.read(int(order[15]))).permute(2, 0, 1) / 255  # slot 0 of 5
    assert torch.allclose(image, pixels) or torch.allclose(image.flip(-1), pixels)


def _train_one_step(path):
    """Return the weights, the mean in the first norm, and the number of images with detections."""
    torch.manual_seed(0)
    protocol = replace(TINY, num_steps=1, short_sides=(64,), num_precise_bn_batches=0)
    detector = detectors.build(build_resnet(), 3, protocol, MEAN, STD)
    detector = detectors.convert_norms(detector, "sync", 2 // process_group.world_size())
    images = load_voc(path, "trainval")
    training.train(detector, images, protocol, 0, CPU)
    weights = torch.cat([parameter.detach().flatten() for parameter in detector.parameters()])
    statistics = dict(detector.named_buffers())["backbone.stages.stem.conv1.1.running_mean"]
    detections, _ = training.detect(detector, images.subset([0, 1, 2]), CPU)
    return weights, statistics, len(detections)


@pytest.mark.full
def test_ranks_share_their_statistics_and_their_weights(voc_zip):
    """The first norm sees whole images, not regions, so its statistics equal one process's.

    This holds for one step. Later steps start from weights that depend on the random regions.
    """
    (weights, statistics, num_images), other_rank = run_ranks(
        _train_one_step, voc_zip, world_size=2
    )
    (one_process,) = run_ranks(_train_one_step, voc_zip, world_size=1)
    assert torch.equal(weights, other_rank[0])
    assert num_images == other_rank[2] == 3
    torch.testing.assert_close(statistics, other_rank[1], rtol=0, atol=0)
    torch.testing.assert_close(statistics, one_process[1], rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_a_detector_overfits_eight_images(run, voc_zip):
    """AP50 reaches 95 on the training images, so boxes, scales and labels are consistent.

    The objects measure 19 to 37 pixels, and anchors of 16 and 32 pixels cover them densely.
    """
    images = load_voc(voc_zip, "trainval")
    protocol = replace(
        PROTOCOLS["small"],
        num_steps=250,
        global_batch_size=4,
        lr=0.02,
        short_sides=(96,),
        max_side=160,
        num_precise_bn_batches=20,
        pyramid_channels=32,
        head_dim=64,
        num_sampled_proposals=64,
    )
    numbers, losses = backbone_comparison.train_and_test(run, images, images, protocol, "random", 0)
    assert numbers["AP50"] >= 95, (numbers, losses[::25])


def test_the_command_compares_both_backbones_and_saves_the_protocol(
    run, voc_zip, capsys, monkeypatch
):
    monkeypatch.setitem(PROTOCOLS, "small", TINY)
    settings = ["--device", "cpu", "--seeds", "0", "1", "--steps", "1", "--metric", "voc12"]
    settings.append("--verbose")
    command.main([str(run.path), "--voc", str(voc_zip), *settings])
    out = capsys.readouterr().out
    rows = json.loads((run.path / "eval" / "detection.json").read_text())["rows"]
    assert [row["features"] for row in rows] == ["random", "pretrained"]
    assert "AP" in rows[0]["spread"]
    assert "8 training; voc.zip, test: 4 test; classes: ball, bar, box" in out
    assert "1 steps of 2 images" in out
    with pytest.raises(
        ValueError, match="--voc, --coco: exactly one of them is required; give the images as"
    ):
        command.main([str(run.path)])
    options = command.build_parser().parse_args([str(run.path), "--protocol", "voc_c4"])
    assert command.choose_protocol(options) == PROTOCOLS["voc_c4"]


def test_a_vit_is_refused():
    vit = timm.create_model("test_vit", num_classes=0)
    assert error_message(detectors.check_backbone, vit, "test_vit") == (
        "backbone.name: detection needs a timm ResNet with the stages layer1 to layer4, but "
        "test_vit has no such stages; evaluate it with eval.linear"
    )
