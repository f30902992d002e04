"""Every file in configs/ loads, names its source, builds its model and takes a reduced step."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from suites import quick_and_full

from ssl_pretrain import config, methods
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.planning import plan
from ssl_pretrain.train import train
from ssl_pretrain.views import recipe

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FILES_WITH_IMAGES = [path for path in FILES if "\nviews:" in path.read_text()]
# Number of parameters of timm's models without a classifier, by name and stem.
BACKBONE_PARAMETERS = {
    "resnet50 imagenet": 23_508_032,
    "resnet50 small": 23_500_352,
    "resnet18 small": 11_168_832,
    "vit_huge_patch14_224 imagenet": 630_762_240,
    "vit_small_patch16_224 imagenet": 21_665_664,
    "vit_large_patch16_224 imagenet": 303_301_632,
    "vit_small_patch8_224 imagenet": 21_467_520,  # at 128 pixels
    "vit_large_patch14_224 imagenet": 303_178_752,
    "resnet50_clip imagenet": 36_218_720,
    "vit_base_patch16_224 imagenet": 92_884_224,  # with attention pooling
    "test_resnet imagenet": 372_688,
    "test_resnet no_pool": 372_688,
}
# The same of networks whose width and depth are set.
SMALL_BACKBONE_PARAMETERS = {"ijepa_cifar10": 207_296, "mae_cifar10": 808_064}
# At least one file per method. Steps of the other files are in the full suite.
REPRESENTATIVES = [path for path in FILES if "imagenet" in path.stem or "digits" in path.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_names_the_source_and_the_command(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for label in ("arXiv:", "Paper's number:", "Ours:", "Hardware:", "Command:"):
        assert any(label in line for line in header), f"{path.name}: its header lacks {label!r}"
    assert any(path.name in line for line in header), f"{path.name}: its command names another file"
    assert re.match(r"[a-z0-9]+_[a-z0-9]+", path.stem)
    if "imagenet" in path.stem:
        assert any(".beton" in line and "--max-side" in line for line in header), (
            f"{path.name}: its header does not say which file it assumes"
        )


@pytest.mark.parametrize("path", FILES_WITH_IMAGES, ids=lambda path: path.stem)
def test_each_config_builds_its_real_model(path):
    run = config.load(path)
    recipe.check(run.views)
    if "embed_dim" in run.backbone.args:
        expected = SMALL_BACKBONE_PARAMETERS[path.stem]
    else:
        expected = BACKBONE_PARAMETERS[f"{run.backbone.name} {run.backbone.stem}"]
    assert backbones.count_parameters(plan.build_method_on_meta(run).backbone) == expected


def reduce_recipe(path, folder, overrides=()):
    """Return the recipe with tiny images, a tiny backbone and its method's small heads.

    The `key=value` overrides are applied to the shipped file. data.root selects other images.
    """
    run = config.load(path, overrides)
    values = config.to_dict(run)
    for crop in values["views"]["crops"].values():
        crop |= {"size": 16 if crop["size"] in (96, 98) else 32, "blur_kernel": 3}
        crop["mask"] |= {"patch_size": 4, "min_keep": 5, "context_patches": 0}  # 8 x 8 patches
    values["method"] |= methods.find(values["method"]["name"]).SMALL_CONFIG
    values["text"] |= {"captions": "class_names", "length": 16}
    values["text_encoder"] |= {"width": 32, "layers": 2, "heads": 2}
    values["log"] |= {"wandb": "off", "every_steps": 1}
    values |= {"output": str(folder / "run"), "global_batch_size": 16}
    values["data"] |= {"cache_dir": str(folder / "cache"), "num_workers": 0}
    if not config.takes_images(run):
        num_texts = len(config.text_lengths(run))
        root = str(tiny.write_texts(folder / "texts.csv", num_texts))
        values["data"] |= {"source": "texts", "root": root, "text_columns": []}
        values["text"] |= {"captions": "stored", "tokenizer": "clip"}
        values["text_encoder"]["name"] = "bert"
        return config.from_dict(values)
    values["backbone"]["init"] = "random"  # nothing is downloaded
    if values["backbone"]["name"].startswith("vit"):
        kept = ("class_token", "global_pool", "fc_norm")
        args = {key: value for key, value in values["backbone"]["args"].items() if key in kept}
        values["backbone"] |= {"name": "test_vit", "args": {"patch_size": 4, **args}}
    else:
        values["backbone"]["name"] = "test_resnet"
    values["data"] |= {
        "source": "folder",
        "subset": 0,
        "root": values["data"]["root"] or str(tiny.write_images(folder / "images")),
    }
    values["parallel"]["bn_group_images"] = "global"
    values["online"]["knn_every_epochs"] = 0
    return config.from_dict(values)


QUICK = [
    f"{name}_imagenet"
    for name in ("simclr", "moco_v3_vit", "byol", "swav", "dino", "mae", "ijepa", "cpc")
]


@pytest.mark.parametrize(
    "path",
    quick_and_full([path for path in FILES if path.stem in QUICK], FILES),
    ids=lambda path: path.stem,
)
def test_each_config_takes_a_reduced_step(path, tmp_path):
    assert train(reduce_recipe(path, tmp_path), torch.device("cpu"), stop_after=1) == 1


def test_every_method_has_a_recipe():
    method_names = {config.load(path).method.name for path in FILES}
    assert sorted(method_names) == methods.names()


def test_the_flagship_has_the_papers_batch_size_and_learning_rate():
    run = config.load(FILES[0].with_name("simclr_imagenet.yaml"))
    assert optim.scaled_lr(run.optim, run.global_batch_size) == pytest.approx(6.788, abs=5e-4)
    description = plan.describe(run, world_size=8)
    for line in (
        "embeddings per loss: 16,384 (2 views x 8,192 images); negatives per anchor: 16,382",
        "learning rate: 6.78823 (0.075 x sqrt(8192))",
        "batch norm over 8,192 images; each rank's share of 1,024 images in 1 micro-batch, "
        "on 8 ranks",
        "group adapted: 56 tensors",
        "group excluded: 111 tensors",
    ):
        assert line in description


LEARNING_RATES = {
    "barlow_twins_imagenet": 1.6,
    "byol_imagenet": 4.8,
    "dino_continued_imagenet": 1e-4,
    "dino_imagenet": 1e-3,
    "ijepa_imagenet": 1e-3,
    "mae_imagenet": 2.4e-3,
    "lejepa_imagenet": 5e-4,
    "lejepa_imagenette": 2e-3,
    "moco_cifar10": 0.06,
    "moco_imagenet": 0.03,
    "moco_v3_imagenet": 9.6,
    "moco_v3_vit_imagenet": 2.4e-3,
    "nnclr_imagenet": 4.8,
    "simsiam_imagenet": 0.1,
    "supcon_cifar10": 0.5,
    "supcon_imagenet": 9.6,
    "swav_256_imagenet": 0.6,
    "swav_imagenet": 4.8,
    "vicreg_imagenet": 1.6,
}


@pytest.mark.parametrize("stem", LEARNING_RATES)
def test_the_scaled_learning_rate_is_the_papers(stem):
    run = config.load(FILES[0].with_name(f"{stem}.yaml"))
    lr = optim.scaled_lr(run.optim, run.global_batch_size)
    assert lr == pytest.approx(LEARNING_RATES[stem])


def test_schedules_reach_the_authors_absolute_numbers():
    def rates(stem, fraction):
        run = config.load(FILES[0].with_name(f"{stem}.yaml"))
        progress = Progress(round(fraction * 1000 * run.epochs), round(1000 * run.epochs), 1000)
        return optim.rates(run.optim, progress, run.epochs, run.global_batch_size)

    assert rates("dino_imagenet", 1) == pytest.approx({"lr": 1e-6, "weight_decay": 0.4})
    assert rates("ijepa_imagenet", 0) == pytest.approx({"lr": 2e-4, "weight_decay": 0.04})
    assert rates("ijepa_imagenet", 1) == pytest.approx({"lr": 1e-6, "weight_decay": 0.4})
    for stem, fraction, expected in (
        ("swav_imagenet", 0, 0.3),
        ("swav_imagenet", 1, 0.0048),
        ("supcon_cifar10", 0, 0.01),
        ("supcon_cifar10", 1, 0.5 * 0.1**3),
        ("moco_v1_imagenet", 0.9, 0.03 * 0.01),
    ):
        assert rates(stem, fraction)["lr"] == pytest.approx(expected), (stem, fraction)


def test_the_plan_names_unusual_schedules():
    def describe(stem):
        return plan.describe(config.load(FILES[0].with_name(f"{stem}.yaml")), world_size=8)

    assert "reached after 0 epochs, times 0.1 at epochs 120, 160" in describe("moco_v1_imagenet")
    assert "weight decay 0.04 to 0.4" in describe("dino_imagenet")
    assert "weight decay 0, learning rate times 0.0015" in describe("barlow_twins_imagenet")
    simsiam = describe("simsiam_imagenet")
    assert "2,100,224 numbers, weight decay 0.0001, constant learning rate" in simsiam
    assert "group excluded" not in simsiam
