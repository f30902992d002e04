"""Segmentation with frozen and fine-tuned backbones, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import run_ranks
from masked_folders import CLASSES, write_folders, write_sources
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torchvision.models import resnet as torchvision_resnet
from untrained_run import make_run

from ssl_pretrain.eval import results, runs, segmentation
from ssl_pretrain.eval.dense import (
    backbone_rows,
    patch_segmentation,
    segmentation_batches,
    segmenter_training,
    segmenters,
)
from ssl_pretrain.eval.dense.backbone_rows import SegmentationOptions
from ssl_pretrain.eval.dense.mask_sources import MaskSources
from ssl_pretrain.eval.dense.masked_images import VOID
from ssl_pretrain.eval.dense.patch_classifiers import LogisticRegression, NearestNeighbors
from ssl_pretrain.eval.dense.segmentation_protocols import (
    PATCH_PROTOCOLS,
    PROTOCOLS,
    TRAINING_PROTOCOLS,
)
from ssl_pretrain.eval.named_evaluations import evaluate

PATCHES = {name: {"resolution": 64} for name in PATCH_PROTOCOLS}
TRAINING = {name: {"steps": 2, "crop_size": 32, "batch_size": 3} for name in TRAINING_PROTOCOLS}
SMALL = PATCHES | TRAINING
VIT = ["backbone.name=test_vit", "backbone.args={patch_size: 8}"]
SIZE = "views.crops.global.size=32"
PIXELS = segmentation_batches.Pixels([0.5] * 3, [0.25] * 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "resnet", SIZE)


@pytest.fixture(scope="module")
def run(run_folder):
    return runs.load_run(run_folder, device="cpu")


@pytest.fixture(scope="module")
def vit_run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "vit", SIZE, *VIT)
    return runs.load_run(folder, device="cpu")


def error_message(function, *arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    return str(error.value)


def tiny(name, **changes):
    """A protocol of training that takes a second."""
    small = {"num_steps": 2, "crop_size": 32, "batch_size": 3, "window": (0, 0), "test_size": 32}
    return replace(TRAINING_PROTOCOLS[name], **(small | changes))


@pytest.mark.parametrize("name", ["linear", "capi_knn"])
def test_frozen_protocols_know_objects_by_their_color(run, data, name):
    """A backbone that returns the mean color of each patch makes the task easy."""

    class Colors(nn.Module):
        token_dim = 3

        def tokens(self, images):
            patches = nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
            return type("Tokens", (), {"patches": patches})

    protocol = PATCH_PROTOCOLS[name]
    grid = patch_segmentation.PatchGrid(run, 64)
    grid.rows = grid.columns = 16
    grid.patch_height = grid.patch_width = 4
    splits = data.open(run)
    patches = tuple(patch_segmentation.embed(run, Colors(), split, grid) for split in splits)
    scores, note = patch_segmentation.segment(patches, splits, protocol, grid, 0)
    assert scores.miou > 75, (scores, note)
    assert list(scores.class_iou) == CLASSES


def test_neighbors_vote_as_in_a_loop_over_queries():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 5, generator=generator), torch.randn(7, 5, generator=generator)
    pixels = torch.randint(3, (40, 6), generator=generator, dtype=torch.uint8)
    for k, distance in ((1, "cosine"), (3, "L2"), (30, "L2"), (90, "cosine")):
        votes = NearestNeighbors(bank, pixels, k, distance).predict(queries, 6)
        for row, query in enumerate(queries):
            if distance == "L2":
                order = (bank - query).norm(dim=1).argsort()[:k]
            else:
                order = (-nn.functional.cosine_similarity(bank, query[None])).argsort()[:k]
            expected = [np.bincount(column).argmax() for column in pixels[order].numpy().T]
            assert votes[row].tolist() == expected


@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 2]])
def test_classes_without_a_patch_are_never_predicted(labels):
    tokens = torch.eye(4).repeat(6, 1)[: 6 * len(labels)]
    pixels = torch.tensor(labels, dtype=torch.uint8).repeat(6)[:, None].expand(-1, 4)
    model = LogisticRegression(tokens, pixels, 5, 1.0, 100, 1e-4)
    logits = model.logits(tokens)
    assert logits.shape == (len(tokens), 5)
    absent = [label for label in range(5) if label not in labels]
    assert torch.isneginf(logits[:, absent]).all()
    assert torch.isfinite(logits[:, labels]).all()


def test_patches_are_cut_and_joined_without_moving_a_pixel(run):
    grid = patch_segmentation.PatchGrid(run, 64)
    labels = torch.arange(64 * 64).view(1, 64, 64)
    patches = grid.split(labels)
    assert patches.shape == (1, grid.rows * grid.columns, grid.patch_height * grid.patch_width)
    corner = labels[0, : grid.patch_height, : grid.patch_width]
    assert torch.equal(patches[0, 0], corner.flatten())
    assert torch.equal(grid.join(patches[0]), labels[0])


def test_void_values_in_the_training_and_test_masks_change_nothing(run, data, tmp_path):
    """A second data set has another value, also void, in the void pixels."""
    from PIL import Image

    numbers = []
    for value in (255, 77):
        root = write_folders(tmp_path / str(value))
        for path in (root / "masks").rglob("*.png"):
            mask = np.asarray(Image.open(path)).copy()
            mask[mask == 255] = value
            Image.fromarray(mask).save(path)
        sources = replace(
            data, images=str(root / "images"), masks=str(root / "masks"), void=(255, 77)
        )
        options = SegmentationOptions("linear", inits=["pretrained"], resolution=64)
        numbers.append(backbone_rows.compare(run, sources.open(run), options)["rows"])
    assert numbers[0] == numbers[1]


def _miou_by_protocol(folder, data, names):
    """Return the rows of protocols.

    Networks are trained in float64, in which the order of sums over ranks does not matter.
    """
    patch_segmentation.BATCH_SIZE = 4  # so that every rank has images
    for name, protocol in TRAINING_PROTOCOLS.items():
        test_size, window = min(protocol.test_size, 40), (32, 20) if protocol.window[0] else (0, 0)
        TRAINING_PROTOCOLS[name] = replace(protocol, test_size=test_size, window=window)
    rows = {}
    for name in names:
        torch.set_default_dtype(torch.float64 if name in TRAINING else torch.float32)
        run = runs.load_run(folder, overrides=["parallel.precision=float32"], device="cpu")
        options = SegmentationOptions(name, inits=["pretrained"], **SMALL[name])
        rows[name] = backbone_rows.compare(run, data.open(run), options)["rows"]
    return rows


RANK_PROTOCOLS = ["capi_knn", "finetune"]


@pytest.mark.full
def test_three_ranks_have_the_scores_of_one_process(run_folder, data):
    (alone,) = run_ranks(_miou_by_protocol, run_folder, data, RANK_PROTOCOLS, world_size=1)
    by_rank = run_ranks(_miou_by_protocol, run_folder, data, RANK_PROTOCOLS, world_size=3)
    assert by_rank == [alone] * 3


@pytest.mark.full
def test_three_ranks_have_the_scores_of_one_process_in_every_protocol(run_folder, data):
    (alone,) = run_ranks(_miou_by_protocol, run_folder, data, PROTOCOLS, world_size=1)
    by_rank = run_ranks(_miou_by_protocol, run_folder, data, PROTOCOLS, world_size=3)
    assert by_rank == [alone] * 3


def test_a_dilated_resnet_computes_what_torchvisions_does():
    theirs = torchvision_resnet.ResNet(
        torchvision_resnet.Bottleneck,
        [1, 1, 2, 2],
        replace_stride_with_dilation=[False, True, True],
    ).eval()
    ours = ResNet(Bottleneck, [1, 1, 2, 2], num_classes=0, output_stride=8).eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(weights, strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        third = theirs.layer3(theirs.layer2(theirs.layer1(x)))
        outputs = segmenters.DilatedResNet(ours).eval()(images)
        torch.testing.assert_close(outputs["aux"], third)
        torch.testing.assert_close(outputs["out"], theirs.layer4(third))
    assert outputs["out"].shape[-2:] == (8, 8)


@pytest.mark.parametrize("name", TRAINING_PROTOCOLS)
def test_pretrained_weights_are_loaded_and_new_layers_are_equal_for_both_backbones(run, name):
    protocol = TRAINING_PROTOCOLS[name]
    networks = {
        init: segmenters.build(run, 3, protocol, init, seed=4) for init in ("pretrained", "random")
    }
    pretrained = {id(v): k for k, v in networks["pretrained"].backbone.state_dict().items()}
    loaded = list(networks["pretrained"].backbone.state_dict().values())
    expected = list(run.backbone.state_dict().values())
    assert len(pretrained) == len(loaded) == len(expected)
    assert sum(v.double().sum() for v in loaded) == sum(v.double().sum() for v in expected)
    for name in ("classifier", "aux_classifier"):
        first, second = (getattr(network, name) for network in networks.values())
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    has_aux = networks["random"].aux_classifier is not None
    assert has_aux == bool(protocol.aux_weight)


def test_weights_that_do_not_fit_are_refused(run):
    other = nn.Module()
    other.model = timm.create_model("test_resnet", num_classes=0)
    other.model.layer4 = nn.Identity()
    other.find_token_problem = lambda: ""
    message = error_message(
        segmenters.build,
        replace(run, backbone=other),
        3,
        TRAINING_PROTOCOLS["finetune"],
        "pretrained",
        0,
    )
    assert message.startswith(f"{run.checkpoint_path}, for segmentation")
    assert "layer4" in message


@pytest.mark.parametrize("name", ["dinov2_linear", "finetune"])
def test_a_frozen_backbone_keeps_its_weights_and_a_fine_tuned_one_does_not(vit_run, data, name):
    """A ViT's tokens are a map, of images whose sides are not whole patches, too."""
    train, test = data.open(vit_run)
    protocol = tiny(name, crop_size=30, test_size=0)
    network = segmenters.build(vit_run, 3, protocol, "pretrained", 0)
    network, _ = segmenter_training.train(network, train, protocol, PIXELS, 0)
    segmenter_training.test(network, test, protocol, PIXELS)
    before = vit_run.backbone.state_dict()
    after = network.backbone.backbone.state_dict()
    is_same = [torch.equal(after[key], before[key]) for key in before]
    assert all(is_same) == (name == "dinov2_linear")


def test_training_batches_are_crops_with_their_masks(run, data):
    """The color of each pixel says its class, before and after scaling, flipping and cropping."""
    train, _ = data.open(run)
    protocol = tiny("moco_fcn", scales=(1.0, 1.0), crop_size=44)
    identity = segmentation_batches.Pixels([0.0] * 3, [1.0] * 3)
    batches = segmentation_batches.TrainingBatches(train, protocol, identity, 0, 9)
    images, labels = batches[5]
    assert torch.equal(images, batches[5][0])
    assert images.shape == (3, 3, 44, 44)
    assert (labels[:, 40:] == VOID).all()  # below the images, which are 40 pixels high
    red = (images[:, 0] - 220 / 255).abs() < 1e-6
    assert torch.equal(red & (labels != VOID), labels == 1)


def test_distortion_keeps_the_image_if_no_change_is_chosen_and_its_range_otherwise():
    image = torch.randint(256, (3, 8, 9), dtype=torch.uint8)
    assert torch.equal(segmentation_batches.distort(image, np.full(9, 0.9)), image)
    brighter = segmentation_batches.distort(image, np.array([0.1, 0.9, 0.9, 0.9, 1.0] + [0.9] * 4))
    assert torch.equal(brighter, (image.int() + 32).clamp(max=255).to(torch.uint8))


def test_learning_rates_follow_the_published_schedules():
    moco, dino = TRAINING_PROTOCOLS["moco_fcn"], TRAINING_PROTOCOLS["dinov2_linear"]
    steps = (0, 20_999, 21_000, 26_999, 27_000)
    factors = [segmenter_training.lr_factor(moco, step, 30_000) for step in steps]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    for step, expected in ((0, 1e-6), (750, 0.5 * 39_250 / 40_000), (20_000, 0.5)):
        factor = segmenter_training.lr_factor(dino, step, 40_000)
        assert factor == pytest.approx(expected, rel=1e-5)
    torchvision = TRAINING_PROTOCOLS["torchvision_fcn"]
    assert segmenter_training.lr_factor(torchvision, 50, 100) == pytest.approx(0.5**0.9)


def test_windows_cover_the_image_and_end_with_it():
    assert segmenter_training.window_starts(600, 512, 341) == [0, 88]
    assert segmenter_training.window_starts(512, 512, 341) == [0]
    assert segmenter_training.window_starts(400, 512, 341) == [0]
    assert segmenter_training.window_starts(1200, 512, 341) == [0, 341, 682, 688]


def test_sliding_windows_average_the_logits():
    class Shift(nn.Module):
        def forward(self, images):
            return {"out": images + images.shape[-1]}

    image = torch.randn(1, 2, 5, 9)
    torch.testing.assert_close(segmenter_training.predict(Shift(), image, (4, 3)), image + 4)


def test_dropout_depends_on_the_slot_of_an_image_and_not_on_its_batch():
    layer = segmenters.ImageDropout(0.5)
    x = torch.ones(4, 6, 3, 3)
    layer.slots = [0, 1, 2, 3]
    whole = layer(x)
    layer.slots = [1, 3]
    assert torch.equal(layer(x[:2]), whole[[1, 3]])
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    layer.step = 1
    assert not torch.equal(layer(x[:2]), whole[[1, 3]])
    assert torch.equal(layer.eval()(x), x)


def test_the_command_compares_both_backbones_and_the_result_is_a_row_of_the_report(
    run_folder, run, data, capsys
):
    flags = ["--images", data.images, "--masks", data.masks, "--classes", *CLASSES]
    settings = ["--seeds", "0", "1", "--resolution", "64", "--device", "cpu", "--protocol", "knn"]
    segmentation.main([str(run_folder), *flags, *settings])
    assert "saved to" in capsys.readouterr().out
    result = json.loads((run_folder / "eval/segmentation_knn.json").read_text())
    names = [row["features"] for row in result["rows"]]
    assert names == [
        "random, as built",
        "random, recalibrated",
        results.BETTER_RANDOM,
        "pretrained",
    ]
    assert set(result["rows"][0]["metrics"]) == {
        "mIoU",
        "pixel accuracy",
        *(f"IoU {name}" for name in CLASSES),
    }
    assert "mIoU" in result["rows"][0]["spread"]
    assert result["measure"] == "mIoU, %"
    assert result["protocol"]["source"].startswith("ours: CAPI's k-NN")
    evaluation = evaluate(
        run, "segmentation", protocol="finetune", images=data.images, masks=data.masks,
        classes=CLASSES, steps=1, batch_size=2,
    )  # fmt: skip
    assert list(evaluation.table) == ["trained from random weights", "pretrained"]
    assert evaluation.path.is_file()


def test_weights_in_a_file_are_evaluated_like_a_run(run, data, tmp_path):
    torch.save(run.backbone.model.state_dict(), tmp_path / "weights.pth")
    overrides = ["backbone.name=test_resnet", f"output={tmp_path / 'published'}"]
    published = runs.load_run(tmp_path / "weights.pth", overrides=overrides, device="cpu")
    options = SegmentationOptions("capi_knn", inits=["pretrained"], resolution=64)
    result = backbone_rows.compare(published, data.open(published), options)
    assert [row["features"] for row in result["rows"]] == ["pretrained"]
    assert (tmp_path / "published/eval/segmentation_capi_knn.json").is_file()


def test_mistakes_in_the_options_are_reported(run):
    assert error_message(MaskSources().open, run) == (
        "segmentation: needs one data set with masks; give --voc ROOT, --ade20k ROOT, or --images "
        "FOLDER with --masks FOLDER"
    )
    assert error_message(MaskSources(images="photos").open, run) == (
        "--images photos: has no masks; give their folder with --masks"
    )
    assert error_message(SegmentationOptions("fcn").adapt) == (
        "--protocol fcn: is not a protocol of segmentation; choose one of: linear, knn, "
        "capi_linear, capi_knn, dinov2_linear, torchvision_fcn, torchvision_deeplabv3, moco_fcn, "
        "finetune"
    )
    assert error_message(SegmentationOptions("knn", steps=3).adapt) == (
        "--steps: --protocol knn does not take it; leave it out or give --protocol dinov2_linear, "
        "torchvision_fcn, torchvision_deeplabv3, moco_fcn, finetune"
    )
    assert error_message(SegmentationOptions("finetune", resolution=64).adapt) == (
        "--resolution: --protocol finetune does not take it; leave it out or give --protocol "
        "linear, knn, capi_linear, capi_knn"
    )
    assert error_message(patch_segmentation.PatchGrid, run, 50) == (
        "--resolution 50: its patches are not whole for test_resnet; give a multiple of 32"
    )
    torchvision = TRAINING_PROTOCOLS["torchvision_fcn"]
    assert error_message(segmenter_training.count_steps, torchvision, 20) == (
        "--batch-size 32: there are only 20 training images; give a smaller batch"
    )
