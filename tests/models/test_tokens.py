"""Tokens of timm networks against timm's own forward passes."""

from functools import cache

import pytest
import timm
import torch
from torch import nn

from ssl_pretrain.models import backbones, timm_networks
from ssl_pretrain.models.components import Backbone, Teacher
from ssl_pretrain.models.timm_networks import BackboneConfig

pytestmark = pytest.mark.promise

SIZE = 48
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2, "patch_size": 8}
STATIC = {"dynamic_img_size": False}
VITS = {  # every layout of prefix, positions, norms and rotary angles
    "class token": ("test_vit", SMALL),
    "static": ("test_vit", {**SMALL, **STATIC}),
    "registers": ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 4}),
    "positions of patches alone": ("vit_tiny_patch16_224", {**SMALL, "no_embed_class": True}),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "fc_norm": ("test_vit2", SMALL),
    "norm_pre": ("vit_tiny_patch16_224", {**SMALL, "pre_norm": True, "init_values": 0.1}),
    "no prefix": ("test_vit", {**SMALL, "class_token": False, "global_pool": "avg"}),
    "eva02": ("eva02_tiny_patch14_224", {**SMALL, **STATIC}),
    "eva02, dynamic": ("eva02_tiny_patch14_224", SMALL),
    "dinov3": ("vit_small_patch16_dinov3", SMALL),
    "rope": ("vit_small_patch16_rope_224", SMALL),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", {**SMALL, **STATIC}),
    "mixed rope, dynamic": ("vit_small_patch16_rope_mixed_224", SMALL),
}
MAPS = {
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": [2, 2], "num_heads": [2, 2], "embed_dim": 16, "window_size": 3},
    ),
}
EVERY_VIT = pytest.mark.parametrize("case", VITS)


@cache
def timm_computes(case):
    """Return False for timm 1.0.20, whose static mixed rotary angles are always float32."""
    name, settings = VITS[case]
    network = timm.create_model(name, num_classes=0, img_size=SIZE, **settings).double()
    try:
        network(images())
    except RuntimeError as error:
        assert "expected scalar type Float but found Double" in str(error)
        return False
    return True


def build(case, size=SIZE, **arguments):
    """Return a backbone in float64, whose weights are all random."""
    if case == "mixed rope" and not timm_computes(case):
        pytest.skip(f"timm {timm.__version__} cannot compute this network in float64")
    name, settings = (VITS | MAPS)[case]
    torch.manual_seed(0)
    config = BackboneConfig(name=name, args={**settings, **arguments})
    backbone = backbones.build(config, size).double()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone


def images(count=3, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)


def random_patches(backbone, count, num_kept):
    """Return the numbers of random patches in random order, (count, num_kept)."""
    rows, columns = backbone.grid(SIZE)
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, rows * columns, generator=generator).argsort(1)[:, :num_kept]


def all_tokens(tokens):
    return torch.cat([tokens.prefix, tokens.patches], dim=1)


@pytest.mark.parametrize("case", [*VITS, *MAPS])
def test_pooled_features_are_timms_bit_for_bit(case):
    backbone, (name, settings) = build(case), (VITS | MAPS)[case]
    size = {"img_size": SIZE} if case in VITS or case == "swin" else {}
    dynamic = {"dynamic_img_size": True} if case in VITS else {}
    network = timm.create_model(name, num_classes=0, **{**size, **dynamic, **settings}).double()
    network.load_state_dict(backbone.model.state_dict())
    backbone.eval(), network.eval()
    backbone.tokens(images())
    assert torch.equal(backbone(images()), network(images()))


@EVERY_VIT
def test_tokens_are_timms_normalized_features(case):
    backbone = build(case).eval()
    model, tokens = backbone.model, backbone.tokens(images())
    features = model.forward_features(images())
    if case in ("fc_norm", "no prefix", "eva02", "eva02, dynamic"):
        assert isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)
        features = model.fc_norm(features)
    assert torch.equal(all_tokens(tokens), features)
    rows, columns = backbone.grid(SIZE)
    assert (rows, columns) == (SIZE // backbone.patch_size,) * 2
    assert tokens.patches.shape == (3, rows * columns, backbone.token_dim)
    assert tokens.prefix.shape == (3, backbone.num_prefix_tokens, backbone.token_dim)


@EVERY_VIT
def test_tokens_of_rectangles_are_timms_in_every_order_of_the_patches(case):
    backbone = build(case, size=(24, 56)).eval()
    assert backbone.grid((24, 56)) == (3, 7)
    pictures = images(size=56)[:, :, :24]
    tokens = backbone.tokens(pictures)
    features = backbone.model.forward_features(pictures)
    if isinstance(backbone.model.norm, nn.Identity):
        features = backbone.model.fc_norm(features)
    assert torch.equal(all_tokens(tokens), features)
    order = torch.rand(3, 21, generator=torch.Generator().manual_seed(3)).argsort(1)
    shuffled = backbone.tokens(pictures, kept=order)
    torch.testing.assert_close(
        shuffled.patches, tokens.patches.gather(1, order[..., None].expand_as(tokens.patches))
    )


@EVERY_VIT
def test_kept_patches_are_timms_patch_dropout_with_the_same_indices(case, monkeypatch):
    """timm drops patches in training mode, and does not tell a VisionTransformer's caller which."""
    dropping = build(case, patch_drop_rate=0.6).train()
    backbone = build(case).train()
    backbone.load_state_dict(dropping.state_dict())
    if case == "distilled":  # timm 1.0.31 would drop the distillation token like a patch
        dropping.model.patch_drop.num_prefix_tokens = backbone.num_prefix_tokens
    views, kept = images(), random_patches(backbone, 3, 14)  # 14 of the 36 patches

    def draw(*shape, device=None):
        order = torch.arange(float(shape[1])).expand(shape).clone() + 99
        return order.scatter_(1, kept, torch.arange(14.0).expand(3, 14))

    monkeypatch.setattr(torch, "randn", draw)
    features = dropping.model.forward_features(views)
    model = backbone.model
    tokens = backbone.tokens(views, kept=kept)
    assert tokens.patches.shape[1] == 14
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else nn.Identity()
    assert torch.equal(all_tokens(tokens), norm(features))


@EVERY_VIT
def test_masked_patches_are_replaced_before_positions_are_added(case):
    backbone = build(case).eval()
    model, mask_token = backbone.model, torch.randn(backbone.token_dim, dtype=torch.float64)
    masked = torch.rand(3, 36, generator=torch.Generator().manual_seed(3)) < 0.4
    x = model.patch_embed(images())
    flat = x.reshape(3, 36, -1).clone()
    for image, patch in masked.nonzero().tolist():
        flat[image, patch] = mask_token
    x = model._pos_embed(flat.view_as(x))
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)
    for i, block in enumerate(model.blocks):
        if rope is None:
            x = block(x)
        else:
            x = block(x, rope=rope[i] if model.rope_mixed else rope)
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    tokens = backbone.tokens(images(), masked=masked, mask_token=mask_token)
    assert torch.equal(all_tokens(tokens), norm(x))
    assert not torch.equal(tokens.patches, backbone.tokens(images()).patches)


@EVERY_VIT
@pytest.mark.parametrize("normalize", [True, False])
def test_intermediate_layers_are_timms(case, normalize):
    backbone = build(case).eval()
    model = backbone.model
    tokens = backbone.tokens(images(), layers=(-1, 0), normalize=normalize)
    expected = model.forward_intermediates(
        images(), [0, 1], norm=normalize, output_fmt="NLC", intermediates_only=True
    )
    if normalize and isinstance(model.norm, nn.Identity):
        norm = model.fc_norm
    else:
        norm = nn.Identity()
    last, first = tokens.intermediate
    assert torch.equal(first.patches, norm(expected[0]))
    assert torch.equal(last.patches, norm(expected[1]))
    assert torch.equal(last.patches, tokens.patches)
    assert torch.equal(last.prefix, tokens.prefix)
    if not normalize:
        normalized = backbone.tokens(images()).patches
        assert not torch.allclose(normalized, tokens.patches)


@EVERY_VIT
def test_padding_changes_nothing(case):
    """Images with padding have the tokens of a shorter call."""
    backbone = build(case).eval()
    kept = random_patches(backbone, 3, 9)
    shorter = backbone.tokens(images(), kept=kept)
    padded = torch.cat([kept, torch.zeros(3, 4, dtype=torch.int64)], dim=1)
    valid = torch.arange(13).expand(3, 13) < 9
    tokens = backbone.tokens(images(), kept=padded, valid=valid)
    for actual, expected in (
        (tokens.patches[:, :9], shorter.patches),
        (tokens.prefix, shorter.prefix),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    without_mask = backbone.tokens(images(), kept=padded).patches[:, :9]
    assert not torch.allclose(without_mask, shorter.patches)


def test_an_image_of_padding_alone_has_finite_tokens():
    backbone = build("no prefix")
    kept, valid = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.bool)
    valid[0, 0] = True
    assert backbone.tokens(images(2), kept=kept, valid=valid).patches.isfinite().all()


@EVERY_VIT
def test_gradients_reach_the_mask_token_and_the_weights_of_every_block(case):
    backbone = build(case).train()
    mask_token = torch.zeros(backbone.token_dim, dtype=torch.float64, requires_grad=True)
    masked = torch.zeros(3, 36, dtype=torch.bool)
    masked[:, ::5] = True
    kept = random_patches(backbone, 3, 20)
    tokens = backbone.tokens(images(), masked=masked, mask_token=mask_token, kept=kept)
    tokens.patches.square().sum().backward()
    assert mask_token.grad.abs().min() > 0
    for name, parameter in backbone.model.blocks.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", ["class token", "eva02", "mixed rope, dynamic"])
def test_bfloat16_autocast_differs_by_rounding(case):
    backbone = build(case).float().eval()
    for parameter in backbone.parameters():
        parameter.data *= 0.3
    views, kept = images().float(), random_patches(backbone, 3, 9)
    masked = torch.zeros(3, 36, dtype=torch.bool)
    masked[:, ::5] = True
    options = {"masked": masked, "mask_token": torch.ones(backbone.token_dim), "kept": kept}
    options["valid"] = torch.arange(9).expand(3, 9) < 7
    exact = backbone.tokens(views, **options).patches
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone.tokens(views, **options).patches
    error = ((rounded.float() - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 2e-2


@pytest.mark.parametrize("case", ["class token", "eva02, dynamic", "dinov3", "mixed rope, dynamic"])
def test_other_sizes_than_the_built_one(case):
    backbone = build(case).eval()
    kept = torch.tensor([[8, 3, 1]])
    tokens = backbone.tokens(images(1, size=24), kept=kept)
    assert backbone.grid(24) == (3, 3)
    assert tokens.patches.shape[1] == 3
    everything = torch.arange(9).view(1, 9)
    torch.testing.assert_close(
        backbone.tokens(images(1, size=24), kept=everything).patches,
        backbone.tokens(images(1, size=24)).patches,
    )


@pytest.mark.parametrize("case", MAPS)
def test_feature_maps_give_a_token_per_position(case):
    backbone = build(case, size=96).eval()
    views = images(2, size=96)
    tokens, features = backbone.tokens(views), backbone.model.forward_features(views)
    if case == "swin":  # channels last
        features = features.permute(0, 3, 1, 2)
    rows, columns = backbone.grid(96)
    assert features.shape == (2, backbone.token_dim, rows, columns)
    assert tokens.prefix.shape == (2, 0, backbone.token_dim) and backbone.num_prefix_tokens == 0
    for row in range(rows):
        for column in range(columns):
            token = tokens.patches[:, row * columns + column]
            assert torch.equal(token, features[:, :, row, column])
    assert backbone.patch_size == 96 // rows
    maps = backbone.model.forward_intermediates(views)[1]
    first, last = backbone.tokens(views, layers=(0, -1)).intermediate
    assert torch.equal(first.patches, maps[0].flatten(2).transpose(1, 2))
    assert torch.equal(last.patches, maps[-1].flatten(2).transpose(1, 2))


def test_grids_are_known_without_weights_and_for_small_stems():
    config = BackboneConfig(name="vit_small_patch16_224")
    backbone = backbones.build_on_meta(config, 224)
    assert (backbone.grid(224), backbone.grid(96)) == ((14, 14), (6, 6))
    assert (backbone.token_dim, backbone.patch_size, backbone.num_prefix_tokens) == (384, 16, 1)
    config = BackboneConfig(name="resnet18", stem="small")
    for resnet in (backbones.build_on_meta(config, 32), backbones.build(config, 32)):
        statistics = resnet.model.bn1.num_batches_tracked.clone()
        assert (resnet.grid(32), resnet.patch_size, resnet.token_dim) == ((4, 4), 8, 512)
        assert resnet.training
        if not statistics.is_meta:
            assert resnet.model.bn1.num_batches_tracked == statistics == 0


def test_a_teacher_does_not_shift_its_rotary_positions():
    if "rope_shift_coords" not in timm_networks.constructor_arguments(VITS["dinov3"][0]):
        pytest.skip(f"timm {timm.__version__} never shifts rotary positions")
    backbone = build("dinov3", rope_shift_coords=0.5, rope_rescale_coords=2.0).train()
    teacher = Teacher(backbone=backbone).train()
    first, second = (teacher.backbone.tokens(images()).patches for _ in range(2))
    assert torch.equal(first, second)
    first, second = (backbone.tokens(images()).patches for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(
        teacher.backbone.tokens(images()).patches, backbone.eval().tokens(images()).patches
    )


class Pooled(nn.Module):
    num_features = 3

    def forward(self, views):
        return views.mean((2, 3))


VIT = BackboneConfig(name="test_vit", args=SMALL)
RELATIVE = BackboneConfig(
    name="vit_relpos_small_patch16_224", args={**SMALL, "patch_size": 16, "rel_pos_dim": 8}
)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            BackboneConfig(name="test_resnet"),
            {"kept": torch.zeros(2, 3, dtype=torch.int64)},
            "backbone.name: test_resnet has no patches that can be masked or left out; choose a "
            "vision transformer, such as vit_small_patch16_224 (also deit*, eva02* and "
            "vit_*_dinov3)",
        ),
        (
            RELATIVE,
            {},
            "backbone.name: vit_relpos_small_patch16_224 gives features of shape (2, 9, 48) "
            "instead of a map (B, channels, rows, columns), so this method cannot use it; choose "
            "a vision transformer (vit_*, deit*, eva02*), or a network such as resnet50 or "
            "convnext_tiny",
        ),
        (
            RELATIVE,
            {"layers": (-1,)},
            "backbone.name: vit_relpos_small_patch16_224 gives features of shape (2, 9, 48) "
            "instead of a map (B, channels, rows, columns), so this method cannot use it; choose "
            "a vision transformer (vit_*, deit*, eva02*), or a network such as resnet50 or "
            "convnext_tiny",
        ),
        (
            VIT,
            {"masked": torch.zeros(2, 9, dtype=torch.bool), "mask_token": torch.zeros(48)},
            "masks of 9 patches per image do not fit the 36 patches of test_vit in 48 x 48 "
            "pixels; set views.crops.*.mask.patch_size to the backbone's patch size",
        ),
        (
            VIT,
            {"layers": (2,)},
            "layer 2 does not exist: test_vit has 2 blocks, numbered 0 to 1, or -2 to -1",
        ),
        (
            BackboneConfig(name="test_resnet"),
            {"layers": (-6,)},
            "layer -6 does not exist: test_resnet has 5 feature maps, numbered 0 to 4, or -5 to -1",
        ),
        (
            BackboneConfig(name="test_vit", args={**SMALL, "patch_drop_rate": 0.5}),
            {},
            "backbone.args.patch_drop_rate: 0.5 would drop patches at random from tokens that a "
            "method needs; leave it out",
        ),
    ],
)
def test_impossible_tokens_are_refused(config, options, message):
    with pytest.raises(ValueError) as error:
        backbones.build(config, SIZE).tokens(torch.zeros(2, 3, SIZE, SIZE), **options)
    assert str(error.value) == message


def test_networks_of_the_users_without_features_are_refused():
    with pytest.raises(ValueError) as error:
        Backbone(Pooled()).tokens(torch.zeros(2, 3, 8, 8))
    assert str(error.value).startswith("backbone.name: Pooled has no forward_features, so this")


def test_patches_that_are_not_square_are_refused():
    config = BackboneConfig(name="test_vit", args={**SMALL, "patch_size": [8, 16]})
    backbone = backbones.build(config, SIZE)
    assert backbone.grid(SIZE) == (6, 3)
    with pytest.raises(ValueError) as error:
        _ = backbone.patch_size
    assert str(error.value) == (
        "backbone.args.patch_size: patches of 8 x 16 pixels are not square, as methods with "
        "patches need; set one number"
    )
