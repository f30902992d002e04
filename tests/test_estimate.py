"""What a plan says of a machine: counted parts against the built run, the models of time against numbers known without them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_configs import FIRST, _reduced

from ssl_pretrain import config, hardware, optim, plan
from ssl_pretrain.estimate import Cluster, Program
from ssl_pretrain.hardware import MACHINES, Machine
from ssl_pretrain.trace import CONVOLUTION, MATMUL, OTHER, Trace
from ssl_pretrain.train import build_method

QUICK = ("simclr", "swav", "dino", "moco_v3")
TOY = Machine("toy", 1e9, 1e12, 1e11, 5e11, 1e9, 1e8, 1e7, launch_seconds=0.0, latency_seconds=1e-3, on_cpu=True)


@pytest.fixture
def run(tmp_path):
    path = next(path for path in FIRST if path.stem == "simclr_imagenet")
    return _reduced(path, tmp_path)


def columns(flops, moved, kinds, wide) -> Trace:
    return Trace(np.array(flops), np.array(moved), np.zeros(len(flops)), np.array(kinds), np.array(wide), [], {})


@pytest.mark.parametrize(
    "path", [path if path.stem.split("_imagenet")[0] in QUICK else pytest.param(path, marks=pytest.mark.full) for path in FIRST], ids=lambda path: path.stem
)
def test_every_method_has_a_plan(path, tmp_path):
    run = _reduced(path, tmp_path)
    run = replace(run, plan=replace(run.plan, gpu="H100", num_images=10_000), launch=replace(run.launch, nodes=2, gpus_per_node=2))
    text = plan.describe(run, plan.ranks(run, here=1))
    for line in ("# on 4 x H100, 2 nodes of 2: rates from data sheets", "of the step's peak:", "largest local batch: 4 of its share of 4", "a step: "):
        assert line in text, text
    seconds = float(text.partition("a step: ")[2].partition(" ms")[0].replace(",", ""))
    listed = [float(line.split()[0]) for line in text.splitlines() if line.startswith("  ") and " ms  " in line]
    assert sum(listed) == pytest.approx(seconds, rel=0.05, abs=0.1)


def test_parameters_gradients_and_optimizer_are_those_of_the_run(run):
    for settings in (run.optim, replace(run.optim, name="adamw")):
        run = replace(run, optim=settings)
        method = build_method(run)
        optimizer = optim.build(run.optim, method)
        for parameter in method.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optim.guarded_step(optimizer)
        program = Program(run, 1, TOY)
        sizes = program.memory(4)
        assert sizes["parameters"] + sizes["teacher"] == sum(p.nbytes for p in method.parameters())
        assert program.gradient_bytes == sum(p.nbytes for p in method.parameters() if p.requires_grad)
        assert sizes["optimizer"] == sum(z.nbytes for state in optimizer.state.values() for z in state.values())
        assert sizes["buffers"] == sum(b.nbytes for b in method.buffers())


def test_each_operation_is_as_slow_as_its_arithmetic_or_its_memory():
    trace = columns([2e12, 1e11, 5e11, 10], [10, 10, 3e9, 2e9], [MATMUL, MATMUL, CONVOLUTION, OTHER], [False, True, False, False])
    assert TOY.bounds(trace) == pytest.approx((2.0 + 1.0, 3.0 + 2.0))
    assert replace(TOY, attained=0.5, launch_seconds=0.25).seconds(trace) == pytest.approx(16.0 + 4 * 0.25)  # a CPU does both itself
    gpu = replace(TOY, attained=0.5, on_cpu=False)
    assert replace(gpu, launch_seconds=0.25).seconds(trace) == pytest.approx(16.0)
    assert replace(gpu, launch_seconds=5.0).seconds(trace) == pytest.approx(20.0)


def test_a_collective_takes_its_ring_and_its_tree(run):
    program = Program(run, 16, TOY)
    inside, across = Cluster(1, 16), Cluster(4, 4)
    assert program.travel(inside, "allgather", 16_000_000, 16) == pytest.approx(15 / 16 * 0.16 + 4e-3)
    assert program.travel(inside, "allreduce", 16_000_000, 16) == pytest.approx(2 * 15 / 16 * 0.16 + 4e-3)
    assert program.travel(across, "allgather", 16_000_000, 16) == pytest.approx(15 / 16 * 1.6 + 4e-3)
    assert program.travel(across, "allgather", 16_000_000, 4) == pytest.approx(3 / 4 * 0.16 + 2e-3)  # within a node


def test_batch_norm_across_ranks_sends_its_sums(run):
    program = Program(run, 4, TOY)
    channels = [norm.num_features for norm in program.on_meta().modules() if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm)]
    messages = program.batch_norm_messages(4)
    assert sorted(size for name, size, _ in messages if name == "allreduce") == sorted(8 * c for c in channels)
    assert sorted(size for name, size, _ in messages if name == "allgather") == sorted(4 * (2 * c + 1) * 4 for c in channels)
    alone = replace(run, parallel=replace(run.parallel, bn_group_images=4))
    assert Program(alone, 4, TOY).batch_norm_messages(4) == []


def test_the_largest_part_is_the_largest_that_fits(run):
    program = Program(replace(run, parallel=replace(run.parallel, bn_group_images=2)), 1, TOY)
    needed = sum(program.memory(8).values())
    for room, expected in ((needed, 8), (needed - 1, 4)):
        program.machine = replace(TOY, memory=room / hardware_room())
        assert program.largest()[0] == expected
    assert program.two_passes(8) and program.step(Cluster(1, 1), 8).compute > program.step(Cluster(1, 1), 16).compute
    program.machine = replace(TOY, memory=1000.0)
    assert program.largest() == (0, f"batch norm over 2 images takes 2 at once, {sum(program.memory(2).values()) / 2**30:.1f} GiB of 0.0; more GPUs, or a smaller group, would do")


def hardware_room() -> float:
    from ssl_pretrain.memory import ROOM

    return ROOM


def test_half_the_cores_wait_for_the_loader(run):
    fast, slow = (Program(run, 1, replace(TOY, decoded_per_core=rate)).step(Cluster(1, 1), 16) for rate in (1e9, 1e-3))
    assert fast.data == 0 and slow.bound == "data"
    assert slow.total == pytest.approx(16 / 1e-3 / max(1, run.data.num_workers))


def test_this_machine_needs_its_calibration(run, tmp_path):
    settings = replace(run.plan, gpu="here", calibration=str(tmp_path / "calibration.json"))
    with pytest.raises(ValueError) as error:
        hardware.machine(settings)
    assert str(error.value) == (
        f"plan.gpu: here needs {settings.calibration}, which is not there; "
        "python -m ssl_pretrain.calibrate measures this machine in a minute and writes it"
    )
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match=r"plan.calibration: .* is not a calibration \(.*\); python -m ssl_pretrain.calibrate writes one"):
        hardware.machine(settings)


def test_a_calibration_counts_for_its_own_gpu_alone(run, tmp_path):
    measured = replace(TOY, name="NVIDIA H100 80GB HBM3", source="python -m ssl_pretrain.calibrate, then")
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(asdict(measured)))
    settings = replace(run.plan, gpu="H100", calibration=str(path), inter_node_gb_per_second=25.0)
    assert hardware.machine(settings) == replace(measured, inter_node=25e9)
    assert hardware.machine(replace(settings, gpu="A100")).source == "data sheets"
    assert hardware.machine(replace(settings, gpu="here")).matmul == measured.matmul


def test_data_sheets_are_in_the_right_units():
    for machine in MACHINES.values():
        assert 1e14 < machine.matmul < 1e15 and 5e11 < machine.bandwidth < 5e12 and 4e10 < machine.memory < 2e11
    assert MACHINES["H200"].bandwidth / MACHINES["H100"].bandwidth == pytest.approx(4.8 / 3.35)


def test_the_cluster_of_a_plan_is_launchs(run):
    settings = replace(run, plan=replace(run.plan, gpu="A100"), launch=replace(run.launch, nodes=3, gpus_per_node=8))
    assert plan.ranks(settings, here=2) == 24
    assert plan.ranks(run, here=2) == 2
    assert "memory and time: plan.gpu=H100 computes them" in plan.describe(run)


def test_a_plan_is_for_any_run_that_goes_on(run):
    other = replace(run, plan=replace(run.plan, gpu="L40S"))
    config.compare_for_resume(config.to_dict(run), other, "runs/x/checkpoints/step_1")


