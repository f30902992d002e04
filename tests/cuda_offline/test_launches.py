"""A step on a pretended GPU never waits, and its kernel launches equal the committed table."""

import fake_step
import pytest
import tables
import torch
from fake_cuda import DEVICE, pretend_cuda
from launches import count_launches
from suites import quick_and_full

from ssl_pretrain.optim import optimizers
from ssl_pretrain.views import color

# Methods have the same losses on CIFAR-10 as on ImageNet, with smaller networks.
STEMS = quick_and_full(
    [*fake_step.SMALL, "simclr_imagenet", "dino_imagenet"],
    [*fake_step.SMALL, *fake_step.IMAGENET],
)
# Without the fused kernels, color takes 575 and 2,916 launches.
COLOR_LIMITS = {"simclr_imagenet": 12, "dino_imagenet": 20}


@pytest.mark.parametrize("stem", STEMS)
def test_a_step_never_waits_and_has_the_launches_of_the_table(stem):
    counts = fake_step.launches_per_step(stem)  # raises an error if the host waits
    assert counts.keys() >= {"color", "forward", "loss", "backward", "optimizer", "other"}
    tables.skip_unless_version("launches")
    assert tables.read("launches").get(stem) == tables.format_launches(counts), tables.REMEDY


@pytest.mark.parametrize("stem", COLOR_LIMITS)
def test_color_takes_few_launches(stem):
    assert fake_step.launches_per_step(stem)["color"] <= COLOR_LIMITS[stem]


def test_an_extra_launch_changes_the_count(monkeypatch):
    step_if_finite = optimizers.step_if_finite

    def scale_and_step(optimizer, *arguments):
        optimizer.param_groups[0]["params"][0].grad.mul_(1.0)
        return step_if_finite(optimizer, *arguments)

    expected = fake_step.launches_per_step("simclr_digits")
    monkeypatch.setattr(optimizers, "step_if_finite", scale_and_step)
    counts = fake_step.launches_per_step.__wrapped__("simclr_digits")
    assert counts == {**expected, "optimizer": expected["optimizer"] + 1}


def test_color_one_operation_at_a_time_exceeds_the_limit(monkeypatch):
    monkeypatch.setattr(color, "FUSED_DEVICES", ())
    with pretend_cuda(), count_launches() as counter:
        fake_step.apply_colors(fake_step.load("simclr_imagenet"))
    assert counter.counts["other"] > 500


def test_a_launch_inside_a_compiled_region_is_counted():
    with pretend_cuda(), count_launches() as counter:
        compiled = torch.compile(lambda x: x.sin() + 1)
        compiled(torch.ones(3, device=DEVICE))
    assert counter.counts["other"] == 3


def test_a_triton_launch_is_counted():
    pytest.importorskip("triton", reason="no Triton for this platform")
    from ssl_pretrain.losses import tiles

    with pretend_cuda(), count_launches() as counter:
        z = torch.ones(1000, 128, device=DEVICE)
        tiles.log_sum_exp(z, z, excluded_offsets=(0,))
    triton = [name for name in counter.operations if "triton" in name]
    assert triton == ["other: triton log_sum_exp_kernel"]


def test_an_operator_that_hides_its_launches_is_refused():
    with torch.library._scoped_library("offline_test", "DEF") as library:
        library.define("launch(Tensor x) -> Tensor")
        library.impl("launch", torch.empty_like, "Meta")
        with pretend_cuda():
            x = torch.ones(3, device=DEVICE)
            with count_launches(), pytest.raises(AssertionError, match="would be hidden"):
                torch.ops.offline_test.launch(x)


def launches_of(function, *arguments):
    with count_launches() as counter:
        function(*arguments)
    return counter.counts["other"]


def test_lists_of_tensors_take_one_launch_per_group():
    """36 to 110 tensors or 320 blocks of 65,536 elements, as in ATen's MultiTensorApply.cuh."""
    with pretend_cuda():
        small = [torch.ones(10, device=DEVICE) for _ in range(111)]
        large = [torch.ones(65_536 * 321, device=DEVICE)]
        assert launches_of(torch._foreach_mul_, small, 2.0) == 2
        assert launches_of(torch._foreach_mul_, small[:110], 2.0) == 1
        assert launches_of(torch._foreach_add_, small[:65], small[:65]) == 2
        assert launches_of(torch._foreach_mul_, large, 2.0) == 2
        factors = [torch.ones((), device=DEVICE) for _ in small]
        assert launches_of(torch._foreach_mul_, small, factors) == 111


def test_views_and_allocations_take_no_launch():
    with pretend_cuda():
        x = torch.ones(4, 6, device=DEVICE)
        for function in (torch.empty_like, torch.t, torch.detach, lambda x: x.chunk(2)):
            assert launches_of(function, x) == 0
        assert launches_of(lambda x: x.t().contiguous(), x) == 1
