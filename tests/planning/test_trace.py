"""A program traced without memory against the same program run: operations, what they hold, move and send."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import run_ranks
from timm.layers import set_fused_attn
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain.distributed import process_group
from ssl_pretrain.losses.contrastive import nt_xent
from ssl_pretrain.losses.tiles import log_sum_exp
from ssl_pretrain.models import backbones
from ssl_pretrain.models.backbones import BackboneConfig
from ssl_pretrain.planning import trace
from ssl_pretrain.planning.estimate import backbone_step

# What torch's own allocator held over the prediction, measured 0.96 (test_vit), 1.05 (test_resnet), 1.11 (resnet18): kernels allocate
# inside, which no trace sees; and autograd adds in place some gradients that it adds to a new tensor when operations are traced
ALLOCATED_OVER_PREDICTED = 0.95, 1.15
BACKBONES = {"test_resnet": 64, "test_vit": 160, "resnet18": 64}


def real(name: str, size: int, images: int):
    torch.manual_seed(0)
    backbone = backbones.build(BackboneConfig(name=name), size).to(
        memory_format=torch.channels_last
    )
    views = torch.randn(images, 3, size, size).to(memory_format=torch.channels_last)
    return lambda: backbone(views).float().mean().backward()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_traced_step_is_the_step_that_runs(name):
    """Operation by operation, on real tensors: the same arithmetic and the same bytes moved, held at every moment."""
    step = real(name, BACKBONES[name], 3)
    recorder = trace.Recorder()
    with recorder:
        step()
    run, traced = recorder.trace(), backbone_step(name, BACKBONES[name], 3, bfloat16=False)
    moving = {which: found.moved > 0 for which, found in (("run", run), ("traced", traced))}
    np.testing.assert_array_equal(traced.flops[moving["traced"]], run.flops[moving["run"]])
    np.testing.assert_array_equal(traced.moved[moving["traced"]], run.moved[moving["run"]])
    assert traced.peak == pytest.approx(run.peak, rel=0.01)


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "test_vit"])
def test_flops_are_those_of_torchs_counter(name):
    set_fused_attn(False)  # torch's counter has no formula for attention on a CPU
    try:
        step = real(name, BACKBONES[name], 2)
        with FlopCounterMode(display=False) as counter:
            step()
        assert (
            backbone_step(name, BACKBONES[name], 2, bfloat16=False).flops.sum()
            == counter.get_total_flops()
        )
    finally:
        set_fused_attn(True)


def test_attention_counts_like_its_products():
    """Fused, forward: the two products of queries with keys and of weights with values, 4 x heads x tokens^2 x dim."""
    query = torch.zeros(2, 3, 5, 8)

    def attend(there, mark):
        torch.nn.functional.scaled_dot_product_attention(
            *[torch.empty_like(query) for _ in range(3)]
        )

    assert trace.run(lambda: None, attend).flops.sum() == 2 * 4 * 3 * 5 * 5 * 8


def _allocated_over_predicted(name):
    step = real(name, BACKBONES[name], 16)
    step()  # oneDNN makes some things once
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = np.cumsum(
        [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    )
    return held.max() / backbone_step(name, BACKBONES[name], 16, bfloat16=False).peak


@pytest.mark.parametrize("name", BACKBONES)
def test_the_predicted_peak_is_what_torchs_allocator_held(name):
    """In a process of its own: the profiler also counts what earlier tests of this one leave to be freed or kept."""
    (ratio,) = run_ranks(_allocated_over_predicted, name, world_size=1)
    assert ALLOCATED_OVER_PREDICTED[0] < ratio < ALLOCATED_OVER_PREDICTED[1]


def test_any_number_of_images_lies_on_the_line_of_two():
    few, more, many = (
        backbone_step("test_resnet", 64, images, bfloat16=True) for images in (2, 4, 16)
    )
    line = trace.Line(few, more, 2, 4).at(16)
    np.testing.assert_array_equal(line.flops, many.flops)
    np.testing.assert_array_equal(line.moved, many.moved)
    np.testing.assert_array_equal(line.held, many.held)


def test_the_tiles_of_a_loss_count_their_products():
    """Forward one product of 6 x 10 x 4; backward that again and the two that give the gradients."""

    def both(there, mark):
        anchors, candidates = there
        log_sum_exp(anchors, candidates, bound=1.0).sum().backward()

    traced = trace.run(
        lambda: (torch.zeros(6, 4, requires_grad=True), torch.zeros(10, 4, requires_grad=True)),
        both,
    )
    assert traced.flops.sum() == 4 * (2 * 6 * 10 * 4)


@pytest.mark.parametrize("ranks", [4, 64])
def test_a_rank_among_many_gathers_what_the_loss_needs(ranks):
    """NT-Xent: every rank's embeddings once, and three numbers of each in the backward."""

    def both(there, mark):
        nt_xent(*there, temperature=0.1).backward()

    with process_group.fake_process_group(ranks):
        traced = trace.run(lambda: [torch.zeros(8, 16, requires_grad=True) for _ in range(2)], both)
    assert traced.sent == [("allgather", ranks * 16 * 16 * 4), ("allgather", ranks * 16 * 3 * 4)]
    assert process_group.world_size() == 1


def test_a_phase_ends_where_the_next_begins():
    traced = backbone_step("test_resnet", 32, 2, bfloat16=False)
    forward, backward = traced.phase("forward"), traced.phase("backward")
    assert len(forward.flops) + len(backward.flops) == len(traced.flops)
    assert (
        1.9 < backward.flops.sum() / forward.flops.sum() <= 2
    )  # the input of the first layer gets no gradient


def test_a_phase_without_operations_is_empty_and_takes_none_of_the_next():
    """As the targets of a method without a teacher."""

    def work(x, mark):
        mark("forward")
        y = x @ x
        mark("targets")
        mark("backward")
        return y + 1 + x

    traced = trace.run(lambda: torch.zeros(4, 4), work)
    assert [len(traced.phase(name).flops) for name in ("forward", "targets", "backward")] == [
        1,
        0,
        2,
    ]
