"""VICReg against its authors' arithmetic, facebookresearch/vicreg at 4e12602f.

https://github.com/facebookresearch/vicreg/blob/4e12602f/main_vicreg.py
"""

import contract
import pytest
import torch

from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 8, 5]}
OPTIM = OptimConfig(
    name="lars", base_lr=0.5, warmup_epochs=0.0, weight_decay=1e-6, momentum_convention="popular"
)


def plain_loss(method, images):
    """25 mse + 25 hinge / 2 over both views + covariances, element by element."""
    z = [method.projector(method.backbone(view)) for view in images.views]
    n, dim = z[0].shape
    differences = [z[0][i, d] - z[1][i, d] for i in range(n) for d in range(dim)]
    invariance = sum(difference**2 for difference in differences) / (n * dim)
    variance = covariance = torch.zeros((), dtype=torch.float64)
    for view in z:
        centered = [row - sum(view) / n for row in view]
        for i in range(dim):
            for j in range(dim):
                c = sum(row[i] * row[j] for row in centered) / (n - 1)
                if i == j:
                    variance = variance + torch.clamp(1 - (c + 1e-4).sqrt(), min=0) / dim / 2
                else:
                    covariance = covariance + c**2 / dim
    return 25 * invariance + 25 * variance + covariance


def test_one_step_is_the_authors():
    method, images = contract.build("vicreg"), contract.random_batch("vicreg")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    contract.apply_plain_step(
        expected, OPTIM, plain_loss(expected, images), 0.5 * contract.ROWS / 256
    )
    contract.assert_same(method, expected)


def test_collapsed_embeddings_cost_the_hinge_alone():
    ones = torch.ones(6, 4, dtype=torch.float64)
    loss, logs = contract.build("vicreg").loss({"z_a": ones, "z_b": ones}, {})
    assert loss.item() == pytest.approx(25 * (1 - 0.01))
    assert logs["covariance"].item() == 0
    assert logs["invariance"].item() == 0
