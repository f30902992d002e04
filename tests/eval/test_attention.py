"""Attention maps and component pictures: the weights are those that timm's own layer uses, the components those of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_run import make_run, write_images
from PIL import Image
from sklearn.decomposition import PCA
from timm.layers import Attention

from ssl_pretrain.eval import attention, runs

VIT = [
    "backbone.name=vit_tiny_patch16_224",
    "backbone.args={patch_size: 8, depth: 2, embed_dim: 24, num_heads: 3}",
]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return runs.load_run(make_run(tmp_path_factory.mktemp("runs") / "vit", *VIT), device="cpu")


def test_the_weights_reproduce_the_layers_output():
    torch.manual_seed(0)
    layer = Attention(
        12, num_heads=3, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm
    ).eval()
    tokens = torch.randn(2, 5, 12)
    with torch.no_grad():
        weights = attention.attention(layer, tokens)
        values = layer.qkv(tokens).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)[2]
        rebuilt = layer.proj((weights @ values).transpose(1, 2).reshape(2, 5, 12))
        torch.testing.assert_close(rebuilt, layer(tokens))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))


def test_the_mask_keeps_the_fewest_patches_that_hold_the_mass():
    weights = torch.tensor([[[0.5, 0.2], [0.2, 0.1]], [[0.25, 0.25], [0.25, 0.25]]])
    assert attention.mass_mask(weights, 0.6).sum((1, 2)).tolist() == [2, 3]
    assert attention.mass_mask(weights, 0.5)[0].tolist() == [[True, False], [False, False]]


def test_components_are_those_of_scikit_learn():
    patches = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    found = attention.components(patches)
    expected = PCA(3, svd_solver="full").fit_transform(
        patches.permute(0, 2, 3, 1).reshape(-1, 6).double().numpy()
    )
    low, high = np.quantile(expected, [0.01, 0.99], axis=0)
    expected = (
        ((expected - low) / (high - low)).clip(0, 1).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    )
    for channel in range(3):  # a component's sign is free
        ours, theirs = found[:, channel].numpy(), expected[:, channel]
        assert (
            min(np.abs(ours - theirs).max(), np.abs(ours - (1 - theirs)).max()) < 0.1
            and abs(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]) > 0.999
        )


def test_a_vit_attends_and_a_resnet_has_components_alone(vit, tmp_path):
    root = write_images(tmp_path / "photos", ["a.png", "b.png"], size=40)
    written = attention.write(vit, [root / "a.png", root / "b.png"], tmp_path / "out", size=32)
    assert [path.name for path in written] == [
        f"0{n}_{name}_{kind}.png"
        for n, name in ((1, "a"), (2, "b"))
        for kind in ("attention", "components")
    ]
    assert Image.open(written[0]).size == (32 * 5, 32 * 3) and Image.open(written[1]).size == (
        64,
        32,
    )
    resnet = runs.load_run(make_run(tmp_path / "resnet"), device="cpu")
    assert [
        path.name
        for path in attention.write(resnet, [root / "a.png"], tmp_path / "resnet_out", size=32)
    ] == ["01_a_components.png"]


def test_the_class_token_of_each_head_is_what_is_shown(vit):
    found = attention.look(
        vit,
        torch.randint(
            0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        ),
    )
    assert found.attention.shape == (2, 3, 2, 2) and bool(
        (found.attention.sum((2, 3)) < 1).all()
    )  # the rest is on itself
    assert found.components.shape == (2, 3, 2, 2)


def test_bad_input_is_said(vit, tmp_path):
    root = write_images(tmp_path / "photos", ["a.png"], size=40)
    with pytest.raises(
        ValueError, match=r"--size: 30 pixels do not fit patches of 8; give a multiple of 8"
    ):
        attention.write(vit, [root / "a.png"], tmp_path, size=30)
    with pytest.raises(ValueError, match="there is no such image"):
        attention.write(vit, [tmp_path / "none.png"], tmp_path)
    (tmp_path / "text.png").write_text("x")
    with pytest.raises(ValueError, match=r"text\.png"):
        attention.write(vit, [tmp_path / "text.png"], tmp_path)
