"""MAE against its authors' arithmetic (facebookresearch/mae at efb2a806), image by image."""

import math
import re
from dataclasses import replace

import contract
import pytest
import torch
from torch import nn

from ssl_pretrain.methods import mae
from ssl_pretrain.models import backbones
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.views.batch import MaskSet

METHOD = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2}
OPTIM = OptimConfig(
    name="adamw",
    base_lr=0.01,
    lr_scaling="none",
    warmup_epochs=0.0,
    weight_decay=0.05,
    betas=[0.9, 0.95],
)
VIEWS = (16,)
HAS_PAIR = False
SMALL_VIT = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
NUM_PATCHES, NUM_VISIBLE = 16, 4


def BACKBONE():
    return backbones.build(BackboneConfig(name="test_vit", args=SMALL_VIT), 16)


def MASKS(rows, step):
    generator = torch.Generator().manual_seed(step)
    visible = torch.rand(rows, 1, NUM_PATCHES, generator=generator).argsort(2)[..., :NUM_VISIBLE]
    return (MaskSet("visible", 0, visible, torch.ones_like(visible, dtype=torch.bool)),)


def plain_loss(method, images):
    """Mean squared error of the authors, whose tokens are shuffled for each image."""
    vit, decoder = method.backbone.model, method.decoder
    total, count = torch.zeros((), dtype=torch.float64), 0
    for image, mask in zip(images.views[0], images.masks[0].indices[:, 0]):
        visible = mask.tolist()
        hidden = [i for i in range(NUM_PATCHES) if i not in visible]
        patches = [
            image[:, 4 * (i // 4) : 4 * (i // 4) + 4, 4 * (i % 4) : 4 * (i % 4) + 4]
            for i in range(NUM_PATCHES)
        ]
        kernel = vit.patch_embed.proj
        tokens = [
            (kernel.weight * patch).sum((1, 2, 3)) + kernel.bias + vit.pos_embed[0, 1 + i]
            for i, patch in enumerate(patches)
        ]
        class_token = vit.cls_token[0, 0] + vit.pos_embed[0, 0]
        x = torch.stack([class_token, *(tokens[i] for i in visible)])[None]
        for block in vit.blocks:
            x = block(x)
        x = decoder.embed(vit.norm(x))[0]
        restored = [
            (x[1 + visible.index(i)] if i in visible else decoder.mask_token[0, 0])
            + decoder.positions[i]
            for i in range(NUM_PATCHES)
        ]
        x = torch.stack([x[0], *restored])[None]
        for block in decoder.blocks:
            x = block(x)
        pixels = decoder.project(decoder.norm(x))[0, 1:]
        for i in hidden:
            target = torch.stack(
                [patches[i][c, y, x] for y in range(4) for x in range(4) for c in range(3)]
            )
            if method.config.normalize_pixels:
                mean = target.sum() / 48
                variance = (target - mean).square().sum() / 47
                target = (target - mean) / (variance + 1e-6).sqrt()
            total = total + (pixels[i] - target).square().sum() / 48
            count += 1
    return total / count


@pytest.mark.parametrize("normalize_pixels", [True, False])
def test_one_step_is_the_authors(normalize_pixels):
    method = contract.build("mae", normalize_pixels=normalize_pixels, vit_starts="authors")
    images, expected = contract.random_batch("mae", rows=6), contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    contract.apply_plain_step(expected, OPTIM, plain_loss(expected, images), 0.01)
    contract.assert_same(method, expected)


def test_masked_pixels_do_not_reach_the_predictions():
    method, images = contract.build("mae"), contract.random_batch("mae", rows=1)
    view = images.views[0].requires_grad_()
    method(images)["predictions"].square().sum().backward()
    grid = view.grad.abs().sum(1).unfold(1, 4, 4).unfold(2, 4, 4).sum((3, 4)).flatten()
    visible = images.masks[0].as_grid(NUM_PATCHES)[0]
    assert torch.equal(grid > 0, visible)


def test_the_weights_start_as_the_authors_do():
    torch.manual_seed(0)
    args = {"patch_size": 4, "depth": 2, "num_heads": 2, "embed_dim": 128, "mlp_ratio": 4}
    backbone = backbones.build(BackboneConfig(name="test_vit", args=args), 32)
    method = mae.Config(vit_starts="authors", decoder_dim=96, decoder_depth=1).build(backbone)
    vit, decoder = method.backbone.model, method.decoder
    for layer in (vit.blocks[0].attn.qkv, vit.blocks[1].mlp.fc1, decoder.blocks[0].attn.qkv):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert layer.bias.abs().max() == 0
    projection = vit.patch_embed.proj.weight
    bound = math.sqrt(6 / (128 + 3 * 4 * 4))  # that of a linear layer
    assert 0.99 * bound < projection.abs().max() <= bound
    for token in (vit.cls_token, decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not vit.pos_embed.requires_grad
    assert vit.pos_embed[0, 0].abs().max() == 0
    sines = [math.sin(5 / 1e4 ** (i / 32)) for i in range(3)]  # column 5 comes first
    assert vit.pos_embed[0, 1 + 8 * 2 + 5, :3].tolist() == pytest.approx(sines)
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert "decoder.positions" not in method.state_dict() and "decoder.mask_token" in trained


def test_a_prefix_of_registers_or_none_is_decoded_too():
    for args in ({"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}):
        torch.manual_seed(0)
        config = BackboneConfig(name="vit_tiny_patch16_224", args={**SMALL_VIT, **args})
        method = mae.Config(**METHOD).build(backbones.build(config, 16)).double()
        embeddings = method(contract.random_batch("mae", rows=2))
        assert embeddings["predictions"].shape == (2, NUM_PATCHES, 48)


def test_the_loss_of_a_perfect_prediction_is_zero_and_of_the_mean_about_one():
    method, images = contract.build("mae"), contract.random_batch("mae", rows=3)
    targets = method.targets(images)
    zeros = torch.zeros(3, NUM_PATCHES, 48, dtype=torch.float64)
    loss = method.loss({"predictions": zeros}, targets).loss
    assert loss.item() == pytest.approx(47 / 48, rel=1e-5)  # the variance is the unbiased one
    assert targets["masked"].sum(1).tolist() == [12, 12, 12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda batch: replace(batch, views=batch.views * 2),
            "mae: takes 1 view, got 2; set views.crops to one crop with count 1",
        ),
        (
            lambda batch: replace(batch, masks=()),
            "mae: needs the masks 'visible', which no view has; set views.crops.*.mask.kind to "
            "random or inverse_block",
        ),
    ],
)
def test_wrong_views_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        contract.build("mae")(change(contract.random_batch("mae")))


def test_a_network_without_patches_is_refused():
    with pytest.raises(ValueError) as error:
        mae.Config().build(Backbone(nn.Linear(3, 3), feature_dim=3))
    assert str(error.value) == (
        "backbone.name: Linear has no patches that can be masked or left out; choose a vision "
        "transformer, such as vit_small_patch16_224 (also deit*, eva02* and vit_*_dinov3)"
    )
