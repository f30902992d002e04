"""LAMB, Adan and the optimizers of timm and torch, under the masked step."""

import sys
from typing import get_args, get_type_hints

import networks
import pytest
import timm.optim
import torch
from conftest import run_ranks
from suites import quick_and_full
from torch import nn

from ssl_pretrain import config as configuration
from ssl_pretrain.distributed import process_group
from ssl_pretrain.optim import masked, optimizer_list
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import wrap as parallel
from ssl_pretrain.planning import plan

pytestmark = pytest.mark.promise

NAMES = ["lamb", "adan", *optimizer_list.ENTRIES]
SHARDABLE = [
    name
    for name in NAMES
    if name not in optimizer_list.ENTRIES or not optimizer_list.ENTRIES[name].needs_whole_tensors
]
RATES = [0.03, 0.0, 0.1, 0.02]
EVERY_NAME = pytest.mark.parametrize("name", NAMES)


def settings_of(name, **settings):
    """Return settings of the optimizer for a few steps at a large learning rate."""
    betas = [0.9, 0.85, 0.99] if name == "adan" else [0.9, 0.99]
    defaults = {"name": name, "betas": betas, "weight_decay": 0.05}
    return defaults | {"base_lr": 0.01, "lr_scaling": "none", "warmup_epochs": 0} | settings


def build_network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)
    return nn.Sequential(*layers).to(dtype).to(memory_format=torch.channels_last)


def set_gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def set_rates(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def take_steps(name, pattern="....", dtype=torch.float64, **settings):
    """Take a step per character, with a gradient that is not finite for `x`."""
    network = build_network(dtype)
    optimizer = optim.build(OptimConfig(**settings_of(name, **settings)), network)
    num_taken = 0
    for character in pattern:
        set_rates(optimizer, RATES[num_taken % len(RATES)])
        set_gradients(network, num_taken)
        if character == "x":
            network[3].weight.grad[0, 0] = float("nan")
            network[0].weight.grad[0, 0, 0, 0] = float("inf")
        num_taken += character == "."
        optim.step_if_finite(optimizer)
    return network, optimizer


def tensors_of(network, optimizer):
    names = dict(network.named_parameters())
    return dict(network.state_dict()) | {
        f"{name}::{key}": value
        for name, parameter in names.items()
        for key, value in optimizer.state[parameter].items()
    }


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(tensors[key], expected[key])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EVERY_NAME
def test_masked_steps_leave_no_trace(name, dtype):
    """Neither before the first step, when there is no state, nor later."""
    expected = tensors_of(*take_steps(name, "....", dtype))
    assert all(value.isfinite().all() for value in expected.values())
    assert_equal(tensors_of(*take_steps(name, "xx.x..xx.x", dtype)), expected)


@EVERY_NAME
def test_a_few_tensors_at_a_time_equal_all_at_once(name, monkeypatch):
    expected = tensors_of(*take_steps(name))
    monkeypatch.setattr(masked, "CHUNK_ELEMENTS", 20)
    assert_equal(tensors_of(*take_steps(name)), expected)


@EVERY_NAME
def test_moments_have_the_memory_layout_of_their_weights(name):
    network, optimizer = take_steps(name, dtype=torch.float32)
    weight = network[0].weight
    assert weight.stride() != torch.empty(weight.shape).stride()
    for value in optimizer.state[weight].values():
        assert value.ndim == 0 or value.stride() == weight.stride()


def groups_of(network):
    return [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


def take_plain_steps(build):
    network = build_network()
    optimizer = build(groups_of(network))
    for step, lr in enumerate(RATES):
        set_rates(optimizer, lr)
        set_gradients(network, step)
        optimizer.step()
    return network.state_dict()


@pytest.mark.parametrize("name", optimizer_list.ENTRIES)
def test_steps_are_those_of_the_library(name):
    def build(groups):
        if name == "timm:muon":
            groups[1]["use_fallback"] = True
        return optimizer_list.ENTRIES[name].optimizer_class(groups)

    assert_equal(take_steps(name)[0].state_dict(), take_plain_steps(build))


@pytest.mark.parametrize(
    ("name", "build"),
    [
        (
            "lamb",
            lambda groups: timm.optim.Lamb(groups, betas=(0.9, 0.99), eps=1e-6, max_grad_norm=None),
        ),
        ("adan", lambda groups: timm.optim.Adan(groups, betas=(0.9, 0.85, 0.99), eps=1e-6)),
    ],
)
def test_lamb_and_adan_equal_those_of_timm(name, build):
    actual, expected = take_steps(name, eps=1e-6)[0].state_dict(), take_plain_steps(build)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-12, atol=1e-14)


def test_a_zero_weight_moves_with_trust_one():
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2, 2))
    config = OptimConfig(**settings_of("lamb", weight_decay=0.0, eps=1e-12))
    optimizer = optim.build(config, module)
    set_rates(optimizer, 0.1)
    module.weight.grad = torch.full((2, 2), 3.0)
    optim.step_if_finite(optimizer)
    torch.testing.assert_close(module.weight.detach(), torch.full((2, 2), -0.1))


@pytest.mark.parametrize("name", [n for n in optimizer_list.ENTRIES if n != "timm:lion"])
def test_steps_counted_on_the_device_equal_steps_counted_on_the_host(name, monkeypatch):
    """On a GPU the bias corrections are tensors. This computes them as tensors on the CPU."""
    expected = take_steps(name, "..x..")[0].state_dict()
    entry = optimizer_list.ENTRIES[name].optimizer_class
    modules = ("adadelta", "adamax", "nadam", "radam", "rmsprop", "optimizer")
    for module in (*(f"torch.optim.{name}" for name in modules), "timm.optim._helpers"):
        monkeypatch.setattr(
            sys.modules[module],
            "_get_capturable_supported_devices",
            lambda supports_xla=True: ["cpu"],
        )
    original = entry.__init__
    monkeypatch.setattr(
        entry,
        "__init__",
        lambda self, params, **args: original(self, params, capturable=True, **args),
    )
    args = {"foreach": True} if name != "timm:muon" else {}
    network, optimizer = take_steps(name, "..x..", args=args)
    assert optimizer._optimizer.defaults["capturable"]
    for key, value in expected.items():
        # Bias corrections have errors of up to 6e-5 in float32 (1 - 0.999), and rates are 0.1.
        torch.testing.assert_close(network.state_dict()[key], value, rtol=0, atol=6e-6)


def network_settings(name):
    # Lion takes the sign of a gradient that is zero but for rounding, such as that of the bias of
    # the keys, so the network has no such biases.
    # Rounding grows with the learning rate. It is 5e-8 after four steps of AdamW at a rate of 0.01.
    return {
        "optimizer": settings_of(name, base_lr=1e-4),
        "backbone": {"args": {**networks.VIT.args, "qkv_bias": False}},
    }


def _changed_by_nan(name, strategy):
    """Return the tensors that a step changes if one pixel of one rank is NaN."""
    stepper, sizes = networks.build_case("dino", strategy=strategy, **network_settings(name))
    networks.take_step(stepper, sizes, 2)
    method = parallel.unwrap(stepper.model)
    before = networks.full_state(method) | _moments(stepper)
    batch = networks.random_batch(3, sizes)
    batch = batch.slice(process_group.rank(), process_group.world_size())
    batch.views[1][0, 0, 0, 0] = float("nan") if process_group.rank() else 0.0
    logs = stepper(Progress(3, 20, 2), batch).logs
    assert logs["skipped_steps"] == 1
    after = networks.full_state(method) | _moments(stepper)
    assert len(after) > len(networks.full_state(method)) + 10
    return [key for key, value in after.items() if not torch.equal(value, before[key])]


def _moments(stepper):
    return {
        f"{name}::{key}": (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, parameter in stepper.method.named_parameters()
        for key, value in stepper.optimizer.state.get(parameter, {}).items()
    }


def _train_on_two_ranks(folder, name):
    results = {}
    for strategy in ("ddp", "fsdp") if name in SHARDABLE else ("ddp",):
        settings = {"strategy": strategy, **network_settings(name)}
        path = folder / strategy
        networks.run("dino", 2, path, **settings)
        results[strategy] = {
            "float64": networks.run("dino", 4, precision="float64", **settings)["state"],
            "changed": _changed_by_nan(name, strategy),
            "whole": networks.run("dino", 4, **settings)["state"],
            "resumed": networks.run("dino", 2, path, **settings)["state"],
        }
    return results


@pytest.mark.parametrize(
    "name",
    quick_and_full(["lamb"], NAMES),  # the other cases take a quarter of a minute each
)
def test_ranks_agree_with_one_process_and_resume_exactly(name, tmp_path):
    settings = network_settings(name)
    expected = networks.run("dino", 4, precision="float64", **settings)["state"]
    whole = networks.run("dino", 4, **settings)["state"]
    networks.run("dino", 2, tmp_path / "one", **settings)
    assert_equal(networks.run("dino", 2, tmp_path / "one", **settings)["state"], whole)
    for rank in run_ranks(_train_on_two_ranks, tmp_path, name, world_size=2):
        assert len(rank) == 1 + (name in SHARDABLE)
        for results in rank.values():
            assert networks.largest_difference(results["float64"], expected) < 1e-8
            assert results["changed"] == []
            assert_equal(results["resumed"], results["whole"])


def test_every_entry_is_a_choice():
    choices = get_args(get_type_hints(OptimConfig)["name"])
    assert choices == ("lars", "larc", "adamw", "adam", "sgd", *NAMES)


@pytest.mark.parametrize("name", optimizer_list.ENTRIES)
def test_the_number_of_moments_is_at_most_the_stated_one(name):
    args = {"momentum": 0.9, "centered": True} if name == "torch:rmsprop" else {}
    network, optimizer = take_steps(name, args=args)
    shapes = [
        sum(value.shape == parameter.shape for value in optimizer.state[parameter].values())
        for parameter in network.parameters()
    ]
    assert max(shapes) == optimizer_list.ENTRIES[name].num_moments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "timm:lion", "args": {"beta": 0.9}},
            "optim.args.beta: timm:lion has no such argument; did you mean 'betas'?",
        ),
        (
            {"name": "timm:lion", "args": {"nesterov": True}},
            "optim.args.nesterov: timm:lion has no such argument; give betas, caution, foreach",
        ),
        (
            {"name": "torch:radam", "args": {"lr": 0.9}},
            "optim.args.lr: 0.9 cannot be given, because the learning rate is optim.base_lr; "
            "leave it out",
        ),
        (
            {"name": "torch:radam", "args": {"betas": [0.9, 2]}},
            "optim.args: torch:radam refuses {'betas': [0.9, 2]}: Invalid beta parameter at "
            "index 1: 2; change optim.args",
        ),
        (
            {"name": "adamw", "args": {"eps": 0.9}},
            "optim.args: {'eps': 0.9} is for optimizers of timm and torch, not for adamw; "
            "leave it out",
        ),
        (
            {"name": "adan"},
            "optim.betas: [0.9, 0.999] has 2 numbers; give 3, such as [0.98, 0.92, 0.99]",
        ),
    ],
)
def test_unsuitable_arguments_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        optim.check(OptimConfig(**settings))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.name=timm:muon"],
            "optim.name: timm:muon needs whole tensors, which parallel.strategy=fsdp divides among "
            "the ranks; set parallel.strategy=ddp, or another optimizer",
        ),
        (
            ["optim.name=timm:lion", "optim.args={caution: true}"],
            "optim.args.caution: true needs whole tensors, which parallel.strategy=fsdp divides "
            "among the ranks; leave it out, or set parallel.strategy=ddp",
        ),
    ],
)
def test_optimizers_that_need_whole_tensors_are_refused_for_shards(overrides, message):
    config = configuration.load("simclr_digits", [*overrides, "parallel.strategy=fsdp"])
    with pytest.raises(configuration.ConfigError) as error:
        configuration.check(config, 1)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "moments", "note"),
    [
        ("timm:lion", 1, []),
        pytest.param("lamb", 2, [], marks=pytest.mark.full),
        pytest.param(
            "torch:nadam",
            2,
            [
                "optimizer: torch:nadam is estimated as lamb, because its operations depend on "
                "values"
            ],
            marks=pytest.mark.full,
        ),
    ],
)
def test_the_plan_estimates_the_moments(name, moments, note):
    overrides = ["plan.gpu=H100", "backbone.name=resnet50", f"optim.name={name}"]
    lines = plan.describe(configuration.load("simclr_digits", overrides)).splitlines()
    assert [line for line in lines if "is estimated as" in line] == note
    sizes = {line.split()[-1]: float(line.split()[0]) for line in lines if " GiB  " in line}
    assert sizes["optimizer"] == pytest.approx(moments * sizes["parameters"], abs=0.002)
