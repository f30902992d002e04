"""Networks are tried on views of the configured sizes before training starts."""

import json
from pathlib import Path

import pytest
from commands import run_modules, write_class_folders, write_config

TRAIN = "ssl_pretrain.train"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    write_class_folders(folder / "images", "train")
    path = write_config(folder, folder / "images")
    text = path.read_text().replace("stem: no_pool", "stem: imagenet")
    # A file whose method has only a name may be given another method.
    text = text.replace(
        "{name: simclr, temperature: 0.2, projector_dims: [16, 8]}", "{name: simclr}"
    )
    path.write_text(text.replace("size: 16", "size: 32"))
    return path


ERRORS = {
    ("backbone.name=vit_tiny_patch16_224", "views.crops.global.size=40"): (
        "views.crops.global.size: 40 pixels do not fit "
        "backbone.name vit_tiny_patch16_224 (patches of 16): "
        "Input height (40) should be divisible by patch size (16); sizes that fit: 32, 48, 224"
    ),
    ("backbone.name=test_resnet", "backbone.args.in_chans=4"): (
        "CONFIG: backbone.args.in_chans: 4 is not data.channels 3, the number of channels of the "
        "images; leave it out, or set data.channels=4"
    ),
    ("backbone.name=test_resnet", "backbone.args.global_pool=''"): (
        "backbone.args: test_resnet with {'global_pool': ''} "
        "returns shape (96, 1, 1) for an image, but one vector is needed; "
        "leave out global_pool, features_only and whatever else changes the output"
    ),
    ("backbone.name=test_resnet", "backbone.args.features_only=true"): (
        "backbone.args: test_resnet with {'features_only': True} "
        "returns a list for an image, but one vector is needed; "
        "leave out global_pool, features_only and whatever else changes the output"
    ),
    ("backbone.name=test_vit", "evaluation.image_size=36"): (
        "evaluation.image_size: 36 pixels do not fit backbone.name test_vit (patches of 16): "
        "Input height (36) should be divisible by patch size (16); sizes that fit: 32, 48, 160"
    ),
    ("backbone.name=vgg11", "backbone.drop_path=0.1"): (
        "backbone.drop_path: 0.1 is not possible for vgg11, which has no stochastic depth; "
        "set it to 0"
    ),
    ("backbone.name=resnet18.a1_in1k",): (
        "backbone.name: 'resnet18.a1_in1k' includes the tag of pretrained weights; "
        "give backbone.name=resnet18 backbone.init=timm:a1_in1k"
    ),
    ("views.crops.global.count=3",): (
        "simclr: takes 2 views of one size, got 3 (32, 32, 32 pixels); set views.crops.*.count"
    ),
    ("global_batch_size=1",): (
        "global_batch_size: 1 leaves simclr no other image to compare with; give 2 or more"
    ),
    ("method={name: moco, queue_size: 64}", "parallel.bn_group_images=1"): (
        "parallel.bn_group_images: 1 with global_batch_size 8 leaves batch norm one value per "
        "channel, which has no variance; give groups and batches of 2 images or more"
    ),
    ("views.crops.global.count=1000000000",): (
        "CONFIG: views.crops.global.count: 1000000000 is out of range; "
        "give a whole number >= 1 and <= 1000"
    ),
    ("optim.name=adamw", "optim.betas=[0.9]"): (
        "optim.betas: [0.9] has 1 numbers; give 2, such as [0.9, 0.999]"
    ),
    ("optim.schedule=milestones",): (
        "optim.milestones: [] leaves optim.schedule=milestones nothing to do; "
        "give epochs, such as [120, 160]"
    ),
}


@pytest.mark.parametrize("flags", [["--plan"], []], ids=["plan", "train"])
def test_settings_that_the_first_step_cannot_run_are_rejected_in_advance(config, flags):
    results = run_modules([[TRAIN, str(config), *overrides, *flags] for overrides in ERRORS])
    for message, result in zip(ERRORS.values(), results, strict=True):
        assert result == (2, "", f"error: {message.replace('CONFIG', str(config))}\n")
    assert not (config.parent / "run").exists()


NETWORKS = {
    "hidden layer": ["backbone.name=mobilenetv3_small_050"],  # a layer after the pooling
    "two poolings": ["backbone.name=test_resnet", "backbone.args.global_pool=catavgmax"],
    "head": ["backbone.name=test_mambaout"],  # a norm and a hidden layer in the head
}


def test_the_projector_fits_the_measured_width_of_the_features(config, tmp_path):
    """The first step fails if the projector is built for features of another width."""
    runs = [tmp_path / name for name in NETWORKS]
    outputs = [f"output={run}" for run in runs]
    arguments = zip(NETWORKS.values(), outputs, strict=True)
    results = run_modules(
        [[TRAIN, str(config), *overrides, output] for overrides, output in arguments]
    )
    for run, (status, _, stderr) in zip(runs, results, strict=True):
        assert status == 0, stderr
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_network_with_a_fixed_input_size_is_built_for_the_views(config, tmp_path):
    overrides = [
        "backbone.name=swin_tiny_patch4_window7_224",
        "backbone.args={embed_dim: 16, depths: [1, 1], num_heads: [2, 2]}",
    ]
    ((status, _, stderr),) = run_modules(
        [[TRAIN, str(config), *overrides, f"output={tmp_path / 'run'}"]]
    )
    assert status == 0, stderr
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 2
