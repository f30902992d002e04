"""LeJEPA against its authors' arithmetic, rbalestr-lab/lejepa at eddffdd8.

https://github.com/rbalestr-lab/lejepa/blob/eddffdd8/MINIMAL.md
"""

import math
from pathlib import Path

import contract
import pytest
import torch

from ssl_pretrain import config, losses
from ssl_pretrain.losses import characteristic
from ssl_pretrain.losses.random_slices import random_slices
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress

VIEWS = (9, 9, 7, 7, 7)
METHOD = {
    "embedding_dim": 7,
    "projector_dims": [8, 8, 5],
    "num_slices": 6,
    "sigreg_weight": 0.1,
}
OPTIM = OptimConfig(
    name="adamw", base_lr=0.05, warmup_epochs=0.0, weight_decay=0.05, exclude_by="none"
)
SCHEDULED = {"slice_step"}
CIFAR10 = Path(__file__).parents[2] / "configs/methods_cifar10_cpu.yaml"


def plain_statistic(x):
    """Return the statistic of one projection, from sums over images and points t = 3 k / 16."""
    n, total = len(x), 0.0
    for k in range(17):
        t = 3 * k / 16
        phi = math.exp(-(t**2) / 2)
        cosine = sum(torch.cos(t * value) for value in x) / n
        sine = sum(torch.sin(t * value) for value in x) / n
        weight = 3 / 16 * phi * (1 if k in (0, 16) else 2)
        total = total + weight * ((cosine - phi) ** 2 + sine**2)
    return n * total


def plain_loss(method, images, step):
    groups = [images.views[:2], images.views[2:]]
    features = torch.cat([method.backbone(torch.cat(group)) for group in groups])
    views = method.projector(method.embedding(features)).split(len(images))
    center = (views[0] + views[1]) / 2
    prediction = sum(((center - view) ** 2).mean() for view in views) / 5
    slices = random_slices(5, 6, seed=method.slice_seed, step=step, dtype=torch.float64)
    statistics = [plain_statistic(view @ direction) for view in views for direction in slices.T]
    return 0.1 * sum(statistics) / len(statistics) + 0.9 * prediction


@pytest.mark.parametrize("step", [0, 3])
def test_one_step_is_the_authors(step):
    method, images = contract.build("lejepa"), contract.random_batch("lejepa", step)
    method.slice_step.fill_(step)
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images, step)
    progress = step / contract.NUM_STEPS
    lr = 0.05 * contract.ROWS / 256 * (1 + math.cos(math.pi * progress)) / 2
    contract.apply_plain_step(expected, OPTIM, plain_loss(expected, images, step), lr)
    expected.slice_step.fill_(step + 1)
    contract.assert_same(method, expected)


def test_four_equal_views_predict_the_mean_of_all():
    z = torch.tensor([[[0.0], [4.0], [8.0], [0.0]]])
    loss = losses.lejepa(z, step=0, num_global_views=4, sigreg_weight=0.0)
    assert loss.item() == (9 + 1 + 25 + 9) / 4


def test_slices_have_unit_length_and_uniform_directions():
    slices = random_slices(3, 20_000, seed=1, step=2, dtype=torch.float64)
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(20_000, dtype=torch.float64))
    assert slices.mean(1).abs().max() < 0.02
    covariance = slices @ slices.T / 20_000
    torch.testing.assert_close(covariance, torch.eye(3).double() / 3, rtol=0, atol=0.02)


def test_slices_differ_between_steps_and_seeds_and_are_repeatable():
    def draw(seed, step):
        return random_slices(4, 6, seed=seed, step=step)

    assert torch.equal(draw(3, 5), draw(torch.tensor(3), torch.tensor(5)))
    assert not torch.isclose(draw(3, 5), draw(3, 6)).any()
    assert not torch.isclose(draw(3, 5), draw(4, 5)).any()


def test_every_step_of_a_run_has_its_own_slices():
    method = contract.build("lejepa")
    assert method.slice_step == 0
    method.after_step(Progress(0, 20, 2), {}, {})
    assert method.slice_step == 1
    method.after_step(Progress(19, 20, 2), {}, {})  # the last step
    assert method.slice_step == 20


@pytest.mark.parametrize("num_images", [16, 256])
def test_the_statistic_of_a_normal_sample_does_not_depend_on_its_size(num_images):
    """Its mean is the integral of (1 - exp(-t^2)) exp(-t^2 / 2) over t from -3 to 3, 1.05."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(num_images, 300, 4, generator=generator, dtype=torch.float64)
    expected = math.sqrt(2 * math.pi) * math.erf(3 / math.sqrt(2))
    expected -= math.sqrt(2 * math.pi / 3) * math.erf(3 * math.sqrt(1.5))
    assert losses.sigreg(z, step=0, num_slices=30).item() == pytest.approx(expected, rel=0.05)


def test_the_statistic_of_a_collapsed_batch_is_proportional_to_its_size():
    """It is N times the integral of (1 - exp(-t^2 / 2))^2 exp(-t^2 / 2) over t from -3 to 3."""
    t = torch.linspace(-3, 3, 100_001, dtype=torch.float64)
    phi = (-(t**2) / 2).exp()
    expected = torch.trapezoid((1 - phi) ** 2 * phi, t).item()
    assert expected == pytest.approx(0.40, abs=0.005)
    for num_images in (1, 64):
        z = torch.zeros(num_images, 8, dtype=torch.float64)
        statistic = losses.sigreg(z, step=0).item()
        assert statistic / num_images == pytest.approx(expected, rel=1e-3)


def statistic_and_gradient(z):
    z = z.clone().requires_grad_()
    statistic = losses.sigreg(z, step=0, num_slices=20)
    statistic.backward()
    return statistic.detach(), z.grad


def test_tiles_change_neither_the_statistic_nor_its_gradient(monkeypatch):
    z = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, expected_grad = statistic_and_gradient(z)
    monkeypatch.setattr(characteristic, "TILE_NUMBERS", 12 * 3 * 17 * 3)  # three slices per tile
    statistic, grad = statistic_and_gradient(z)
    torch.testing.assert_close(statistic, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)


def test_no_tensor_of_the_statistic_exceeds_a_tile(monkeypatch):
    """A tile has 2 slices of 1,000 images; all slices would have 32 times as many numbers."""
    sizes = []

    class RecordSizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    limit = 1000 * 17 * 2
    monkeypatch.setattr(characteristic, "TILE_NUMBERS", limit)
    z = torch.randn(1000, 4, requires_grad=True)
    with RecordSizes():
        losses.sigreg(z, step=0, num_slices=64).backward()
    assert max(sizes) == limit


def test_the_gradient_is_that_of_finite_differences():
    z = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: losses.sigreg(z, step=0, num_slices=7), z.requires_grad_()
    )


def test_the_statistic_of_bfloat16_embeddings_is_computed_in_float32():
    """Under autocast the mean of 4,096 cosines near 1 would be rounded to 2^-9."""
    z = (0.01 * torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    expected = losses.sigreg(z.double(), step=0, num_slices=16)
    with torch.autocast("cpu", torch.bfloat16):
        statistic = losses.sigreg(z.requires_grad_(), step=0, num_slices=16)
        statistic.backward()
    assert statistic.dtype == torch.float32
    assert statistic.item() == pytest.approx(expected.item(), rel=1e-5)
    exact = z.detach().double().requires_grad_()
    losses.sigreg(exact, step=0, num_slices=16).backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.num_global_views=3",
            "method.num_global_views: 3 is more than the 2 views of views.crops; "
            "set it to 2 at most",
        ),
        (
            "views.crops.global.count=1",
            "views.crops: lejepa takes at least 2 views, got 1; set views.crops.*.count",
        ),
    ],
)
def test_views_that_do_not_suit_the_method_are_refused(override, message):
    run = config.load(CIFAR10, ["method.name=lejepa", override])
    with pytest.raises(ValueError) as error:
        config.check(run, 1)
    assert str(error.value) == message
