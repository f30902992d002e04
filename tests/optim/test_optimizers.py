"""LARS against a plain loop over the authors' equations; the schedule; the guard."""

from __future__ import annotations

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


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).double()


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(p.shape, dtype=torch.float64, generator=generator)
        for p in network().parameters()
    ]


def plain_lars(model, rates, convention, weight_decay=0.01, momentum=0.9, eta=0.001):
    """google-research/simclr lars_optimizer.py (classic) and facebookresearch/barlowtwins (popular), tensor by tensor."""
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    for step, lr in enumerate(rates):
        for p, v, g in zip(model.parameters(), buffers, gradients(step)):
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
    expected, got = network(), network()
    plain_lars(expected, rates, convention)
    optimizer = optim.build(
        OptimConfig(name="lars", weight_decay=0.01, momentum_convention=convention), got
    )
    for step, lr in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(got.parameters(), gradients(step)):
            p.grad = g.clone()
        optim.guarded_step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(got.parameters(), expected.parameters()))


class Operations(TorchDispatchMode):
    """Counts what is dispatched, and refuses what would read the device."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        assert "_local_scalar_dense" not in str(function) and "is_nonzero" not in str(function), (
            "the host waits for the device"
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("convention", ["classic", "popular"])
def test_a_lars_step_on_resnet50_is_few_operations(convention):
    model = timm.create_model("resnet50", num_classes=0)
    optimizer = optim.build(OptimConfig(name="lars", momentum_convention=convention), model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optim.guarded_step(optimizer)  # the first makes the momentum buffers
    with Operations() as step:
        optimizer.step()
    with Operations() as whole:
        optim.guarded_step(optimizer, clip_norm=1.0)
    assert len(list(model.parameters())) == 159
    assert len(step.names) <= 25, step.names
    assert len(whole.names) <= 35, whole.names


@pytest.mark.case(20)
def test_a_zero_weight_moves_with_trust_one():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS(
        [{"params": [weight], "names": ["w"], "lr": 0.1}],
        momentum=0.0,
        trust_coefficient=0.001,
        convention="classic",
    )
    weight.grad = torch.ones(2, 2)
    optim.guarded_step(optimizer)
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
    expected, first, second = weight.detach().clone(), torch.zeros(2, 2), torch.zeros(2, 2)
    for step in (1, 2):
        weight.grad = torch.full((2, 2), 0.3 * step, dtype=torch.float64)
        first, second = 0.8 * first + 0.2 * weight.grad, 0.99 * second + 0.01 * weight.grad**2
        expected -= first / (1 - 0.8**step) / ((second / (1 - 0.99**step)).sqrt() + 0.1)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", ["lars", "larc", "adamw", "adam", "sgd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing(name, bad):
    model = network()
    optimizer = optim.build(OptimConfig(name=name, weight_decay=0.01), model)
    settings = OptimConfig(
        name=name, base_lr=0.1, lr_scaling="none", warmup_epochs=0, weight_decay=0.01
    )
    for step in range(3):
        optim.set_rates(optimizer, settings, Progress(1, 10, 1), 10, 256)
        for p, g in zip(model.parameters(), gradients(step)):
            p.grad = g.clone()
        if step == 1:
            next(iter(model.parameters())).grad[0, 0, 0, 0] = bad
        before = [value.clone() for value in everything(model, optimizer)]
        norm, skipped = optim.guarded_step(optimizer)
        unchanged = all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer)))
        assert skipped.item() == (1.0 if step == 1 else 0.0)
        assert math.isfinite(norm.item()) == (step != 1)
        if step > 0:
            assert unchanged == (step == 1)


def everything(model, optimizer):
    return [p.data for p in model.parameters()] + [
        v
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, torch.Tensor)
    ]


def test_clipping_bounds_the_whole_gradient():
    model = network()
    optimizer = optim.build(OptimConfig(name="sgd", weight_decay=0.0, momentum=0.0), model)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    for p, g in zip(model.parameters(), gradients(0)):
        p.grad = g.clone()
    norm, _ = optim.guarded_step(optimizer, clip_norm=0.5)
    moved = torch.cat(
        [(p.detach() - q).flatten() for p, q in zip(model.parameters(), before)]
    ).norm()
    assert norm.item() > 5 and moved.item() == pytest.approx(0.5, rel=1e-5)


def test_groups_by_ndim_by_name_and_not_at_all():
    def names(**settings):
        return [
            group["names"] for group in optim.parameter_groups(OptimConfig(**settings), network())
        ]

    assert names() == [["0.weight", "3.weight"], ["0.bias", "1.weight", "1.bias", "3.bias"]]
    assert names(exclude_by="name", exclude_names=["3."]) == [
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["3.weight", "3.bias"],
    ]
    assert names(exclude_by="none")[1] == []


@pytest.mark.parametrize(
    ("scaling", "base", "expected"),
    [("sqrt", 0.075, 6.788), ("linear", 0.3, 9.6), ("none", 0.3, 0.3)],
)
def test_scaled_lr_at_8192(scaling, base, expected):
    assert optim.scaled_lr(OptimConfig(base_lr=base, lr_scaling=scaling), 8192) == pytest.approx(
        expected, abs=5e-4
    )


def test_rates_of_a_run():
    settings = OptimConfig(base_lr=0.3, warmup_epochs=10, weight_decay=1e-6)
    assert optim.rates(settings, Progress(0, 100, 1), 100, 4096) == {
        "lr": 0.0,
        "weight_decay": 1e-6,
    }
    assert optim.rates(settings, Progress(10, 100, 1), 100, 4096)["lr"] == pytest.approx(4.8)
    assert optim.rates(settings, Progress(55, 100, 1), 100, 4096)["lr"] == pytest.approx(2.4)
    assert optim.rates(settings, Progress(100, 100, 1), 100, 4096)["lr"] == pytest.approx(
        0.0, abs=1e-12
    )


def plain_larc(model, rates, clip, weight_decay=0.01, momentum=0.9, eta=0.02):
    """NVIDIA/apex at 0bfb8300, apex/parallel/LARC.py, around torch's SGD, tensor by tensor."""
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    for step, lr in enumerate(rates):
        for p, v, g in zip(model.parameters(), buffers, gradients(step)):
            if p.norm() != 0 and g.norm() != 0:
                rate = eta * p.norm() / (g.norm() + weight_decay * p.norm() + 1e-8)
                g = (g + weight_decay * p) * (min(rate / lr, 1) if clip else rate)
            with torch.no_grad():
                v.copy_(momentum * v + g)
                p -= lr * v


@pytest.mark.parametrize("clip", [False, True])
def test_larc_equals_apex_on_every_parameter(clip):
    rates = [0.5, 0.001, 0.2, 0.7]
    expected, got = network(), network()
    plain_larc(expected, rates, clip)
    optimizer = optim.build(
        OptimConfig(
            name="larc",
            weight_decay=0.01,
            trust_coefficient=0.02,
            larc_clip=clip,
            exclude_by="none",
        ),
        got,
    )
    for step, lr in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(got.parameters(), gradients(step)):
            p.grad = g.clone()
        optim.guarded_step(optimizer)
    for p, q in zip(got.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)


def test_milestones_and_epochs():
    moco = OptimConfig(base_lr=0.03, schedule="milestones", milestones=[120, 160], warmup_epochs=0)
    lrs = [
        optim.rates(moco, Progress(step, 2000, 10), 200, 256)["lr"]
        for step in (0, 1199, 1200, 1599, 1600, 1990)
    ]
    assert lrs == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    by_epoch = OptimConfig(base_lr=1.0, changes_every="epoch", warmup_epochs=0)
    steps = [
        optim.rates(by_epoch, Progress(step, 12, 3), 4, 256)["lr"] for step in range(12)
    ]  # 3 steps an epoch
    assert steps == pytest.approx(
        [(1 + math.cos(math.pi * (step // 3) / 4)) / 2 for step in range(12)]
    )


def test_the_weight_decay_of_dino_rises_by_half_a_cosine():
    dino = OptimConfig(weight_decay=0.04, final_weight_decay=0.4)
    assert [
        optim.rates(dino, Progress(step, 100, 1), 100, 256)["weight_decay"] for step in (0, 50, 100)
    ] == pytest.approx([0.04, 0.22, 0.4])
    optimizer = optim.build(dino, network())
    optim.set_rates(optimizer, dino, Progress(50, 100, 1), 100, 256)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.22, 0.0])


def test_constant_and_excluded_learning_rates():
    settings = OptimConfig(
        base_lr=0.2, warmup_epochs=0, excluded_lr_ratio=0.024, constant_lr_names=["3."]
    )
    groups = optim.parameter_groups(settings, network())
    assert [(group["group"], group["names"]) for group in groups] == [
        ("adapted", ["0.weight"]), ("excluded", ["0.bias", "1.weight", "1.bias"]), ("constant adapted", ["3.weight"]), ("constant excluded", ["3.bias"]),
    ]  # fmt: skip
    optimizer = optim.build(settings, network())
    optim.set_rates(optimizer, settings, Progress(50, 100, 1), 100, 256)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.1, 0.0024, 0.2, 0.0048]
    )
    with pytest.raises(
        ValueError,
        match=r"^optim.constant_lr_names: no trained parameter's name starts with 'predictr'$",
    ):
        optim.build(OptimConfig(constant_lr_names=["predictr"]), network())
