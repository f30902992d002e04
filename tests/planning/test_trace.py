"""Traces on fake tensors agree with real runs in operations, memory and traffic."""

import os

import numpy as np
import pytest
import torch
from conftest import run_ranks
from instruction_set import AVX2
from timm.layers import set_fused_attn
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain import config
from ssl_pretrain.build import build_method
from ssl_pretrain.distributed import process_group
from ssl_pretrain.losses.contrastive import nt_xent
from ssl_pretrain.losses.tiles import log_sum_exp
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.parallel import micro_batch
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.planning.recorder import Recorder, record_trace
from ssl_pretrain.planning.step_trace import trace_backbone, trace_micro_batch
from ssl_pretrain.planning.trace import LinearTrace
from ssl_pretrain.schema import presets

# Bytes held by torch's allocator divided by the prediction: 1.00 for test_vit, 1.05 for test_resnet
# and 1.11 for resnet18 when measured with AVX2. Kernels allocate memory that no trace sees. While
# operations are traced, autograd writes some sums of gradients to new tensors, not in place.
# Kernels for AVX-512 need less memory: 0.83 for resnet18.
ALLOCATED_OVER_PREDICTED = 0.95, 1.15
BACKBONES = {"test_resnet": 64, "test_vit": 160, "resnet18": 64}  # name: image size


def build_step(name: str, size: int, images: int):
    torch.manual_seed(0)
    layout = torch.channels_last
    backbone = backbones.build(BackboneConfig(name=name), size).to(memory_format=layout)
    views = torch.randn(images, 3, size, size).to(memory_format=layout)
    return lambda: backbone(views).float().mean().backward()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_traced_step_has_the_operations_of_a_real_step(name):
    """The arithmetic and the bytes of each operation are equal, and so is the peak."""
    step = build_step(name, BACKBONES[name], 3)
    recorder = Recorder()
    with recorder:
        step()
    real, traced = recorder.trace(), trace_backbone(name, BACKBONES[name], 3, bfloat16=False)
    moves_bytes, real_moves_bytes = traced.bytes_moved > 0, real.bytes_moved > 0
    np.testing.assert_array_equal(traced.flops[moves_bytes], real.flops[real_moves_bytes])
    np.testing.assert_array_equal(
        traced.bytes_moved[moves_bytes], real.bytes_moved[real_moves_bytes]
    )
    assert traced.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "test_vit"])
def test_flops_equal_those_of_torchs_counter(name):
    set_fused_attn(False)  # torch's counter has no formula for attention on a CPU
    try:
        step = build_step(name, BACKBONES[name], 2)
        with FlopCounterMode(display=False) as counter:
            step()
        traced = trace_backbone(name, BACKBONES[name], 2, bfloat16=False)
        assert traced.flops.sum() == counter.get_total_flops()
    finally:
        set_fused_attn(True)


def test_attention_counts_two_matrix_products():
    """Queries x keys and weights x values: 4 x heads x tokens^2 x dim operations per image."""
    query = torch.zeros(2, 3, 5, 8)

    def attend(inputs, begin_phase):
        tensors = [torch.empty_like(query) for _ in range(3)]
        torch.nn.functional.scaled_dot_product_attention(*tensors)

    assert record_trace(lambda: None, attend)[0].flops.sum() == 2 * 4 * 3 * 5 * 5 * 8


def measure_allocated_bytes(step):
    """Return the peak of torch's allocator during a step, relative to the start."""
    step()  # oneDNN allocates some memory once
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return np.cumsum([event.nbytes() for event in changes]).max()


def _measure_allocated_over_predicted(name):
    os.environ.update(AVX2)
    allocated_bytes = measure_allocated_bytes(build_step(name, BACKBONES[name], 16))
    return allocated_bytes / trace_backbone(name, BACKBONES[name], 16, bfloat16=False).peak_bytes


@pytest.mark.parametrize("name", BACKBONES)
def test_the_predicted_peak_is_close_to_the_peak_of_torchs_allocator(name):
    """Runs in a process of its own, as the profiler also counts memory that earlier tests hold."""
    (ratio,) = run_ranks(_measure_allocated_over_predicted, name, world_size=1)
    assert ALLOCATED_OVER_PREDICTED[0] < ratio < ALLOCATED_OVER_PREDICTED[1]


VIT = ["backbone.name=vit_tiny_patch16_224", "parallel.precision=float32", "data.root=/missing"]
NETWORKS = {  # four sequences per image go through I-JEPA's predictor
    "ijepa": [
        "backbone.args={depth: 4, class_token: false, global_pool: avg, fc_norm: false}",
        "views.crops.global.mask.patch_size=16",
        "method.predictor_dim=96",
        "method.predictor_depth=3",
    ],
    "mae": [
        "backbone.args={depth: 4}",
        "method.decoder_dim=96",
        "method.decoder_depth=3",
        "method.decoder_heads=3",
    ],
    "lejepa": ["backbone.args={depth: 2}", "views.crops.local.size=96"],
}


def _measure_method_over_predicted(name):
    """Return the allocated over the predicted bytes of a method's passes on 8 images."""
    run = config.load(presets.find(f"{name}_imagenet"), [*VIT, *NETWORKS[name]])
    execution = Execution.resolve(run.parallel, torch.device("cpu"))
    traces = trace_micro_batch(run, config.build_method_on_meta(run), execution, (2, 4))
    method = build_method(run)
    execution.place_module(method)
    batch = micro_batch.blank_batch(run.views, 8, execution)

    def step():
        method.zero_grad(set_to_none=True)
        embeddings, _targets = method(batch), method.targets(batch)
        trained = [z for z in embeddings.values() if z.requires_grad]
        torch.autograd.backward(trained, [torch.ones_like(z) for z in trained])
        method.zero_grad(set_to_none=True)

    return measure_allocated_bytes(step) / traces.trace_for(8).peak_bytes


@pytest.mark.parametrize("name", NETWORKS)
def test_the_peak_of_a_method_on_a_vit_is_that_of_torchs_allocator(name):
    (ratio,) = run_ranks(_measure_method_over_predicted, name, world_size=1)
    assert ratio == pytest.approx(1, abs=0.01)


def test_a_trace_is_linear_in_the_number_of_images():
    small, large, largest = (
        trace_backbone("test_resnet", 64, images, bfloat16=True) for images in (2, 4, 16)
    )
    interpolated = LinearTrace(small, large, 2, 4).trace_for(16)
    np.testing.assert_array_equal(interpolated.flops, largest.flops)
    np.testing.assert_array_equal(interpolated.bytes_moved, largest.bytes_moved)
    np.testing.assert_array_equal(interpolated.bytes_held, largest.bytes_held)


def test_a_tiled_loss_counts_the_matrix_products_of_its_tiles():
    """One product of 6 x 10 x 4 forward. Backward repeats it and adds two for the gradients."""

    def prepare():
        return torch.zeros(6, 4, requires_grad=True), torch.zeros(10, 4, requires_grad=True)

    def differentiate(inputs, begin_phase):
        anchors, candidates = inputs
        log_sum_exp(anchors, candidates, logit_bound=1.0).sum().backward()

    traced, _ = record_trace(prepare, differentiate)
    assert traced.flops.sum() == 4 * (2 * 6 * 10 * 4)


@pytest.mark.parametrize("ranks", [4, 64])
def test_a_rank_among_many_gathers_what_the_loss_needs(ranks):
    """NT-Xent gathers the embeddings of all ranks, then three numbers per embedding in backward."""

    def prepare():
        return [torch.zeros(8, 16, requires_grad=True) for _ in range(2)]

    def differentiate(inputs, begin_phase):
        nt_xent(*inputs, temperature=0.1).backward()

    with process_group.fake_process_group(ranks):
        traced, _ = record_trace(prepare, differentiate)
    assert traced.collectives == [
        ("allgather", ranks * 16 * 16 * 4),
        ("allgather", ranks * 16 * 3 * 4),
    ]
    assert process_group.world_size() == 1


def test_a_phase_ends_where_the_next_begins():
    traced = trace_backbone("test_resnet", 32, 2, bfloat16=False)
    forward, backward = traced.phase("forward"), traced.phase("backward")
    assert len(forward.flops) + len(backward.flops) == len(traced.flops)
    ratio = backward.flops.sum() / forward.flops.sum()
    assert 1.9 < ratio <= 2  # the input of the first layer gets no gradient


def test_a_phase_without_operations_is_empty():
    """The targets of a method without a teacher take no operations from the next phase."""

    def compute(x, begin_phase):
        begin_phase("forward")
        y = x @ x
        begin_phase("targets")
        begin_phase("backward")
        return y + 1 + x

    traced, _ = record_trace(lambda: torch.zeros(4, 4), compute)
    sizes = [len(traced.phase(name).flops) for name in ("forward", "targets", "backward")]
    assert sizes == [1, 0, 2]
