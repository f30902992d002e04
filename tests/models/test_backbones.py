import pytest
import torch

from ssl_pretrain.models import backbones
from ssl_pretrain.models.backbones import build, load_strict
from ssl_pretrain.models.timm_networks import BackboneConfig


@pytest.mark.parametrize(
    ("settings", "size", "num_parameters", "dim"),
    [
        # torchvision's 25,557,032 without the 2,049,000 of its classifier, and so on.
        (BackboneConfig(name="resnet50"), 224, 23_508_032, 2048),
        (BackboneConfig(name="resnet18", stem="small"), 32, 11_168_832, 512),
        (BackboneConfig(name="vit_small_patch16_224"), 224, 21_665_664, 384),
        (BackboneConfig(name="vit_base_patch16_224"), 224, 85_798_656, 768),
        (BackboneConfig(name="vit_large_patch16_224"), 224, 303_301_632, 1024),
        # 40 blocks, 1,012.6 million with a classifier.
        (BackboneConfig(name="vit_giant_patch14_224"), 224, 1_011_202_432, 1408),
        (BackboneConfig(name="resnet101"), 224, 42_500_160, 2048),
        (BackboneConfig(name="resnet152"), 224, 58_143_808, 2048),
        (BackboneConfig(name="wide_resnet50_2"), 224, 66_834_240, 2048),
        (BackboneConfig(name="wide_resnet101_2"), 224, 124_837_696, 2048),
    ],
)
def test_parameter_counts_are_those_of_the_papers(settings, size, num_parameters, dim):
    backbone = backbones.build_on_meta(settings, size)
    assert (backbones.count_parameters(backbone), backbone.feature_dim) == (num_parameters, dim)


@pytest.mark.parametrize(
    ("name", "num_blocks", "first_name"),
    [
        ("resnet50", 16, "model.layer1.0"),
        ("wide_resnet101_2", 33, "model.layer1.0"),
        ("vit_large_patch16_224", 24, "model.blocks.0"),
        ("vit_giant_patch14_224", 40, "model.blocks.0"),
        ("convnext_tiny", 4, "model.stages.0"),
    ],
)
def test_the_blocks_of_a_network_are_found(name, num_blocks, first_name):
    blocks = backbones.blocks(backbones.build_on_meta(BackboneConfig(name=name), 224))
    assert (len(blocks), blocks[0][0]) == (num_blocks, first_name)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("no_pool", 2), ("small", 4)])
def test_small_stems_keep_more_resolution(stem, side):
    backbone = build(BackboneConfig(name="test_resnet", stem=stem), 32).eval()
    assert backbone.model.forward_features(torch.zeros(2, 3, 32, 32)).shape[-1] == side
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, backbone.feature_dim)


def test_a_vit_accepts_the_size_of_the_views_and_smaller_crops():
    backbone = build(BackboneConfig(name="test_vit"), 64)
    for size in (64, 32):
        assert backbone(torch.zeros(2, 3, size, size)).shape == (2, backbone.feature_dim)


def test_the_last_scale_of_a_residual_block_starts_at_zero():
    block = build(BackboneConfig(name="resnet18"), 32).model.layer1[0]
    assert block.bn2.weight.abs().max() == 0
    assert block.bn1.weight.min() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            BackboneConfig(name="resnet_50"),
            "backbone.name: 'resnet_50' is not a timm model. Did you mean ",
        ),
        (
            BackboneConfig(name="test_resnet", args={"colour": 3}),
            "backbone.args: test_resnet refuses {'colour': 3}: ",
        ),
        (
            BackboneConfig(name="test_vit", stem="small"),
            "backbone.stem: no_pool and small are for ResNets, and test_vit has no convolution and "
            "max-pooling stem; use imagenet",
        ),
        (
            BackboneConfig(name="test_resnet", init="timm:nothing"),
            "backbone.init: 'timm:nothing' cannot be loaded (",
        ),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        build(settings, 32)
    assert str(error.value).startswith(message)


def assert_loads(weights, expected):
    backbone = build(BackboneConfig(name="test_resnet"), 32)
    load_strict(backbone, weights, "weights")
    assert all(torch.equal(value, expected[key]) for key, value in backbone.state_dict().items())


def test_weights_with_names_of_wrapped_modules_or_of_timm_are_loaded():
    backbone = build(BackboneConfig(name="test_resnet"), 32)
    weights = {key: value + 1 for key, value in backbone.state_dict().items()}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        assert_loads({prefix + key: value for key, value in weights.items()}, weights)
    assert_loads({key.removeprefix("model."): value for key, value in weights.items()}, weights)


def test_mismatched_weights_change_nothing_and_are_listed():
    backbone = build(BackboneConfig(name="test_resnet"), 32)
    initial_weights = {key: value.clone() for key, value in backbone.state_dict().items()}
    weights = {**initial_weights, "model.extra": torch.zeros(1), "model.bn1.weight": torch.zeros(3)}
    del weights["model.bn1.bias"]
    with pytest.raises(ValueError) as error:
        load_strict(backbone, weights, "runs/a")
    assert str(error.value) == (
        "runs/a: not the weights of this backbone: 1 missing (bn1.bias); 1 unexpected (extra); "
        "1 of another shape (bn1.weight (3,) for (32,)). Nothing was loaded; "
        "set backbone.name, backbone.stem and backbone.args as in the run that trained them"
    )
    assert all(
        torch.equal(initial_weights[key], value) for key, value in backbone.state_dict().items()
    )
