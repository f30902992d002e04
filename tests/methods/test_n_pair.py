"""The N-pair loss against equation 7 of its paper, pair by pair.

Targets are shared and embeddings are regularized as in TensorFlow's npairs_loss.

https://github.com/tensorflow/addons/blob/v0.20.0/tensorflow_addons/losses/npairs.py
"""

import math

import contract
import pytest
import torch

from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 4], "pairs": "labels"}
OPTIM = OptimConfig(
    name="sgd", base_lr=1.0, warmup_epochs=0.0, weight_decay=1e-4, exclude_by="none"
)


def plain_loss(method, images, groups):
    a, p = (method.projector(method.backbone(view)) for view in images.views)
    loss = 0.002 / 4 * sum((row * row).sum() for row in (*a, *p)) / len(images)
    for i in range(len(images)):
        positives = [j for j in range(len(images)) if groups[j] == groups[i]]
        # For every j: log(1 + sum over others of exp(a_i p_k - a_i p_j)).
        for j in positives:
            others = sum(torch.exp(a[i] @ p[k] - a[i] @ p[j]) for k in range(len(images)) if k != j)
            loss = loss + torch.log(1 + others) / len(positives) / len(images)
    return loss


@pytest.mark.parametrize("pairs", ["labels", "views"])
def test_one_step_is_the_papers(pairs):
    method, images = contract.build("n_pair", pairs=pairs), contract.random_batch("n_pair")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    groups = images.labels if pairs == "labels" else images.indices
    contract.apply_plain_step(
        expected, OPTIM, plain_loss(expected, images, groups), contract.ROWS / 256
    )
    contract.assert_same(method, expected)


def test_the_loss_of_a_collapse_is_the_log_of_the_number_of_pairs():
    method, zeros = contract.build("n_pair"), torch.zeros(6, 4, dtype=torch.float64)
    loss, _ = method.loss({"z_a": zeros, "z_b": zeros}, {"groups": torch.arange(6)})
    assert loss.item() == pytest.approx(math.log(6))
