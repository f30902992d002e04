"""Alignment and uniformity against section 4.1 of the paper, pair by pair as in the authors' code.

https://github.com/ssnl/align_uniform/blob/master/align_uniform/__init__.py
"""

import math

import contract
import pytest
import torch

from ssl_pretrain.losses.uniformity import log_mean_gaussian
from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 4]}
OPTIM = OptimConfig(
    name="sgd", base_lr=1.0, warmup_epochs=0.0, weight_decay=1e-4, exclude_by="none"
)


def plain_loss(method, images):
    z = contract.unit_rows(method.projector(method.backbone(torch.cat(images.views))))
    n = len(images)
    loss = sum((z[i] - z[i + n]).square().sum() for i in range(n)) / n
    for view in (z[:n], z[n:]):
        gaussians = [
            torch.exp(-2 * (view[i] - view[j]).square().sum()) for i in range(n) for j in range(i)
        ]
        loss = loss + torch.log(sum(gaussians) / len(gaussians)) / 2
    return loss


def test_one_step_is_the_authors():
    method, images = contract.build("align_uniform"), contract.random_batch("align_uniform")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    contract.apply_plain_step(expected, OPTIM, plain_loss(expected, images), contract.ROWS / 256)
    contract.assert_same(method, expected)


def test_uniformity_of_opposite_points_and_of_a_single_point():
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert log_mean_gaussian(poles, 2.0).item() == pytest.approx(-2.0 * 4)
    one_point = torch.ones(5, 3, dtype=torch.float64) / math.sqrt(3)
    assert log_mean_gaussian(one_point, 2.0).item() == pytest.approx(0, abs=1e-12)
