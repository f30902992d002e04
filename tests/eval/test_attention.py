"""eval.attention: weights equal those of timm's layer, and components those of scikit-learn."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from timm.layers import Attention
from untrained_run import make_run, write_images

from ssl_pretrain.eval import attention, runs

VIT = [
    "backbone.name=vit_tiny_patch16_224",
    "backbone.args={patch_size: 8, depth: 2, embed_dim: 24, num_heads: 3}",
]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return runs.load_run(make_run(tmp_path_factory.mktemp("runs") / "vit", *VIT), device="cpu")


@torch.no_grad()
def test_the_weights_reproduce_the_layers_output():
    torch.manual_seed(0)
    options = {"qkv_bias": True, "qk_norm": True, "norm_layer": torch.nn.LayerNorm}
    layer = Attention(12, num_heads=3, **options).eval()
    tokens = torch.randn(2, 5, 12)
    weights = attention.attention_weights(layer, tokens)
    values = layer.qkv(tokens).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)[2]
    output = layer.proj((weights @ values).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(output, layer(tokens))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))


def test_the_mask_keeps_the_fewest_patches_that_reach_the_share_of_attention():
    weights = torch.tensor([[[0.5, 0.2], [0.2, 0.1]], [[0.25, 0.25], [0.25, 0.25]]])
    assert attention.top_patches_mask(weights, 0.6).sum((1, 2)).tolist() == [2, 3]
    assert attention.top_patches_mask(weights, 0.5)[0].tolist() == [[True, False], [False, False]]


def test_the_components_are_those_of_scikit_learn():
    patches = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    ours = attention.principal_components(patches).numpy()
    flat = patches.permute(0, 2, 3, 1).reshape(-1, 6).double().numpy()
    expected = PCA(3, svd_solver="full").fit_transform(flat)
    low, high = np.quantile(expected, [0.01, 0.99], axis=0)
    stretched = ((expected - low) / (high - low)).clip(0, 1)
    theirs = stretched.reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    for channel in range(3):
        a, b = ours[:, channel], theirs[:, channel]
        # The sign of a component is arbitrary.
        assert min(np.abs(a - b).max(), np.abs(a - (1 - b)).max()) < 0.1
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) > 0.999


def test_a_vit_gets_pictures_of_attention_and_components(vit, tmp_path):
    root = write_images(tmp_path / "photos", ["a.png", "b.png"], size=40)
    paths = attention.write_pictures(
        vit, [root / "a.png", root / "b.png"], tmp_path / "out", size=32
    )
    assert [path.name for path in paths] == [
        "01_a_attention.png",
        "01_a_components.png",
        "02_b_attention.png",
        "02_b_components.png",
    ]
    assert Image.open(paths[0]).size == (32 * 5, 32 * 3)
    assert Image.open(paths[1]).size == (64, 32)


def test_pictures_of_rectangles_have_their_height_and_width(vit, tmp_path):
    root = write_images(tmp_path / "photos", ["a.png"], size=40)
    paths = attention.write_pictures(vit, [root / "a.png"], tmp_path / "out", size=[16, 40])
    assert Image.open(paths[0]).size == (40 * 5, 16 * 3)
    assert Image.open(paths[1]).size == (80, 16)


def test_a_resnet_gets_pictures_of_components_only(tmp_path):
    root = write_images(tmp_path / "photos", ["a.png"], size=40)
    run = runs.load_run(make_run(tmp_path / "resnet"), device="cpu")
    paths = attention.write_pictures(run, [root / "a.png"], tmp_path / "out", size=32)
    assert [path.name for path in paths] == ["01_a_components.png"]


def test_the_attention_is_that_of_the_class_token_in_each_head(vit):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    maps = attention.compute_maps(vit, images)
    assert maps.attention.shape == (2, 3, 2, 2)
    assert (maps.attention.sum((2, 3)) < 1).all()  # the class token attends to itself too
    assert maps.components.shape == (2, 3, 2, 2)


def test_unusable_input_is_refused(vit, tmp_path):
    root = write_images(tmp_path / "photos", ["a.png"], size=40)
    message = "--size: 30 pixels do not fit patches of 8 pixels; give a multiple of 8"
    with pytest.raises(ValueError, match=message):
        attention.write_pictures(vit, [root / "a.png"], tmp_path, size=30)
    with pytest.raises(ValueError, match=r"none\.png: no such file; give the path of an image"):
        attention.write_pictures(vit, [tmp_path / "none.png"], tmp_path)
    (tmp_path / "text.png").write_text("x")
    with pytest.raises(ValueError, match=r"text\.png"):
        attention.write_pictures(vit, [tmp_path / "text.png"], tmp_path)
