"""Hard-negative contrastive learning against its authors' arithmetic, joshr17/HCL at 7b4647fa.

https://github.com/joshr17/HCL/blob/7b4647fac271c78a2a9d619fe3f2929ecfaf33df/image/main.py
"""

import math

import contract
import torch

from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"projector_dims": [8, 4], "tau_plus": 0.05, "beta": 2.0}
OPTIM = OptimConfig(
    name="adam",
    base_lr=0.01,
    lr_scaling="none",
    warmup_epochs=0.0,
    weight_decay=1e-6,
    exclude_by="none",
)


def plain_loss(method, images):
    n, tau, tau_plus = len(images), 0.5, 0.05
    z = contract.unit_rows(
        torch.cat([method.projector(method.backbone(view)) for view in images.views])
    )
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        positive = torch.exp(z[i] @ z[(i + n) % (2 * n)] / tau)
        negatives = [torch.exp(z[i] @ z[j] / tau) for j in range(2 * n) if j % n != i % n]
        importance = [torch.exp(2.0 * negative.log()) for negative in negatives]
        weighted = sum(w * s for w, s in zip(importance, negatives))
        total = weighted / (sum(importance) / len(importance))
        debiased = (total - tau_plus * (2 * n - 2) * positive) / (1 - tau_plus)
        debiased = torch.clamp(debiased, min=(2 * n - 2) * math.exp(-1 / tau))
        loss = loss - torch.log(positive / (positive + debiased)) / (2 * n)
    return loss


def test_one_step_is_the_authors():
    method, images = contract.build("hard_negative"), contract.random_batch("hard_negative")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    contract.apply_plain_step(expected, OPTIM, plain_loss(expected, images), 0.01)
    contract.assert_same(method, expected)
