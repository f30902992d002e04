"""Temperature-free contrastive learning against the equation of its paper."""

import contract
import pytest
import torch

from ssl_pretrain import losses
from ssl_pretrain.losses.contrastive import plain_temperature_free
from ssl_pretrain.losses.log_odds import MAX_COSINE, log_odds, log_odds_slope
from ssl_pretrain.optim.optimizers import OptimConfig

# In 16 dimensions no cosine comes near 1, where 2 / (1 - c^2) would amplify the rounding of sums in
# a different order.
METHOD = {"projector_dims": [8, 16]}
OPTIM = OptimConfig(name="lars", base_lr=20.0, warmup_epochs=0.0, weight_decay=1e-4)


def test_one_step_is_the_papers():
    method, images = contract.build("temperature_free"), contract.random_batch("temperature_free")
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images)
    n = len(images)
    z = contract.unit_rows(expected.projector(expected.backbone(torch.cat(images.views))))
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        odds = [(1 + z[i] @ z[j]) / (1 - z[i] @ z[j]) for j in range(2 * n) if j != i]
        cosine = z[i] @ z[(i + n) % (2 * n)]
        loss = loss - torch.log((1 + cosine) / (1 - cosine) / sum(odds)) / n
    contract.apply_plain_step(expected, OPTIM, loss, 20 * contract.ROWS / 256)
    contract.assert_same(method, expected)


def test_the_plain_form_agrees():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 9, 6, dtype=torch.float64, generator=generator)
    z_a, z_b = (half.clone().requires_grad_() for half in z)
    values = [f(z_a, z_b) for f in (losses.temperature_free, plain_temperature_free)]
    gradients = [torch.autograd.grad(value, [z_a, z_b]) for value in values]
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_and_opposite_embeddings_have_finite_gradients(dtype):
    # Of the cosines between these rows some are 1, some -1 and some 0.
    z_a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=dtype, requires_grad=True)
    z_b = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=dtype, requires_grad=True)
    loss = losses.temperature_free(z_a, z_b)
    gradients = torch.autograd.grad(loss, [z_a, z_b])
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_positive_at_cosine_one_has_the_loss_of_the_clamp():
    # Each anchor has a positive at the clamped odds (1 + m) / (1 - m), and 4 negatives at odds 1.
    same = torch.eye(3, dtype=torch.float64)
    odds = (1 + MAX_COSINE) / (1 - MAX_COSINE)
    expected = torch.log(torch.tensor(1 + 4 / odds, dtype=torch.float64))
    torch.testing.assert_close(losses.temperature_free(same, same), expected, rtol=0, atol=1e-13)


def test_the_slope_is_the_derivative_and_zero_beyond_the_clamp():
    cosines = torch.tensor([-1, -0.9, 0, 0.5, 1 - 2e-6, 1 - 5e-7, 1], dtype=torch.float64)
    cosines.requires_grad_()
    (expected,) = torch.autograd.grad(log_odds(cosines).sum(), [cosines])
    slope = log_odds_slope(cosines.detach())
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=0)
    assert slope[[0, 5, 6]].tolist() == [0, 0, 0]
    assert slope[2].item() == 2
    assert log_odds_slope(torch.tensor([-torch.inf])).item() == 0  # an excluded pair
