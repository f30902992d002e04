"""Images of 1 to 13 channels are evaluated, drawn and exported in their own channels."""

import json
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from untrained_run import make_run

from ssl_pretrain.data.pixels import PixelFormat, WrongChannels
from ssl_pretrain.eval import attention, export, report, runs
from ssl_pretrain.eval.detection import annotations, detectron2
from ssl_pretrain.eval.exporting import onnx
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import labeled_splits
from ssl_pretrain.eval.html import nearest_images
from ssl_pretrain.eval.named_evaluations import EVALUATIONS, evaluate
from ssl_pretrain.eval.trained_run import SENTENCE_EVALUATIONS

SIZE = 16
CHANNELS = (1, 2, 4, 13)
# The others need a text tower, see test_zeroshot.py, or sentences.
OF_TEXTS = ("zeroshot", "captions", *SENTENCE_EVALUATIONS)
OF_IMAGES = [name for name in EVALUATIONS if name not in OF_TEXTS]
RARE = [pytest.param(channels, marks=pytest.mark.full) for channels in (1, 2)]
SETTINGS = {
    "attentive": {"epochs": 1},
    "linear": {"epochs": 2},
    "semi": {"epochs": 1, "percentages": [50]},
    "finetune": {"epochs": 1},
    "robustness": {"corruption_names": ["fog", "brightness", "pixelate", "jpeg_compression"]},
}


def write_images(root, channels):
    """Write a .npy per image, whose channels have different levels in each of two classes."""
    rng = np.random.default_rng(0)
    for split, num_images in (("train", 12), ("val", 4)):
        for label, name in enumerate(("a", "b")):
            folder = root / split / name
            folder.mkdir(parents=True)
            levels = 40 + 160 * ((np.arange(channels) + label) % 2)
            for number in range(num_images):
                noise = rng.integers(0, 40, (SIZE, SIZE, channels))
                np.save(folder / f"{number}.npy", (levels + noise).astype(np.uint8))
    return root


def write_masks(images):
    """Write a mask per image, whose pixels all have the class of its folder."""
    root = images.parent / "masks"
    for path in images.rglob("*.npy"):
        mask = (root / path.relative_to(images)).with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (SIZE, SIZE), "ab".index(path.parent.name)).save(mask)
    return root


@pytest.fixture(scope="module")
def folder_of_run(tmp_path_factory):
    """Return a function that writes images and an untrained run of them, once per number."""
    folders = {}

    def find(channels):
        if channels not in folders:
            root = tmp_path_factory.mktemp(f"channels_{channels}")
            folders[channels] = make_run(
                root / "run",
                "data.source=folder",
                f"data.root={write_images(root / 'images', channels)}",
                f"data.channels={channels}",
                "backbone.name=test_vit",
                "backbone.args={patch_size: 4}",
                f"views.crops.global.size={SIZE}",
                "evaluation.crop_ratio=1.0",
                "evaluation.k=5",
            )
        return folders[channels]

    return find


def load(folder, *overrides):
    return runs.load_run(folder, overrides=["parallel.precision=float32", *overrides], device="cpu")


@pytest.mark.parametrize("channels", CHANNELS)
def test_raw_pixels_and_the_random_backbone_have_all_channels(channels, folder_of_run):
    run = load(folder_of_run(channels))
    train, _ = labeled_splits(run, "a test")
    pixels, _ = features.raw_pixels(train)
    images = np.stack([train.source.read(index) for index in range(len(train))])
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).flatten(1) / 255
    assert images.shape[3] == channels
    torch.testing.assert_close(pixels, expected)
    weight = features.random_backbone(run).get_parameter("model.patch_embed.proj.weight")
    assert weight.shape[1] == channels
    assert not torch.equal(weight, run.backbone.get_parameter("model.patch_embed.proj.weight"))


@pytest.mark.parametrize("name", OF_IMAGES)
@pytest.mark.parametrize("channels", [*RARE, 4, 13])
def test_every_evaluation_measures_any_number_of_channels(channels, name, folder_of_run):
    run = load(folder_of_run(channels))
    settings = SETTINGS.get(name, {})
    if name == "segmentation":
        images = run.path.parent / "images"
        settings = {"images": images, "masks": write_masks(images)}
    result = evaluate(run, name, **settings)
    assert all(np.isfinite(list(row.values())).all() for row in result.table.values())
    if name in ("knn", "linear"):  # the levels of the channels tell the classes apart
        assert set(result.table["raw pixels"].values()) == {100.0}
    if name == "robustness":
        assert result.protocol["channels"] == (
            f"{channels}; jpeg_compression: each channel is a gray JPEG; brightness: the HSV value "
            "is the largest of the channels"
        )


COLOR_AUGMENTATIONS = {
    "finetune": (
        {"protocol": "deit", "epochs": 1},
        "source",
        "; without RandAugment, because it needs 3 channels and the images have 4",
    ),
    "attentive": (
        {"protocol": "vjepa", "epochs": 1, "rows": ["pretrained"]},
        "views",
        ", a rectangle erased with probability 0.25; without AutoAugment, because it needs 3 "
        "channels and the images have 4",
    ),
}


@pytest.mark.parametrize("name", COLOR_AUGMENTATIONS)
def test_published_protocols_say_that_they_leave_color_operations_out(name, folder_of_run):
    settings, entry, note = COLOR_AUGMENTATIONS[name]
    assert evaluate(load(folder_of_run(4)), name, **settings).protocol[entry].endswith(note)


# Segmentation reads images of its own.
READ_TRAIN = [name for name in OF_IMAGES if name != "segmentation"]
READ_VAL = [name for name in READ_TRAIN if name != "spectrum"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in [*READ_TRAIN, "report"]),
        *((name, "val") for name in READ_VAL),
    ],
)
def test_images_of_other_channels_are_refused_before_any_work(
    name, split, folder_of_run, monkeypatch
):
    other = folder_of_run(2).parent / "images"
    run = load(folder_of_run(4), f"data.{split}={other / split}")
    monkeypatch.setattr(features, "compute", None)
    work = partial(report.write, run) if name == "report" else partial(evaluate, run, name)
    with pytest.raises(WrongChannels) as error:
        work()
    assert str(error.value) == (
        f"{other / split} has 2 channels, and data.channels is 4; set data.channels=2 if all "
        "images have that many"
    )


def test_the_channels_of_a_runs_network_cannot_be_overridden(folder_of_run):
    with pytest.raises(ValueError) as error:
        load(folder_of_run(4), "data.channels=2")
    assert str(error.value) == (
        "data.channels: 2 is not 4, the number of channels that the run's network takes; leave it "
        "out, and evaluate the run on images of that many"
    )


def test_the_report_names_and_shows_the_chosen_bands(folder_of_run):
    run = load(folder_of_run(4), "log.bands=[3,2,1]")
    page = report.write(run).read_text()
    assert "The pictures show bands 3, 2, 1 as red, green, blue." in page
    bank, candidates, _ = nearest_images.open_bank_and_query_candidates(run)
    shown = load(folder_of_run(4), "log.bands=[0]")
    query = nearest_images.find_neighbors(run, bank, candidates)[0].image
    bank, candidates, _ = nearest_images.open_bank_and_query_candidates(shown)
    gray = nearest_images.find_neighbors(shown, bank, candidates)[0].image
    split = candidates.subset(np.array([0]))
    (pixels, _), *_ = split.batches()
    row, column = slice(4, 12), slice(4, 12)  # a shift of the query leaves these inside
    assert query.shape == gray.shape == (3, SIZE, SIZE)
    assert any(
        np.array_equal(query[:, row, column], moved[[3, 2, 1], row, column])
        and np.array_equal(gray[:, row, column], moved[[0, 0, 0], row, column])
        for moved in (
            features.shift(pixels, x, y)[0].numpy() for x in range(-2, 3) for y in range(-2, 3)
        )
    )


def test_attention_is_drawn_on_the_chosen_bands(folder_of_run, tmp_path):
    run = load(folder_of_run(4), "log.bands=[3,0,1]")
    file = folder_of_run(4).parent / "images/val/a/0.npy"
    _, components = attention.write_pictures(run, [file], tmp_path)
    left = np.array(Image.open(components))[:, :SIZE]
    np.testing.assert_array_equal(left, np.load(file)[..., [3, 0, 1]])
    other = folder_of_run(2).parent / "images/val/a/0.npy"
    with pytest.raises(ValueError) as error:
        attention.write_pictures(run, [other], tmp_path)
    assert str(error.value) == (
        f"{other} has 2 channels, and data.channels is 4; set data.channels=2 if all images have "
        "that many"
    )


def test_an_export_of_four_channels_is_loaded_by_timm(folder_of_run, tmp_path):
    run = load(folder_of_run(4), "data.range=[0,200]")
    folder = export.export(run, tmp_path / "export", [], force=True)
    arguments = json.loads((folder / "timm.json").read_text())
    assert arguments["input"]["channels"] == 4
    model = timm.create_model(
        "test_vit", **arguments["create_model"], checkpoint_path=str(folder / "model.safetensors")
    )
    reference = load_file(folder / "reference.safetensors")
    assert reference["images"].shape == (2, 4, SIZE, SIZE)
    export.check(model, folder)
    card = (folder / "README.md").read_text()
    assert (
        "Input: float32 (n, 4, 16, 16). Scale the values of all channels from 0 to 200 to 0 to 1, "
        "and clip them."
    ) in card


def test_torchvision_is_refused_for_four_channels(folder_of_run, tmp_path):
    run = make_run(tmp_path / "run", "data.channels=4", "backbone.name=resnet18")
    with pytest.raises(ValueError) as error:
        export.export(load(run), tmp_path / "export", ["torchvision"], force=True)
    assert str(error.value) == (
        "--format torchvision: torchvision's resnet18 takes 3 channels, but this backbone takes 4 "
        "(data.channels); load it with eval.export.load"
    )


@pytest.mark.full
def test_an_onnx_model_takes_four_channels(folder_of_run, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    run = load(folder_of_run(4))
    images = torch.randn(3, 4, SIZE, SIZE)
    onnx.export_float_model(run.backbone, images[:2], tmp_path / "model.onnx")
    with torch.no_grad():
        expected = run.backbone(images)
    torch.testing.assert_close(
        onnx.open_session(tmp_path / "model.onnx")(images), expected, atol=1e-4, rtol=1e-4
    )


def test_annotated_images_are_read_in_the_channels_of_the_run(folder_of_run):
    root = folder_of_run(4).parent / "images"
    images = annotations.AnnotatedImages("photos", [(root, "val/a/0.npy")], [], [])
    np.testing.assert_array_equal(
        images.read_as(PixelFormat(4)).read(0), np.load(root / "val/a/0.npy")
    )
    with pytest.raises(WrongChannels) as error:
        images.read_as(PixelFormat(3))
    assert str(error.value) == (
        "val/a/0.npy has 4 channels, and data.channels is 3; set data.channels=4 if all images "
        "have that many"
    )


def test_detectron2_is_refused_for_other_than_three_channels():
    with pytest.raises(ValueError) as error:
        detectron2.check_channels(4)
    assert str(error.value) == (
        "--export-detectron2: Detectron2 reads RGB images, and this backbone takes 4 channels "
        "(data.channels); train the detector here, without this option"
    )
