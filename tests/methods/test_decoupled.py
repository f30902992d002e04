"""Decoupled contrastive learning against its authors' arithmetic.

Equations 6 and 7 of the paper, and raindrop313/DCL (loss/dcl.py).
"""

import contract
import pytest
import torch

from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 4], "temperature": 0.5}
OPTIM = OptimConfig(name="lars", base_lr=20.0, warmup_epochs=0.0, weight_decay=1e-4)


def plain_loss(method, images, sigma):
    n = len(images)
    z = contract.unit_rows(method.projector(method.backbone(torch.cat(images.views))))
    loss = torch.zeros((), dtype=torch.float64)
    similarities = [torch.exp(z[i] @ z[i + n] / sigma) for i in range(n)] if sigma else []
    for start in (0, n):  # both directions, summed
        for i in range(n):
            weight = 2 - similarities[i] * n / sum(similarities) if sigma else 1
            others = [j for j in range(2 * n) if j % n != i]
            negatives = sum(torch.exp(z[start + i] @ z[j] / 0.5) for j in others)
            loss = loss + (torch.log(negatives) - weight * (z[i] @ z[i + n]) / 0.5) / n
    return loss


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_one_step_is_the_authors(sigma):
    method, images = contract.build("decoupled", sigma=sigma), contract.random_batch("decoupled")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    loss = plain_loss(expected, images, sigma)
    contract.apply_plain_step(expected, OPTIM, loss, 20 * contract.ROWS / 256)
    contract.assert_same(method, expected)
