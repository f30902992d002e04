"""Multipliers of the learning rate against hand-written tables of DINOv2 and MAE."""

from dataclasses import asdict

import pytest
import timm
import torch
from torch import nn

from ssl_pretrain import config as configuration
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.optim import lr_multipliers
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.planning import plan

pytestmark = pytest.mark.promise


def build_method(name: str) -> nn.Module:
    with torch.device("meta"):
        method = nn.Module()
        method.backbone = Backbone(timm.create_model(name, num_classes=0))
        method.mask_token = nn.Parameter(torch.zeros(1))
        method.predictor = nn.Module()
        method.predictor.mask_token = nn.Parameter(torch.zeros(1))
        method.predictor.blocks = nn.Sequential(nn.Linear(2, 2))
        method.teacher = nn.Module()
        method.teacher.backbone = Backbone(timm.create_model(name, num_classes=0))
    method.teacher.requires_grad_(False)
    return method


def compute(method, by_prefix=None, layer_decay=1.0, patch_embed_lr_ratio=1.0):
    return lr_multipliers.compute(
        method,
        by_prefix=by_prefix or {},
        layer_decay=layer_decay,
        patch_embed_lr_ratio=patch_embed_lr_ratio,
    )


# The factors of vit_small_patch16_224 (n = 12) and its variants, in powers of the layer decay, from
# get_vit_lr_decay_rate of facebookresearch/dinov2 at b8931f7b. MAE's get_layer_id_for_vit agrees.
VIT_EXPONENTS = {
    "mask_token": 13,
    "predictor.mask_token": 0,
    "predictor.blocks.0.weight": 0,
    "backbone.model.cls_token": 13,
    "backbone.model.reg_token": 13,
    "backbone.model.pos_embed": 13,
    "backbone.model.rope.freqs": 13,
    "backbone.model.patch_embed.proj.weight": 13,
    "backbone.model.patch_embed.proj.bias": 13,
    "backbone.model.norm.weight": 0,
    "backbone.model.norm.bias": 0,
    "backbone.model.fc_norm.weight": 0,
    "backbone.model.fc_norm.bias": 0,
    "predictor.blocks.0.bias": 0,
} | {f"backbone.model.blocks.{i}": 12 - i for i in range(12)}


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_small_patch16_rope_mixed_224",
        "eva02_tiny_patch14_224",
    ],
)
def test_layer_decay_of_vision_transformers_is_that_of_dinov2(name):
    multipliers = compute(build_method(name), layer_decay=0.9, patch_embed_lr_ratio=0.2)
    assert len(multipliers) > 100
    assert not any(key.startswith("teacher.") for key in multipliers)
    for key, multiplier in multipliers.items():
        entry = key if key in VIT_EXPONENTS else ".".join(key.split(".")[:4])
        expected = 0.9 ** VIT_EXPONENTS[entry] * (0.2 if "patch_embed" in key else 1)
        assert multiplier == expected, key


def test_layers_of_convolutional_networks_are_their_blocks():
    resnet = compute(build_method("resnet18"), layer_decay=0.5)
    assert resnet["backbone.model.conv1.weight"] == 0.5**9
    for number, block in enumerate(f"layer{i}.{j}" for i in range(1, 5) for j in range(2)):
        assert resnet[f"backbone.model.{block}.conv1.weight"] == 0.5 ** (8 - number)
    convnext = compute(build_method("convnext_tiny"), layer_decay=0.5)
    assert convnext["backbone.model.stem.0.weight"] == 0.5**19
    assert convnext["backbone.model.stages.1.downsample.0.weight"] == 0.5**15
    assert convnext["backbone.model.stages.1.blocks.0.conv_dw.weight"] == 0.5**15
    assert convnext["backbone.model.stages.3.blocks.2.conv_dw.weight"] == 0.5
    assert convnext["backbone.model.head.norm.weight"] == 1


def test_multipliers_combine_by_multiplication_and_the_longest_name_counts():
    by_prefix = {"backbone": 0.1, "backbone.model.blocks.1": 3.0, "predictor": 10.0}
    multipliers = compute(build_method("vit_small_patch16_224"), by_prefix, 0.9, 0.2)
    assert multipliers["backbone.model.norm.weight"] == 0.1
    assert multipliers["backbone.model.blocks.1.norm1.weight"] == 0.9**11 * 3.0
    assert multipliers["backbone.model.blocks.10.norm1.weight"] == 0.9**2 * 0.1
    assert multipliers["backbone.model.patch_embed.proj.bias"] == 0.9**13 * 0.2 * 0.1
    assert multipliers["predictor.mask_token"] == 10
    assert multipliers["mask_token"] == 0.9**13


def test_rates_of_groups_are_products_and_follow_the_schedules():
    torch.manual_seed(0)
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    config = OptimConfig(
        name="adamw",
        base_lr=0.2,
        warmup_epochs=0,
        excluded_lr_ratio=0.5,
        constant_lr_names=["c"],
        lr_multipliers={"b": 3.0, "c.bias": 0.25},
    )
    optimizer = optim.build(config, network)
    optim.set_rates(optimizer, config, Progress(50, 100, 1), 100, 256)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    expected = {"a.weight": 0.1, "a.bias": 0.05, "b.weight": 0.3, "b.bias": 0.15}
    assert rates == pytest.approx(expected | {"c.weight": 0.2, "c.bias": 0.025})


def test_groups_of_the_defaults_are_not_divided():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    groups = optim.parameter_groups(OptimConfig(), network)
    assert [(group["group"], group["names"], group["lr_multiplier"]) for group in groups] == [
        ("adapted", ["0.weight", "2.weight"], 1.0),
        ("excluded", ["0.bias", "1.weight", "1.bias", "2.bias"], 1.0),
    ]


@pytest.mark.parametrize("name", ["lars", "larc", "sgd", "adam", "adamw"])
def test_parameters_with_multiplier_zero_never_move(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    config = OptimConfig(name=name, base_lr=0.1, warmup_epochs=0, lr_multipliers={"0": 0.0})
    optimizer = optim.build(config, network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for step in range(3):
        optim.set_rates(optimizer, config, Progress(step, 4, 1), 4, 256)
        optimizer.zero_grad()
        network(torch.randn(4, 3)).square().sum().backward()
        optim.step_if_finite(optimizer)
    moved = {key for key, value in network.state_dict().items() if not value.equal(before[key])}
    assert moved == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"by_prefix": {"predictr": 2.0}},
            "optim.lr_multipliers: no trained parameter is 'predictr' or below it; "
            "did you mean 'predictor'?",
        ),
        (
            {"by_prefix": {"teacher": 2.0}},
            "optim.lr_multipliers: no trained parameter is 'teacher' or below it; "
            "give names such as backbone, mask_token, predictor",
        ),
        (
            {"by_prefix": {"back": 2.0}},
            "optim.lr_multipliers: no trained parameter is 'back' or below it; "
            "did you mean 'backbone'?",
        ),
        (
            {"patch_embed_lr_ratio": 0.2},
            "optim.patch_embed_lr_ratio: 0.2 is for networks with a patch embedding, and no "
            "trained parameter has patch_embed in its name; set it to 1",
        ),
    ],
)
def test_a_multiplier_without_parameters_is_refused(settings, message):
    with pytest.raises(ValueError) as error:
        compute(build_method("resnet18"), **settings)
    assert str(error.value) == message


def test_layer_decay_of_a_network_without_known_layers_is_refused():
    with pytest.raises(ValueError) as error:
        compute(nn.ModuleDict({"backbone": nn.Linear(2, 2)}), layer_decay=0.9)
    assert str(error.value) == (
        "optim.layer_decay: 0.9 is for networks of timm whose parameters are assigned to blocks "
        "(group_matcher), and this method trains none; set it to 1, or give optim.lr_multipliers"
    )


def test_names_with_dots_survive_yaml_and_the_manifest(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: {name: simclr}\n")
    override = "optim.lr_multipliers={backbone.model.layer1: 0.5, projector: 2}"
    config = configuration.load(path, [override])
    expected = {"backbone.model.layer1": 0.5, "projector": 2.0}
    assert config.optim.lr_multipliers == expected
    path.write_text(configuration.to_yaml(config))
    assert configuration.load(path).optim.lr_multipliers == expected
    assert configuration.from_dict(asdict(config)).optim.lr_multipliers == expected
    configuration.check_resume_config(asdict(config), config, str(tmp_path))


def test_a_negative_multiplier_is_refused():
    with pytest.raises(ValueError) as error:
        optim.check(OptimConfig(lr_multipliers={"backbone": -1.0}))
    assert str(error.value) == (
        "optim.lr_multipliers.backbone: -1 is out of range; give a finite number >= 0"
    )


def test_the_plan_prints_the_multipliers():
    config = configuration.load(
        "dino_imagenet", ["optim.layer_decay=0.9", "optim.lr_multipliers={head: 2}"]
    )
    lines = plan.describe(config).splitlines()
    tokens = next(text for text in lines if "backbone.model.cls_token, " in text)
    assert lines[lines.index(tokens) - 1].endswith("learning rate times 0.254187")
    heads = next(text for text in lines if "head.mlp.0.weight, " in text)
    assert lines[lines.index(heads) - 1].endswith("learning rate times 2")
