"""Barlow Twins against its authors' arithmetic, facebookresearch/barlowtwins at 8e8d284c.

https://github.com/facebookresearch/barlowtwins/blob/8e8d284c/main.py
"""

from dataclasses import replace
from pathlib import Path

import contract
import pytest
import torch
from conftest import run_ranks

from ssl_pretrain.config import load
from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 8, 5]}
OPTIM = OptimConfig(
    name="lars",
    base_lr=20.0,
    warmup_epochs=0.0,
    weight_decay=1.5e-6,
    excluded_lr_ratio=0.024,
    momentum_convention="popular",
)


def plain_loss(method, images):
    """Sum (c_ii - 1)^2 + lambda c_ij^2, from embeddings normalized with the biased variance."""
    normalized = []
    for view in images.views:
        z = method.projector(method.backbone(view))
        mean = sum(z) / len(z)
        variance = sum((row - mean) ** 2 for row in z) / len(z)
        normalized.append([(row - mean) / (variance + 1e-5).sqrt() for row in z])
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            c = sum(a[i] * b[j] for a, b in zip(*normalized)) / len(images)
            loss = loss + ((c - 1) ** 2 if i == j else 0.0051 * c**2)
    return loss


def test_one_step_is_the_authors():
    method, images = contract.build("barlow_twins"), contract.random_batch("barlow_twins")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    contract.apply_plain_step(
        expected, OPTIM, plain_loss(expected, images), 20 * contract.ROWS / 256
    )
    contract.assert_same(method, expected)


def _train_with_the_authors_gradient():
    return contract.train("barlow_twins", steps=1, precision="float64", gradient_scale="authors")


def test_the_authors_gradient_is_the_true_one_divided_by_the_number_of_ranks():
    true_result = contract.train("barlow_twins", steps=1, precision="float64")
    for rank_result in run_ranks(_train_with_the_authors_gradient, world_size=3):
        torch.testing.assert_close(
            rank_result["gradients"]["projector.0.weight"],
            true_result["gradients"]["projector.0.weight"] / 3,
            rtol=1e-9,
            atol=1e-12,
        )
        assert rank_result["losses"] == pytest.approx(true_result["losses"])


def test_the_true_gradient_takes_the_authors_step_with_rescaled_decay_and_bias_rate():
    """The authors' decay is multiplied, and their bias rate divided, by their number of ranks."""
    ranks, theirs = 16, replace(OPTIM, weight_decay=0.05)
    ours = replace(theirs, weight_decay=0.05 * ranks, excluded_lr_ratio=0.024 / ranks)
    method, images = contract.build("barlow_twins"), contract.random_batch("barlow_twins")
    expected, unscaled_method = contract.copy_method(method), contract.copy_method(method)
    contract.take_step(method, ours, images)
    loss = plain_loss(expected, images) / ranks
    contract.apply_plain_step(expected, theirs, loss, 20 * contract.ROWS / 256)
    contract.assert_same(method, expected)
    contract.take_step(unscaled_method, replace(ours, weight_decay=0.05), images)
    assert contract.largest_error(unscaled_method, expected) > 1e-5  # LARS does not hide the decay


def test_the_recipe_has_the_authors_decay_and_bias_rate_for_sixteen_ranks():
    path = Path(__file__).parents[2] / "configs/barlow_twins_imagenet.yaml"
    recipe = load(path, ["data.root=/data"]).optim
    assert recipe.weight_decay == pytest.approx(16 * 1e-6)
    assert recipe.excluded_lr_ratio * recipe.base_lr == pytest.approx(0.0048 / 16)


def test_no_linear_layer_of_the_projector_has_a_bias():
    for layer in contract.build("barlow_twins").projector:
        assert not isinstance(layer, torch.nn.Linear) or layer.bias is None
