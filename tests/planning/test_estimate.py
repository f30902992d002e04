"""What a plan says of a machine: counted parts against the built run, the models of time against numbers known without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import traffic
from test_configs import FIRST, _reduced

from ssl_pretrain import config
from ssl_pretrain.build import build_method
from ssl_pretrain.distributed import process_group
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.parallel.memory import ROOM
from ssl_pretrain.planning import communication, hardware, plan
from ssl_pretrain.planning.communication import Cluster, Message
from ssl_pretrain.planning.estimate import Program
from ssl_pretrain.planning.hardware import MACHINES, Machine
from ssl_pretrain.planning.trace import CONVOLUTION, MATMUL, OTHER, Trace

QUICK = ("simclr", "swav")  # the others are long tests
TOY = Machine(
    "toy",
    1e9,
    1e12,
    1e11,
    5e11,
    1e9,
    1e8,
    1e7,
    launch_seconds=0.0,
    latency_seconds=1e-3,
    on_cpu=True,
)


@pytest.fixture
def run(tmp_path):
    path = next(path for path in FIRST if path.stem == "simclr_imagenet")
    return _reduced(path, tmp_path)


def columns(flops, moved, kinds, wide) -> Trace:
    return Trace(
        np.array(flops),
        np.array(moved),
        np.zeros(len(flops)),
        np.array(kinds),
        np.array(wide),
        [],
        {},
    )


@pytest.mark.parametrize(
    "path",
    [
        path
        if path.stem.split("_imagenet")[0] in QUICK
        else pytest.param(path, marks=pytest.mark.full)
        for path in FIRST
    ],
    ids=lambda path: path.stem,
)
def test_every_method_has_a_plan(path, tmp_path):
    run = _reduced(path, tmp_path)
    run = replace(
        run,
        plan=replace(run.plan, gpu="H100", num_images=10_000),
        launch=replace(run.launch, nodes=2, gpus_per_node=2),
    )
    text = plan.describe(run, plan.ranks(run, here=1))
    for line in (
        "# on 4 x H100, 2 nodes of 2: rates from data sheets",
        "of the step's peak:",
        "largest local batch: 4 of its share of 4",
        "a step: ",
    ):
        assert line in text, text
    seconds = float(text.partition("a step: ")[2].partition(" ms")[0].replace(",", ""))
    listed = [
        float(line.split()[0])
        for line in text.splitlines()
        if line.startswith("  ") and " ms  " in line
    ]
    assert sum(listed) == pytest.approx(seconds, rel=0.05, abs=0.1)


def test_parameters_gradients_and_optimizer_are_those_of_the_run(run):
    for settings in (run.optim, replace(run.optim, name="adamw")):
        run = replace(run, optim=settings)
        method = build_method(run)
        optimizer = optim.build(run.optim, method)
        for parameter in method.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optim.guarded_step(optimizer)
        program = Program(run, Cluster(1, 1), TOY)
        sizes = program.memory(4)
        assert sizes["parameters"] + sizes["teacher"] == sum(p.nbytes for p in method.parameters())
        assert program.gradient_bytes == sum(
            p.nbytes for p in method.parameters() if p.requires_grad
        )
        assert sizes["optimizer"] == sum(
            z.nbytes for state in optimizer.state.values() for z in state.values()
        )
        assert sizes["buffers"] == sum(b.nbytes for b in method.buffers())


def test_each_operation_is_as_slow_as_its_arithmetic_or_its_memory():
    trace = columns(
        [2e12, 1e11, 5e11, 10],
        [10, 10, 3e9, 2e9],
        [MATMUL, MATMUL, CONVOLUTION, OTHER],
        [False, True, False, False],
    )
    assert TOY.bounds(trace) == pytest.approx((2.0 + 1.0, 3.0 + 2.0))
    assert replace(TOY, attained=0.5, launch_seconds=0.25).seconds(trace) == pytest.approx(
        16.0 + 4 * 0.25
    )  # a CPU does both itself
    gpu = replace(TOY, attained=0.5, on_cpu=False)
    assert replace(gpu, launch_seconds=0.25).seconds(trace) == pytest.approx(16.0)
    assert replace(gpu, launch_seconds=5.0).seconds(trace) == pytest.approx(20.0)


def test_a_collective_takes_its_ring_and_its_tree():
    inside, across = Cluster(1, 16), Cluster(4, 4)
    gather, reduction = (Message(name, 16_000_000, 16) for name in ("allgather", "allreduce"))
    assert communication.seconds(TOY, inside, [gather]) == pytest.approx(15 / 16 * 0.16 + 4e-3)
    assert communication.seconds(TOY, inside, [reduction, gather]) == pytest.approx(
        3 * 15 / 16 * 0.16 + 8e-3
    )
    assert communication.seconds(TOY, across, [gather]) == pytest.approx(15 / 16 * 1.6 + 4e-3)
    within = replace(gather, ranks=4)
    assert communication.seconds(TOY, across, [within, replace(within, times=2)]) == pytest.approx(
        3 * (3 / 4 * 0.16 + 2e-3)
    )
    assert communication.seconds(TOY, across, [replace(within, across=True)]) == pytest.approx(
        3 / 4 * 1.6 + 2e-3
    )


def test_batch_norm_across_ranks_sends_its_sums():
    messages = communication.of_batch_norm(
        {"forward": [3, 5], "backward": [5]}, ranks=4, itemsize=4
    )
    assert [(m.collective, m.size) for m in messages] == [
        ("allgather", 4 * 4 * 7),
        ("allgather", 4 * 4 * 11),
        ("allreduce", 4 * 10),
    ]


@pytest.mark.parametrize("ranks", [3, 4])
def test_sharded_weights_travel_as_the_counted_bytes_do(run, ranks):
    """tests/traffic.py's formula, which the tests of FSDP hold against bytes counted at the collectives."""
    method = build_method(run).double()
    settings = replace(run.parallel, strategy="fsdp")
    units = communication.units(method, {"backbone": 1}, ranks)
    there, back = communication.of_weights(
        units, settings, Cluster(1, ranks), low=False, itemsize=8
    )
    with process_group.fake_process_group(ranks):
        expected = traffic.predicted(method, "fsdp", dim=8, rows=2, calls=1)
    assert sum(m.sent for m in [*there, *back] if m.collective == "allgather") == pytest.approx(
        float(expected["weights"])
    )
    assert sum(m.sent for m in back if m.collective == "reduce_scatter") == pytest.approx(
        float(expected["gradients"])
    )


def test_shards_divide_what_stays_and_cost_what_is_gathered(run):
    nodes = replace(TOY, inter_node=1e6)
    plain, whole, hybrid = (
        Program(
            replace(run, parallel=replace(run.parallel, strategy=strategy)), Cluster(2, 2), nodes
        )
        for strategy in ("ddp", "fsdp", "hybrid")
    )
    for program, shards in ((whole, 4), (hybrid, 2)):
        for part in ("parameters", "optimizer", "teacher"):
            assert program.memory(4)[part] == plain.memory(4)[part] / shards
        assert program.memory(4)["DDP's buckets"] == 0 < program.memory(4)["gathered weights"]
        assert program.peak(4) < plain.peak(4)
    exposed = {
        name: program.step(4).exposed
        for name, program in (("plain", plain), ("whole", whole), ("hybrid", hybrid))
    }
    assert (
        exposed["whole"] > exposed["plain"] > exposed["hybrid"]
    )  # thrice the bytes; the slow links carry half of the gradients


def test_activations_computed_again_are_not_kept(run):
    run = replace(run, backbone=replace(run.backbone, name="test_vit"))
    kept, again = (
        Program(
            replace(run, parallel=replace(run.parallel, activation_checkpointing=how)),
            Cluster(1, 1),
            TOY,
        )
        for how in ("none", "blocks")
    )
    assert again.activations(4) < kept.activations(4)
    assert (
        again.part.few.phase("backward").flops.sum() > kept.part.few.phase("backward").flops.sum()
    )
    assert again.part.few.phase("forward").flops.sum() == kept.part.few.phase("forward").flops.sum()


def test_the_largest_part_is_the_largest_that_fits(run):
    program = Program(
        replace(run, parallel=replace(run.parallel, bn_group_images=2)), Cluster(1, 1), TOY
    )
    needed = sum(program.memory(8).values())
    for room, expected in ((needed, 8), (needed - 1, 4)):
        program.machine = replace(TOY, memory=room / ROOM)
        assert program.largest()[0] == expected
    assert program.two_passes(8) and program.step(8).compute > program.step(16).compute
    program.machine = replace(TOY, memory=1000.0)
    assert program.largest() == (
        0,
        f"batch norm over 2 images takes 2 at once, {sum(program.memory(2).values()) / 2**30:.1f} GiB of 0.0; more GPUs, or a smaller group, would do",
    )


def test_half_the_cores_wait_for_the_loader(run):
    fast, slow = (
        Program(run, Cluster(1, 1), replace(TOY, decoded_per_core=rate)).step(16)
        for rate in (1e9, 1e-3)
    )
    assert fast.data == 0 and slow.bound == "data"
    assert slow.total == pytest.approx(16 / 1e-3 / max(1, run.data.num_workers))


def test_the_links_of_the_config_replace_the_data_sheets(run):
    settings = replace(run.plan, gpu="H100", inter_node_gb_per_second=25.0)
    assert hardware.machine(settings) == replace(MACHINES["H100"], inter_node=25e9)


def test_data_sheets_are_in_the_right_units():
    for machine in MACHINES.values():
        assert (
            1e14 < machine.matmul < 1e15
            and 5e11 < machine.bandwidth < 5e12
            and 4e10 < machine.memory < 2e11
        )
    assert MACHINES["H200"].bandwidth / MACHINES["H100"].bandwidth == pytest.approx(4.8 / 3.35)


def test_the_cluster_of_a_plan_is_launchs(run):
    settings = replace(
        run,
        plan=replace(run.plan, gpu="A100"),
        launch=replace(run.launch, nodes=3, gpus_per_node=8),
    )
    assert plan.ranks(settings, here=2) == 24
    assert plan.ranks(run, here=2) == 2
    assert "memory and time: plan.gpu=H100 computes them" in plan.describe(run)


def test_a_plan_is_for_any_run_that_goes_on(run):
    other = replace(run, plan=replace(run.plan, gpu="L40S"))
    config.compare_for_resume(config.to_dict(run), other, "runs/x/checkpoints/step_1")
