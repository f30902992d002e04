"""Detection: data sets as they are written, both detectors, and what the command keeps."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import run_ranks
from made_run import make_run
from PIL import Image
from torch import nn

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import runs
from ssl_pretrain.eval.detection import __main__ as command
from ssl_pretrain.eval.detection import annotations as images
from ssl_pretrain.eval.detection import detectors, metrics, training

CPU = torch.device("cpu")
COLOURS = {"ball": (220, 40, 40), "box": (40, 200, 60), "bar": (60, 80, 230)}
TINY = replace(
    training.PROTOCOLS["small"], steps=3, warmup_steps=0, batch=2, short_sides=(64, 80), max_side=128, pyramid_channels=16, head_dim=16,
    proposals=(50, 20, 50, 20), regions=16, precise_batches=1,
)  # fmt: skip
XML = "<annotation><size><width>96</width><height>72</height></size>{}</annotation>"
OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def picture(number: int) -> tuple[np.ndarray, list[tuple[str, int, int, int, int]]]:
    """Grey noise with three coloured rectangles; (name, left, top, right, bottom) as edges."""
    generator = np.random.default_rng(number)
    pixels = generator.integers(90, 140, (72, 96, 3), dtype=np.uint8)
    placed = []
    for column, (name, colour) in enumerate(COLOURS.items()):
        width, height = generator.integers(14, 28, 2)
        left, top = (
            32 * column + generator.integers(0, 32 - width + 1),
            generator.integers(0, 72 - height),
        )
        pixels[top : top + height, left : left + width] = colour
        placed.append((name, int(left), int(top), int(left + width), int(top + height)))
    return pixels, placed


def write_voc(root, count: int = 8, wrapped: str = "DATA/"):
    """A zip in Pascal VOC's layout; a picture's box counts pixels from 1."""
    with zipfile.ZipFile(root, "w") as archive:
        for number in range(count):
            pixels, placed = picture(number)
            path = root.parent / "picture.png"
            Image.fromarray(pixels).save(path)
            archive.writestr(f"{wrapped}JPEGImages/{number}.png", path.read_bytes())
            objects = "".join(
                OBJECT.format(name, 0, left + 1, top + 1, right, bottom)
                for name, left, top, right, bottom in placed
            )
            archive.writestr(f"{wrapped}Annotations/{number}.xml", XML.format(objects))
        for split, numbers in (
            ("trainval", range(count)),
            ("test", range(count // 2)),
            ("none", []),
        ):
            archive.writestr(
                f"{wrapped}ImageSets/Main/{split}.txt", "".join(f"{number}\n" for number in numbers)
            )
    return root


def write_coco(folder, count: int = 4):
    """The same pictures as COCO's JSON with polygons; category ids have gaps."""
    folder.mkdir()
    ids, entries, annotations = {"ball": 3, "box": 7, "bar": 20}, [], []
    for number in range(count):
        pixels, placed = picture(number)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        entries.append(
            {"id": 100 + number, "file_name": f"{number}.png", "height": 72, "width": 96}
        )
        for name, left, top, right, bottom in placed:
            polygon = [left, top, right, top, right, bottom, left, bottom]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 100 + number, "category_id": ids[name], "iscrowd": 0, "segmentation": [polygon],
                 "bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            )  # fmt: skip
    path = folder / "annotations.json"
    path.write_text(
        json.dumps(
            {
                "images": entries,
                "annotations": annotations,
                "categories": [{"id": i, "name": n} for n, i in ids.items()],
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def voc_zip(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc") / "voc.zip")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.load_run(make_run(tmp_path_factory.mktemp("runs") / "made"), device="cpu")


def told(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def test_voc_boxes_are_edges_from_zero_and_labels_from_one(voc_zip):
    found = images.voc(voc_zip, "trainval")
    assert found.classes == ["ball", "bar", "box"] and len(found) == 8
    for number in range(8):
        pixels, placed = picture(number)
        np.testing.assert_array_equal(found.read(number), pixels)
        assert found.objects[number].boxes.tolist() == [
            [float(edge) for edge in one[1:]] for one in placed
        ]
        assert [found.classes[label - 1] for label in found.objects[number].labels] == [
            one[0] for one in placed
        ]
    left, top, right, bottom = found.objects[0].boxes[0].astype(int)
    assert (found.read(0)[top:bottom, left:right] == COLOURS["ball"]).all()
    assert len(pickle.loads(pickle.dumps(found)).take([3, 1])) == 2


def test_coco_and_voc_say_the_same(voc_zip, tmp_path):
    path = write_coco(tmp_path / "coco")
    ours, theirs = (
        images.coco(path, path.parent),
        images.voc(voc_zip, "test", ["ball", "box", "bar"]),
    )
    assert ours.classes == theirs.classes and ours.ids == [100, 101, 102, 103]
    for a, b in zip(ours.objects, theirs.objects):
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.labels, b.labels)
    drawn = training.masks(ours.objects[0].segments, 72, 96)
    left, top, right, bottom = ours.objects[0].boxes[0].astype(int)
    assert drawn[0, top:bottom, left:right].all() and drawn[0].sum() == (right - left) * (
        bottom - top
    )


def test_mistakes_in_data_are_told(voc_zip, tmp_path):
    assert (
        told(images.voc, voc_zip, "val")
        == f"{voc_zip}: ImageSets/Main has no 'val'; there are: none, test, trainval"
    )
    assert (
        told(images.voc, voc_zip, "none")
        == f"{voc_zip}: ImageSets/Main/none.txt lists no image; give a split that has some"
    )
    assert told(images.voc, voc_zip, "test", ["ball", "box"]) == (
        f"{voc_zip}: 'test' has boxes of bar, not among the classes ball, box; name them in --classes"
    )
    assert told(images.voc, tmp_path, "test").startswith(
        f"{tmp_path}: has no ImageSets/Main; Pascal VOC's layout is Annotations/"
    )
    empty = tmp_path / "empty"
    for name, text in (
        ("Annotations/0.xml", XML.format("")),
        ("ImageSets/Main/test.txt", "0\n"),
        ("JPEGImages/0.png", ""),
    ):
        (empty / name).parent.mkdir(parents=True, exist_ok=True)
        (empty / name).write_text(text)
    assert (
        told(images.voc, empty, "test")
        == f"{empty}: none of the 1 images of 'test' has a box in its annotation; is it the right split?"
    )
    without = images.voc(empty, "test", ["ball"])
    assert (
        told(without.for_training)
        == "empty, test: none of its 1 images has a box to learn from; are the annotations those of these images?"
    )
    path = write_coco(tmp_path / "coco")
    assert told(images.coco, path, "", ["cat"]) == (
        f"{path}: its categories are ball, box, bar, and those trained on cat; give files of one data set"
    )
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    assert told(images.coco, path, "") == f"{path}: has 0 images and 0 boxes; both are needed"


def test_a_box_without_area_is_left_out_and_a_difficult_one_not_trained_on():
    content = XML.format(
        OBJECT.format("ball", 0, 5, 5, 5, 4)
        + OBJECT.format("ball", 1, 1, 1, 9, 9)
        + OBJECT.format("ball", 0, 3, 3, 3, 3)
    )
    boxes, kinds, difficult = images._objects_of(content.encode(), "0")
    objects = images._kept(boxes, [1] * len(kinds), difficult)
    assert objects.boxes.tolist() == [[0, 0, 9, 9], [2, 2, 3, 3]] and objects.ignored.tolist() == [
        True,
        False,
    ]


def test_flipping_keeps_boxes_and_masks_on_their_objects():
    pixels, placed = picture(1)
    left, top, right, bottom = placed[0][1:]
    mask = torch.zeros(1, 72, 96, dtype=torch.uint8)
    mask[0, top:bottom, left:right] = 1
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    other, target = training.flipped(
        image, {"boxes": torch.tensor([[left, top, right, bottom]]).float(), "masks": mask}
    )
    x, y, end, low = target["boxes"][0].int().tolist()
    assert (
        other[:, y:low, x:end] == torch.tensor(COLOURS["ball"])[:, None, None]
    ).all() and target["masks"][0, y:low, x:end].all()


@pytest.mark.parametrize(
    ("architecture", "masks"), [("fpn", False), ("c4", False), ("c4", True), ("fpn", True)]
)
def test_each_detector_trains_its_pretrained_backbone_and_answers_in_image_pixels(
    run, tmp_path, architecture, masks
):
    path = write_coco(tmp_path / "coco")
    train = images.coco(path, path.parent)
    protocol = replace(TINY, architecture=architecture, masks=masks, norm="batch")
    model = timm.create_model("test_resnet", num_classes=0)
    model.load_state_dict(run.backbone.model.state_dict())
    detector = detectors.build(
        model, 3, architecture, masks=masks, mean=[0.5] * 3, std=[0.25] * 3, short_sides=(64, 80), max_side=128, smallest_anchor=16,
        pyramid_channels=16, head_dim=16, proposals=TINY.proposals, regions=16,
    )  # fmt: skip
    own = {id(parameter) for parameter in model.parameters()}
    assert own <= {
        id(parameter) for parameter in detector.parameters()
    }  # the same weights, none copied or left out
    losses = training.train(detector, train, protocol, 0, CPU)
    assert len(losses) == 3
    before = run.backbone.model.state_dict()
    moved = [
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    ]
    assert len(moved) == len(list(model.parameters()))
    found, sizes = training.answers(detector, train, CPU)
    assert sizes == [(72, 96)] * 4 and all(
        (each.boxes >= 0).all() and (each.boxes <= [96, 72, 96, 72]).all() for each in found
    )
    if masks:
        numbers = metrics.average_precision("coco", train.objects, found, train.classes, sizes)
        assert {"AP", "mask AP"} <= set(numbers) or not any(len(each.labels) for each in found)


def test_a_detector_that_knows_the_truth_scores_a_hundred(voc_zip, capsys):
    """Boxes, scales and the label offset agree through resizing, the heads' coding and back."""
    test = images.voc(voc_zip, "test")
    detector = detectors.build(
        timm.create_model("test_resnet", num_classes=0),
        3,
        "fpn",
        mean=[0.5] * 3,
        std=[0.25] * 3,
        short_sides=(160,),
        max_side=400,
    )

    class Oracle(nn.Module):
        """Instead of the region heads: the truth, in the resized image's pixels, as the heads would give it."""

        number = 0

        def forward(self, features, proposals, image_shapes, targets=None):
            objects = test.objects[self.number]
            self.number += 1
            scale = torch.tensor([image_shapes[0][1] / 96, image_shapes[0][0] / 72] * 2)
            return [
                {
                    "boxes": torch.from_numpy(objects.boxes) * scale,
                    "labels": torch.from_numpy(objects.labels),
                    "scores": torch.ones(len(objects)),
                }
            ], {}

    detector.roi_heads = Oracle()
    found, sizes = training.answers(detector, test, CPU)
    numbers = metrics.average_precision("coco", test.objects, found, test.classes, sizes)
    assert numbers["AP75"] == pytest.approx(100) and numbers["AP"] > 99


def test_the_learning_rate_warms_up_and_drops():
    protocol = replace(TINY, steps=24000, lr=0.02, warmup_steps=100, drops=(0.75, 22 / 24))
    rates = [
        training.rate(protocol, step) for step in (0, 50, 100, 17999, 18000, 21999, 22000, 23999)
    ]
    assert rates == pytest.approx(
        [0.00002, 0.02 * (0.001 + 0.999 / 2), 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002]
    )


def test_batches_are_a_function_of_the_step(voc_zip):
    found = images.voc(voc_zip, "trainval")
    steps = training.Steps(found, replace(TINY, batch=3), seed=1)
    (image, target), *_ = steps[5]
    again, _ = steps[5][0]
    assert (
        torch.equal(image, again)
        and image.shape == (3, 72, 96)
        and image.dtype == torch.float32
        and target["labels"].min() >= 1
    )
    seen = [number for epoch in range(3) for number in training.draws.permutation(1, epoch, 8)]
    assert len(set(seen[:8])) == 8
    expected = found.read(int(seen[15]))  # step 5 begins at place 15
    pixels = torch.from_numpy(expected).permute(2, 0, 1) / 255
    assert torch.allclose(image, pixels) or torch.allclose(image.flip(-1), pixels)


def _norms_of_this_rank(path):
    torch.manual_seed(0)
    detector = detectors.build(
        timm.create_model("test_resnet", num_classes=0), 3, "fpn", mean=[0.5] * 3, std=[0.25] * 3, short_sides=(64,), max_side=128,
        smallest_anchor=16, pyramid_channels=16, head_dim=16, proposals=TINY.proposals, regions=16,
    )  # fmt: skip
    detector = detectors.with_norm(detector, "sync", 2 // process_group.world_size())
    train = images.voc(path, "trainval")
    training.train(
        detector, train, replace(TINY, steps=1, short_sides=(64,), precise_batches=0), 0, CPU
    )
    weights = torch.cat([parameter.detach().flatten() for parameter in detector.parameters()])
    stem = dict(detector.named_buffers())["backbone.stages.stem.conv1.1.running_mean"]
    return weights, stem, len(training.answers(detector, train.take([0, 1, 2]), CPU)[0])


def test_ranks_share_their_statistics_and_their_weights(voc_zip):
    """The first norm sees the images alone, not the regions that are drawn: its statistics are those of one process."""
    (one, two), alone = (
        run_ranks(_norms_of_this_rank, voc_zip, world_size=2),
        run_ranks(_norms_of_this_rank, voc_zip, world_size=1)[0],
    )
    assert torch.equal(one[0], two[0]) and one[2] == two[2] == 3
    torch.testing.assert_close(one[1], two[1], rtol=0, atol=0)
    torch.testing.assert_close(
        one[1], alone[1], rtol=1e-5, atol=1e-6
    )  # of one step: later ones start from weights that drawn regions moved


@pytest.mark.full
def test_it_overfits_eight_images(run, voc_zip):
    """AP50 of 95 on the images it was trained on: boxes, scales and labels go the whole way."""
    train = images.voc(voc_zip, "trainval")
    protocol = replace(
        training.PROTOCOLS["small"], steps=250, batch=4, lr=0.02, short_sides=(96,), max_side=160, precise_batches=20, pyramid_channels=32,
        head_dim=64, regions=64,
    )  # fmt: skip  # objects of 19 to 37 pixels: anchors of 16 and 32 lie densely there, those of 8 put 32 on every 16th pixel
    numbers, losses = command.one(run, train, train, protocol, "random", 0)
    assert numbers["AP50"] >= 95, (numbers, losses[::25])


def test_the_command_compares_both_backbones_and_keeps_the_protocol(
    run, voc_zip, capsys, monkeypatch
):
    monkeypatch.setitem(training.PROTOCOLS, "small", TINY)
    arguments = [
        str(run.path),
        "--voc",
        str(voc_zip),
        "--device",
        "cpu",
        "--seeds",
        "0",
        "1",
        "--steps",
        "1",
        "--metric",
        "voc12",
    ]
    command.main(arguments)
    out = capsys.readouterr().out
    result = json.loads((run.path / "eval" / "detection.json").read_text())
    assert [row["features"] for row in result["rows"]] == [
        "random",
        "pretrained",
    ] and "AP" in result["rows"][0]["spread"]
    assert (
        "8 training; voc.zip, test: 4 test; classes: ball, bar, box" in out
        and "1 steps of 2 images" in out
    )
    with pytest.raises(ValueError, match="give the images: --voc ROOT"):
        command.main([str(run.path)])
    assert (
        command.protocol_of(command.parser().parse_args([str(run.path), "--protocol", "voc_c4"]))
        == training.PROTOCOLS["voc_c4"]
    )


def test_a_vit_is_refused():
    vit = timm.create_model("test_vit", num_classes=0)
    assert told(detectors.check, vit, "test_vit") == (
        "backbone.name: detection needs a ResNet of timm, with stages layer1 to layer4, and test_vit has none; judge it by eval.linear"
    )
