"""Blocks and positions of predictors and decoders."""

import math

import pytest
import torch
from torch import nn

from ssl_pretrain.models import backbones
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.timm_networks import BackboneConfig, timm
from ssl_pretrain.models.transformer import (
    TransformerBlocks,
    check_width,
    fix_positions,
    sine_cosine_positions,
)


def test_positions_are_sines_and_cosines_of_the_column_and_the_row():
    positions = sine_cosine_positions(3, 5, 8)
    assert positions.shape == (15, 8)
    for row in range(3):
        for column in range(5):
            angles = [place / 10000**exponent for place in (column, row) for exponent in (0, 0.5)]
            a, b, c, d = angles
            expected = [
                f(x) for pair in ((a, b), (c, d)) for f in (math.sin, math.cos) for x in pair
            ]
            assert positions[5 * row + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_a_width_that_does_not_divide_into_four_waves_is_refused():
    with pytest.raises(ValueError) as error:
        sine_cosine_positions(2, 2, 6)
    expected = "positions of sines and cosines need a width that is a multiple of 4, got 6"
    assert str(error.value) == expected


@pytest.mark.parametrize("args", [{}, {"class_token": False, "global_pool": "avg"}])
def test_fixed_positions_are_not_trained_and_leave_the_class_token_alone(args):
    settings = BackboneConfig(name="test_vit", args={"patch_size": 8, **args})
    vit = backbones.build(settings, 32).model
    fix_positions(vit)
    assert not vit.pos_embed.requires_grad
    num_prefix = vit.num_prefix_tokens
    assert torch.equal(vit.pos_embed[0, num_prefix:], sine_cosine_positions(4, 4, vit.embed_dim))
    assert not vit.pos_embed[0, :num_prefix].any()


def test_networks_without_positions_and_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError) as error:
        fix_positions(timm.create_model("vit_small_patch16_dinov3", depth=1))
    assert str(error.value) == (
        "method.vit_starts: authors fixes the positions of the patches, but "
        "vit_small_patch16_dinov3 adds none; set method.vit_starts=as_built"
    )
    check_width("method.predictor_dim", 24, 6)
    with pytest.raises(ValueError) as error:
        check_width("method.predictor_dim", 20, 6)
    assert str(error.value) == (
        "method.predictor_dim: 20 must be a multiple of 4, for the positions, and of the 6 "
        "attention heads; give a multiple of 12"
    )


def test_padding_is_not_attended_to():
    torch.manual_seed(0)
    blocks = TransformerBlocks(8, depth=2, num_heads=2).double()
    tokens, padding = torch.randn(3, 5, 8).double(), torch.randn(3, 2, 8).double()
    attn_mask = torch.tensor([True] * 5 + [False] * 2)[None, None, None]
    padded = blocks(torch.cat([tokens, padding], dim=1), attn_mask)[:, :5]
    torch.testing.assert_close(padded, blocks(tokens), rtol=0, atol=1e-14)
    assert not torch.allclose(blocks(torch.cat([tokens, padding], dim=1))[:, :5], blocks(tokens))


def test_blocks_outside_of_a_backbone_are_units_too():
    class Method(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone(timm.create_model("test_vit", depth=2))
            self.predictor = nn.Module()
            self.predictor.blocks = TransformerBlocks(8, depth=3, num_heads=2)

    names = [name for name, _ in backbones.blocks(Method())]
    expected = [f"backbone.model.blocks.{i}" for i in range(2)]
    assert names == expected + [f"predictor.blocks.{i}" for i in range(3)]
