"""Networks of timm become transformers' own classes with the same features, or are refused."""

import json

import pytest
import timm
import torch
from suites import quick_and_full
from torch import nn

from ssl_pretrain.eval.exporting import transformers_folder

TOLERANCE = 1e-5  # relative to the largest feature
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SQUARE = {"img_size": 32, "dynamic_img_size": True}
DINO = {"img_size": 28, "dynamic_img_size": True, **SMALL}
AVERAGE = {"global_pool": "avg"}
# Network, arguments, size of the views, and the class of transformers.
MAPPED = {
    "vit": ("vit_tiny_patch16_224", {**SQUARE, **SMALL}, 32, "ViTModel"),
    "vit of other views": ("vit_tiny_patch16_224", {**SQUARE, **SMALL}, 48, "ViTModel"),
    "vit of wide views": ("vit_tiny_patch16_224", {**SQUARE, **SMALL}, [32, 64], "ViTModel"),
    "vit without bias": (
        "vit_tiny_patch16_224",
        {**SQUARE, **SMALL, "qkv_bias": False},
        32,
        "ViTModel",
    ),
    "vit of patches' mean": (
        "vit_tiny_patch16_224",
        {**SQUARE, **SMALL, **AVERAGE},
        32,
        "ViTModel",
    ),
    "vit of normalized patches' mean": (
        "vit_tiny_patch16_224",
        {**SQUARE, **SMALL, **AVERAGE, "fc_norm": False},
        32,
        "ViTModel",
    ),
    "vit without class token": (
        "vit_tiny_patch16_224",
        {**SQUARE, **SMALL, **AVERAGE, "class_token": False},
        32,
        "IJepaModel",
    ),
    "vit of four channels": (
        "vit_tiny_patch16_224",
        {**SQUARE, **SMALL, "in_chans": 4},
        32,
        "ViTModel",
    ),
    "dinov2": ("vit_small_patch14_dinov2", DINO, 28, "Dinov2Model"),
    "dinov2 of other views": ("vit_small_patch14_dinov2", DINO, 56, "Dinov2Model"),
    "dinov2 of patches' mean": (
        "vit_small_patch14_reg4_dinov2",
        {**DINO, **AVERAGE},
        28,
        "Dinov2WithRegistersModel",
    ),
    "dinov2 with registers": (
        "vit_small_patch14_reg4_dinov2",
        DINO,
        28,
        "Dinov2WithRegistersModel",
    ),
    "dinov2 with a gated mlp": (
        "vit_giant_patch14_dinov2",
        {**DINO, "mlp_ratio": 16 / 3},
        28,
        "Dinov2Model",
    ),
    "resnet of basic blocks": ("resnet18", {}, 32, "ResNetModel"),
    "resnet of bottlenecks": ("resnet26", {}, 40, "ResNetModel"),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1)}, 32, "ConvNextModel"),
    "convnext of linear layers": (
        "convnext_tiny",
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
        64,
        "ConvNextModel",
    ),
    "convnext v2": ("convnextv2_atto", {"depths": (1, 1, 1, 1)}, 32, "ConvNextV2Model"),
}
# One case per class of network is in the default suite.
QUICK_CASES = (
    *("vit", "vit of patches' mean", "dinov2 with registers", "dinov2 of other views"),
    *("resnet of bottlenecks", "convnext", "convnext v2"),
)


def distinct_network(name: str, **arguments: object) -> nn.Module:
    """Return a network in which no two weights are equal, so that an exchange shows."""
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            is_scale = key.endswith(("running_var", "gamma", "norm.weight", "bn.weight"))
            value.copy_(0.5 + noise.abs() if is_scale else value + 0.2 * noise)
    return model


def view_of(size, channels: int = 3) -> dict:
    return {
        "size": size,
        "channels": channels,
        "range": [],
        "crop_ratio": 0.875,
        "interpolation": "bicubic",
        "mean": [0.4] * channels,
        "std": [0.2] * channels,
    }


@pytest.mark.parametrize("case", quick_and_full(QUICK_CASES, MAPPED))
def test_the_features_are_those_of_timm(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, arguments, size, class_name = MAPPED[case]
    model = distinct_network(name, **arguments)
    channels = arguments.get("in_chans", 3)
    assert transformers_folder.find_problem(model, size) == ""
    code = transformers_folder.write(tmp_path / "out", model, view_of(size, channels))
    loaded, report = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(loaded).__name__ == class_name
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    shape = (size, size) if isinstance(size, int) else size
    images = torch.randn(3, channels, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images)
        outputs = loaded.eval()(images, output_hidden_states=True)
        features = eval(code, {"model": loaded, "outputs": outputs})
    tolerance = TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(features, expected, rtol=0, atol=tolerance)
    if class_name == "ViTModel" and model.global_pool == "token":  # the pooler changes nothing
        torch.testing.assert_close(outputs.pooler_output, expected, rtol=0, atol=tolerance)
    if class_name.startswith("Dinov2") and model.global_pool == "token":
        torch.testing.assert_close(outputs.pooler_output, expected, rtol=0, atol=tolerance)


REFUSED = {
    "resnet18d": ({}, "has another stem than a 7x7 convolution of stride 2 and max-pooling"),
    "wide_resnet50_2": ({}, "has grouped or wide convolutions"),
    "resnext50_32x4d": ({}, "has grouped or wide convolutions"),
    "seresnet18": ({}, "has blocks of another kind"),
    "skresnet18": ({}, "has blocks of another kind"),
    "convnext_tiny_hnf": ({}, "normalizes before pooling"),
    "convnext_atto_ols": ({}, "has an overlapping stem"),
    "vit_small_patch16_dinov3": ({"depth": 1}, "has no Eva with these weights"),
    "vit_base_patch16_clip_224": ({"depth": 1}, "applies a norm before the blocks"),
    "vit_base_patch16_siglip_224": (
        {"depth": 1},
        "pools by 'map', not by its class token or the mean over patches",
    ),
    "swin_tiny_patch4_window7_224": ({}, "has no SwinTransformer with these weights"),
    "efficientnet_b0": ({}, "has no EfficientNet with these weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_does_not_have_is_named(name):
    arguments, problem = REFUSED[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **arguments)
    assert transformers_folder.find_problem(model, 224) == problem


def test_dinov2_takes_only_square_views():
    model = distinct_network("vit_small_patch14_dinov2", **DINO)
    assert transformers_folder.find_problem(model, [28, 56]) == (
        "takes views of 28 x 56, and DINOv2 only square ones"
    )


def test_the_image_processor_is_written_where_it_can_do_the_transform(tmp_path):
    model = distinct_network("resnet18")
    transformers_folder.write(tmp_path / "square", model, view_of(224))
    settings = json.loads((tmp_path / "square/preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 256}
    assert settings["resample"] == 3
    transformers_folder.write(tmp_path / "wide", model, view_of([32, 64]))
    assert not (tmp_path / "wide/preprocessor_config.json").exists()
