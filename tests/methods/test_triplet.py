"""The triplet loss against FaceNet's equation 3, triplet by triplet.

Negatives are semi-hard and mined as in tensorflow/addons.

https://github.com/tensorflow/addons/blob/v0.20.0/tensorflow_addons/losses/triplet.py
"""

import contract
import pytest
import torch

from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 4], "pairs": "labels"}
OPTIM = OptimConfig(
    name="sgd", base_lr=2.0, warmup_epochs=0.0, weight_decay=1e-4, exclude_by="none"
)


def plain_loss(method, images, groups):
    z = contract.unit_rows(
        torch.cat([method.projector(method.backbone(view)) for view in images.views])
    )
    n = len(images)
    d = [[(a - b).square().sum() for b in z] for a in z]
    terms = []
    for a in range(2 * n):
        negatives = [d[a][k] for k in range(2 * n) if groups[a % n] != groups[k % n]]
        for p in range(2 * n):
            if p != a and groups[a % n] == groups[p % n]:
                farther_negatives = [x for x in negatives if x > d[a][p]]
                negative = min(farther_negatives) if farther_negatives else max(negatives)
                terms.append(torch.clamp(0.2 + d[a][p] - negative, min=0))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("pairs", ["labels", "views"])
def test_one_step_is_the_authors(pairs):
    method, images = contract.build("triplet", pairs=pairs), contract.random_batch("triplet")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    groups = images.labels if pairs == "labels" else images.indices
    loss = plain_loss(expected, images, groups)
    contract.apply_plain_step(expected, OPTIM, loss, 2 * contract.ROWS / 256)
    contract.assert_same(method, expected)


def test_the_loss_of_collapsed_embeddings_is_the_margin():
    equal_rows = torch.ones(6, 4, dtype=torch.float64)
    embeddings, targets = {"z_a": equal_rows, "z_b": equal_rows}, {"groups": torch.arange(6)}
    loss, _ = contract.build("triplet").loss(embeddings, targets)
    assert loss.item() == pytest.approx(0.2)
