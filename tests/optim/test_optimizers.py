"""Optimizers against plain loops over their authors' equations, and masked steps."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.momentum_sgd import LARS
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress

pytestmark = pytest.mark.promise


def build_network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)
    return nn.Sequential(*layers).double()


def draw_gradients(step):
    generator = torch.Generator().manual_seed(step)
    shapes = [p.shape for p in build_network().parameters()]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def set_gradients(model, step):
    for parameter, gradient in zip(model.parameters(), draw_gradients(step)):
        parameter.grad = gradient.clone()


def take_steps(optimizer, model, rates):
    """Take one guarded step per learning rate."""
    for step, lr in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = lr
        set_gradients(model, step)
        optim.step_if_finite(optimizer)


def plain_lars(model, rates, convention, weight_decay=0.01, momentum=0.9, eta=0.001):
    """LARS tensor by tensor.

    The classic convention is that of google-research/simclr, lars_optimizer.py. The popular one is
    that of facebookresearch/barlowtwins.
    """
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    for step, lr in enumerate(rates):
        for p, v, g in zip(model.parameters(), buffers, draw_gradients(step)):
            trust = 1.0
            if p.ndim > 1:
                g = g + weight_decay * p
                w_norm, g_norm = p.norm(), g.norm()
                trust = eta * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
            with torch.no_grad():
                if convention == "classic":
                    v.copy_(momentum * v + lr * trust * g)
                    p -= v
                else:
                    v.mul_(momentum).add_(trust * g)
                    p.add_(v, alpha=-lr)


@pytest.mark.parametrize("convention", ["classic", "popular"])
def test_lars_equals_the_authors_equations(convention):
    rates = [0.5, 1.0, 0.2, 0.7]
    expected, actual = build_network(), build_network()
    plain_lars(expected, rates, convention)
    config = OptimConfig(name="lars", weight_decay=0.01, momentum_convention=convention)
    take_steps(optim.build(config, actual), actual, rates)
    assert all(torch.equal(p, q) for p, q in zip(actual.parameters(), expected.parameters()))


class OperationRecorder(TorchDispatchMode):
    """Record dispatched operations, and fail on one that waits for the device."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        for blocking_name in ("_local_scalar_dense", "is_nonzero"):
            assert blocking_name not in str(function), "the host waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("convention", ["classic", "popular"])
def test_a_lars_step_on_resnet50_takes_few_operations(convention):
    model = timm.create_model("resnet50", num_classes=0)
    optimizer = optim.build(OptimConfig(name="lars", momentum_convention=convention), model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optim.step_if_finite(optimizer)  # the first step allocates the momentum buffers
    with OperationRecorder() as bare_step:
        optimizer.step()
    with OperationRecorder() as guarded_step:
        optim.step_if_finite(optimizer, clip_norm=1.0)
    assert len(list(model.parameters())) == 159
    assert len(bare_step.names) <= 25, bare_step.names
    assert len(guarded_step.names) <= 35, guarded_step.names


@pytest.mark.case(20)
def test_a_zero_weight_moves_with_trust_one():
    weight = nn.Parameter(torch.zeros(2, 2))
    group = {"params": [weight], "names": ["w"], "lr": 0.1}
    optimizer = LARS([group], momentum=0.0, trust_coefficient=0.001, convention="classic")
    weight.grad = torch.ones(2, 2)
    optim.step_if_finite(optimizer)
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_takes_betas_and_eps_from_the_configuration(name):
    weight = nn.Parameter(torch.full((2, 2), 0.5, dtype=torch.float64))
    config = OptimConfig(
        name=name,
        betas=[0.8, 0.99],
        eps=0.1,
        weight_decay=0.0,
        base_lr=1.0,
        lr_scaling="none",
        warmup_epochs=0,
    )
    module = nn.Module()
    module.weight = weight
    optimizer = optim.build(config, module)
    optim.set_rates(optimizer, config, Progress(0, 1, 1), 1, 1)
    expected = weight.detach().clone()
    mean, square = torch.zeros(2, 2), torch.zeros(2, 2)
    for step in (1, 2):
        weight.grad = torch.full((2, 2), 0.3 * step, dtype=torch.float64)
        mean, square = 0.8 * mean + 0.2 * weight.grad, 0.99 * square + 0.01 * weight.grad**2
        expected -= mean / (1 - 0.8**step) / ((square / (1 - 0.99**step)).sqrt() + 0.1)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", ["lars", "larc", "adamw", "adam", "sgd"])
@pytest.mark.parametrize("non_finite", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing(name, non_finite):
    model = build_network()
    settings = OptimConfig(
        name=name, base_lr=0.1, lr_scaling="none", warmup_epochs=0, weight_decay=0.01
    )
    optimizer = optim.build(settings, model)
    for step in range(3):
        optim.set_rates(optimizer, settings, Progress(1, 10, 1), 10, 256)
        set_gradients(model, step)
        if step == 1:
            next(iter(model.parameters())).grad[0, 0, 0, 0] = non_finite
        before = [value.clone() for value in list_tensors(model, optimizer)]
        norm, skipped = optim.step_if_finite(optimizer)
        unchanged = all(torch.equal(a, b) for a, b in zip(before, list_tensors(model, optimizer)))
        assert skipped.item() == (1.0 if step == 1 else 0.0)
        assert math.isfinite(norm.item()) == (step != 1)
        if step > 0:
            assert unchanged == (step == 1)


def list_tensors(model, optimizer):
    """Return the parameters and the optimizer's tensors."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    states = [value for value in values if isinstance(value, torch.Tensor)]
    return [p.data for p in model.parameters()] + states


def test_clipping_bounds_the_norm_of_all_gradients_together():
    model = build_network()
    optimizer = optim.build(OptimConfig(name="sgd", weight_decay=0.0, momentum=0.0), model)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    set_gradients(model, 0)
    norm, _ = optim.step_if_finite(optimizer, clip_norm=0.5)
    update = [(p.detach() - q).flatten() for p, q in zip(model.parameters(), before)]
    assert norm.item() > 5
    assert torch.cat(update).norm().item() == pytest.approx(0.5, rel=1e-5)


def test_parameters_are_excluded_by_ndim_by_name_or_not_at_all():
    def list_names(**settings):
        groups = optim.parameter_groups(OptimConfig(**settings), build_network())
        return [group["names"] for group in groups]

    assert list_names() == [["0.weight", "3.weight"], ["0.bias", "1.weight", "1.bias", "3.bias"]]
    assert list_names(exclude_by="name", exclude_names=["3."]) == [
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["3.weight", "3.bias"],
    ]
    assert list_names(exclude_by="none")[1] == []


@pytest.mark.parametrize(
    ("scaling", "base", "expected"),
    [("sqrt", 0.075, 6.788), ("linear", 0.3, 9.6), ("none", 0.3, 0.3)],
)
def test_the_learning_rate_is_scaled_by_the_configured_rule(scaling, base, expected):
    lr = optim.scaled_lr(OptimConfig(base_lr=base, lr_scaling=scaling), 8192)
    assert lr == pytest.approx(expected, abs=5e-4)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    settings = OptimConfig(base_lr=0.3, warmup_epochs=10, weight_decay=1e-6)
    start, peak, middle, end = (
        optim.rates(settings, Progress(step, 100, 1), 100, 4096) for step in (0, 10, 55, 100)
    )
    assert start == {"lr": 0.0, "weight_decay": 1e-6}
    assert peak["lr"] == pytest.approx(4.8)
    assert middle["lr"] == pytest.approx(2.4)
    assert end["lr"] == pytest.approx(0.0, abs=1e-12)


def plain_larc(model, rates, clip, weight_decay=0.01, momentum=0.9, eta=0.02):
    """LARC around torch's SGD, tensor by tensor: NVIDIA/apex at 0bfb8300, apex/parallel/LARC.py."""
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    for step, lr in enumerate(rates):
        for p, v, g in zip(model.parameters(), buffers, draw_gradients(step)):
            if p.norm() != 0 and g.norm() != 0:
                rate = eta * p.norm() / (g.norm() + weight_decay * p.norm() + 1e-8)
                g = (g + weight_decay * p) * (min(rate / lr, 1) if clip else rate)
            with torch.no_grad():
                v.copy_(momentum * v + g)
                p -= lr * v


@pytest.mark.parametrize("clip", [False, True])
def test_larc_equals_apex_on_every_parameter(clip):
    rates = [0.5, 0.001, 0.2, 0.7]
    expected, actual = build_network(), build_network()
    plain_larc(expected, rates, clip)
    config = OptimConfig(
        name="larc", weight_decay=0.01, trust_coefficient=0.02, larc_clip=clip, exclude_by="none"
    )
    take_steps(optim.build(config, actual), actual, rates)
    for p, q in zip(actual.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)


def test_milestones_divide_the_learning_rate_by_ten():
    moco = OptimConfig(base_lr=0.03, schedule="milestones", milestones=[120, 160], warmup_epochs=0)
    steps = [0, 1199, 1200, 1599, 1600, 1990]
    rates = [optim.rates(moco, Progress(step, 2000, 10), 200, 256)["lr"] for step in steps]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_the_learning_rate_can_change_once_per_epoch():
    config = OptimConfig(base_lr=1.0, changes_every="epoch", warmup_epochs=0)
    rates = [optim.rates(config, Progress(step, 12, 3), 4, 256)["lr"] for step in range(12)]
    expected = [(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4) for _ in range(3)]
    assert rates == pytest.approx(expected)


def test_the_weight_decay_of_dino_rises_by_half_a_cosine():
    dino = OptimConfig(weight_decay=0.04, final_weight_decay=0.4)
    rates = [optim.rates(dino, Progress(step, 100, 1), 100, 256) for step in (0, 50, 100)]
    assert [rate["weight_decay"] for rate in rates] == pytest.approx([0.04, 0.22, 0.4])
    optimizer = optim.build(dino, build_network())
    optim.set_rates(optimizer, dino, Progress(50, 100, 1), 100, 256)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.22, 0.0])


def test_constant_and_excluded_parameters_have_their_own_learning_rates():
    settings = OptimConfig(
        base_lr=0.2, warmup_epochs=0, excluded_lr_ratio=0.024, constant_lr_names=["3."]
    )
    groups = optim.parameter_groups(settings, build_network())
    assert [(group["group"], group["names"]) for group in groups] == [
        ("adapted", ["0.weight"]),
        ("excluded", ["0.bias", "1.weight", "1.bias"]),
        ("constant adapted", ["3.weight"]),
        ("constant excluded", ["3.bias"]),
    ]
    optimizer = optim.build(settings, build_network())
    optim.set_rates(optimizer, settings, Progress(50, 100, 1), 100, 256)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1, 0.0024, 0.2, 0.0048])


def test_a_name_that_no_parameter_has_is_refused():
    with pytest.raises(ValueError) as error:
        optim.build(OptimConfig(constant_lr_names=["predictr"]), build_network())
    assert str(error.value) == (
        "optim.constant_lr_names: no trained parameter's name starts with 'predictr'; "
        "give a prefix such as predictor, or leave it out"
    )
