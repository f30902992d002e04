"""The pairwise contrastive loss against eq. 4 of its paper (no official code), pair by pair."""

import contract
import pytest
import torch

from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 4], "pairs": "labels"}
OPTIM = OptimConfig(
    name="sgd", base_lr=0.5, warmup_epochs=0.0, weight_decay=1e-4, exclude_by="none"
)


def plain_loss(method, images, groups):
    z = torch.cat([method.projector(method.backbone(view)) for view in images.views])
    positives, negatives = [], []
    for i in range(len(z)):
        for j in range(len(z)):
            distance = (z[i] - z[j]).square().sum().clamp(min=1e-24).sqrt()
            if groups[i % len(images)] != groups[j % len(images)]:
                negatives.append(torch.clamp(1 - distance, min=0) ** 2 / 2)
            elif i != j:
                positives.append(distance**2 / 2)
    return (sum(positives) / len(positives) + sum(negatives) / len(negatives)) / 2


@pytest.mark.parametrize("pairs", ["labels", "views"])
def test_one_step_is_the_papers(pairs):
    method, images = contract.build("pairwise", pairs=pairs), contract.random_batch("pairwise")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    groups = images.labels if pairs == "labels" else images.indices
    loss = plain_loss(expected, images, groups)
    contract.apply_plain_step(expected, OPTIM, loss, 0.5 * contract.ROWS / 256)
    contract.assert_same(method, expected)


def test_equal_views_of_images_0_6_apart_only_have_the_hinge_loss():
    method = contract.build("pairwise")
    z = torch.tensor([[0.0, 0.0], [0.6, 0.0]], dtype=torch.float64)
    loss, logs = method.loss({"z_a": z, "z_b": z}, {"groups": torch.tensor([0, 1])})
    assert logs["pulled"].item() == 0
    assert loss.item() == pytest.approx((1 - 0.6) ** 2 / 2 / 2)


def test_only_pairs_by_label_need_labels():
    assert contract.build("pairwise").needs_labels
    assert not contract.build("pairwise", pairs="views").needs_labels
