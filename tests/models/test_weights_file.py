"""The tensors of a network are found in files of the kinds that other projects publish."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from ssl_pretrain.checkpoint.initial_weights import initialize
from ssl_pretrain.models import backbones, image_size_check, weights_file
from ssl_pretrain.models.timm_networks import BackboneConfig


def build_network() -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=10)


NETWORK = build_network()
WEIGHTS = NETWORK.state_dict()
BACKBONE_WEIGHTS = {key: value for key, value in WEIGHTS.items() if not key.startswith("fc.")}
VISSL = {f"_feature_blocks.{key}": value for key, value in BACKBONE_WEIGHTS.items()}


def load_file(path: Path) -> list[str]:
    """Load a file into a backbone, check the backbone's weights, and return the notes."""
    backbone = backbones.build(BackboneConfig(name="test_resnet"), 32)
    weights, notes = weights_file.read_weights(path, "weights")
    notes += backbones.load_strict(backbone, weights, "weights")
    assert all(
        torch.equal(value, BACKBONE_WEIGHTS[key])
        for key, value in backbone.model.state_dict().items()
    )
    return notes


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (
            {"classy_state_dict": {"base_model": {"model": {"trunk": VISSL}}}},
            ["read at 'classy_state_dict.base_model.model.trunk'", "prefix '_feature_blocks.'"],
        ),
        (
            {"epoch": torch.tensor(3), "lr": torch.tensor(0.1), "state_dict": WEIGHTS},
            ["read at 'state_dict'", "left out fc.bias, fc.weight"],
        ),
        (
            torch.optim.swa_utils.AveragedModel(NETWORK).state_dict(),
            ["left out fc.bias, fc.weight, n_averaged"],
        ),
        (
            {"net": BACKBONE_WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
            ["read at 'net'"],
        ),
    ],
    ids=["deep in mappings", "beside a step count", "averaged", "under an unknown key"],
)
def test_weights_are_found_wherever_a_file_keeps_them(tmp_path, content, notes):
    torch.save(content, tmp_path / "weights.pth")
    assert load_file(tmp_path / "weights.pth") == notes


def test_the_format_is_read_from_the_content_and_not_from_the_suffix(tmp_path):
    save_file(BACKBONE_WEIGHTS, tmp_path / "weights.bin")
    torch.save(BACKBONE_WEIGHTS, tmp_path / "weights.safetensors")
    assert load_file(tmp_path / "weights.bin") == load_file(tmp_path / "weights.safetensors") == []


CONVNEXT_BLOCKS = [(8, 16, 1), (16, 24, 2), (24, 32, 1), (32, None, 1)]
TORCHVISION = {
    "vit_tiny_patch16_224": (
        lambda: VisionTransformer(
            image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=96
        ),
        {"embed_dim": 24, "depth": 2, "num_heads": 2},
    ),
    "convnext_tiny": (
        lambda: ConvNeXt([CNBlockConfig(*block) for block in CONVNEXT_BLOCKS]),
        {"dims": [8, 16, 24, 32], "depths": [1, 2, 1, 1]},
    ),
    "swin_tiny_patch4_window7_224": (
        lambda: SwinTransformer([4, 4], 8, [1, 2, 1, 1], [1, 2, 2, 2], [7, 7]),
        {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 2]},
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_weights_of_torchvision_give_the_features_of_torchvision(name):
    build, arguments = TORCHVISION[name]
    size = 32 if name.startswith("vit") else 224
    torch.manual_seed(1)
    theirs = build().eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = backbones.build(BackboneConfig(name=name, args=arguments), size).eval()
    backbones.load_strict(ours, theirs.state_dict(), "weights")
    *_, classifier = (m for m in theirs.modules() if isinstance(m, torch.nn.Linear))
    expected: list[torch.Tensor] = []
    classifier.register_forward_pre_hook(lambda module, inputs: expected.append(inputs[0]))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        theirs(images)
        torch.testing.assert_close(ours(images), expected[0].flatten(1), rtol=1e-3, atol=1e-4)


def _save_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: path.write_bytes(b""),
            "weights is not a safetensors or torch file: it is empty; download it again",
        ),
        (
            lambda path: path.write_text("<!DOCTYPE html>"),
            "weights is not a safetensors or torch file: it begins with b'<!DOCTYPE html>'; "
            "download it again",
        ),
        (
            lambda path: path.write_text("version https://git-lfs.example/spec/v1"),
            "weights is not a safetensors or torch file: it begins with "
            "b'version https://git-lfs.example/'; fetch it with git lfs pull",
        ),
        (
            lambda path: path.write_bytes(b"PK\3\4" + bytes(200)),
            "weights is truncated or damaged (File is not a zip file); download it again",
        ),
        (
            _save_torchscript,
            "weights is a TorchScript program. If you trust the file, save its tensors alone: ",
        ),
        (
            lambda path: torch.save({"a": BACKBONE_WEIGHTS, "b": BACKBONE_WEIGHTS}, path),
            "weights: the file has tensors at 'a' (90), 'b' (90); "
            "choose one with backbone.init_key",
        ),
        (
            lambda path: torch.save(list(BACKBONE_WEIGHTS.values()), path),
            "weights: no named tensors were found; the file contains a list",
        ),
        (
            lambda path: torch.save(
                BACKBONE_WEIGHTS | {"bn1.bias": BACKBONE_WEIGHTS["bn1.bias"] * torch.nan}, path
            ),
            "weights: not the weights of this backbone: invalid values (not finite, or integers "
            "instead of floating-point numbers) in bn1.bias. ",
        ),
    ],
    ids=["empty", "page", "pointer", "truncated", "program", "two places", "list", "nan"],
)
def test_files_without_the_weights_are_refused(tmp_path, write, message):
    write(tmp_path / "weights.pth")
    with pytest.raises(ValueError) as error:
        load_file(tmp_path / "weights.pth")
    assert str(error.value).startswith(message)


def test_a_folder_of_files_is_refused(tmp_path):
    save_file(BACKBONE_WEIGHTS, tmp_path / "model.safetensors")
    backbone = backbones.build(BackboneConfig(name="test_resnet"), 32)
    with pytest.raises(ValueError) as error:
        initialize(backbone, BackboneConfig(init=str(tmp_path)))
    assert str(error.value) == (
        f"backbone.init: '{tmp_path}' is a folder; give one of its files, "
        f"such as {tmp_path / 'model.safetensors'}"
    )


@pytest.mark.parametrize(
    ("name", "init", "message"),
    [
        (
            "test_resnet",
            "timm:",
            "backbone.init: 'timm:' names no weights of test_resnet; give timm:r160_in1k",
        ),
        (
            "vit_small_patch8_224",
            "timm:dinosaur",
            "backbone.init: 'timm:dinosaur' names no weights of vit_small_patch8_224; give "
            "timm:dino",
        ),
        (
            "vit_small_patch32_384",
            "timm:dino",
            "backbone.init: 'timm:dino' names no weights of vit_small_patch32_384; give "
            "timm:augreg_in21k_ft_in1k",
        ),
    ],
)
def test_a_tag_that_timm_lacks_is_refused(name, init, message):
    with pytest.raises(ValueError) as error:
        image_size_check.check(BackboneConfig(name=name, init=init), {"views.crops": 224})
    assert str(error.value) == message


def test_what_timm_resamples_in_its_own_weights_is_named():
    def notes(size, **args):
        config = BackboneConfig(name="vit_small_patch16_224", init="timm:dino", args=args)
        return initialize(backbones.build_on_meta(config, size), config)  # downloads nothing

    assert notes(224) == []
    assert notes(96) == ["positions resampled from 14 x 14 to 6 x 6 patches"]
    assert notes(96, patch_size=8) == [
        "positions resampled from 14 x 14 to 12 x 12 patches",
        "patch embedding resampled from 16 to 8 pixels",
    ]
    assert notes(112, patch_size=8) == ["patch embedding resampled from 16 to 8 pixels"]


def test_positions_and_patches_of_other_sizes_are_resampled_by_timm():
    source = backbones.build(BackboneConfig(name="test_vit"), 160)
    config = BackboneConfig(name="test_vit", args={"patch_size": 8})
    backbone = backbones.build(config, 48)
    notes = backbones.load_strict(backbone, source.state_dict(), "runs/a")
    assert notes == [
        "pos_embed resampled from (1, 101, 64) to (1, 37, 64)",
        "patch_embed.proj.weight resampled from (64, 3, 16, 16) to (64, 3, 8, 8)",
    ]
    positions = resample_abs_pos_embed(source.model.pos_embed, (6, 6), (10, 10))
    assert torch.equal(backbone.model.pos_embed, positions)
    patches = resample_patch_embed(source.model.patch_embed.proj.weight.detach(), [8, 8])
    torch.testing.assert_close(backbone.model.patch_embed.proj.weight.detach(), patches)
