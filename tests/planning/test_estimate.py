"""Estimated memory against a built run, and estimated times against numbers computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import traffic
from suites import quick_and_full
from test_configs import REPRESENTATIVES, reduce_recipe

from ssl_pretrain import config, schema
from ssl_pretrain.build import build_method
from ssl_pretrain.distributed import process_group
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.parallel.memory import GIB, USABLE_FRACTION
from ssl_pretrain.planning import communication, hardware, plan
from ssl_pretrain.planning.communication import Cluster, Message
from ssl_pretrain.planning.estimate import Estimate
from ssl_pretrain.planning.hardware import MACHINES, Machine
from ssl_pretrain.planning.trace import CONVOLUTION, MATMUL, OTHER, Trace

QUICK = ("simclr", "swav")  # the other methods are planned in the long suite
TOY = Machine(
    "toy",
    memory_bytes=1e10,
    matmul_rate=1e12,
    float32_matmul_rate=1e11,
    convolution_rate=5e11,
    memory_bandwidth=1e9,
    intra_node_bandwidth=1e8,
    inter_node_bandwidth=1e7,
    launch_seconds=0.0,
    latency_seconds=1e-3,
)
ONE_GPU = Cluster(1, 1)


@pytest.fixture
def run(tmp_path):
    path = next(path for path in REPRESENTATIVES if path.stem == "simclr_imagenet")
    return reduce_recipe(path, tmp_path)


def make_trace(flops, bytes_moved, kinds, without_tensor_cores) -> Trace:
    bytes_held = np.zeros(len(flops))
    lists = (flops, bytes_moved, bytes_held, kinds, without_tensor_cores)
    columns = [np.array(values) for values in lists]
    return Trace(*columns, collectives=[], batch_norm_channels={})


@pytest.mark.parametrize(
    "path",
    quick_and_full(
        [path for path in REPRESENTATIVES if path.stem.split("_imagenet")[0] in QUICK],
        REPRESENTATIVES,
    ),
    ids=lambda path: path.stem,
)
def test_every_method_has_a_plan(path, tmp_path):
    run = reduce_recipe(path, tmp_path)
    run = replace(
        run,
        plan=replace(run.plan, gpu="H100", num_images=10_000),
        launch=replace(run.launch, nodes=2, gpus_per_node=2),
    )
    text = plan.describe(run, plan.num_ranks(run, default=1))
    for line in (
        "# on 4 x H100, 2 nodes of 2: rates from data sheets",
        "at the peak of the step:",
        "largest micro-batch: 4 of the 4 images per rank",
        "share of the roofline: not measured on H100 for ",
        "time per step: at least ",
        "epochs per day: at most ",
    ):
        assert line in text, text
    time_text = text.partition("time per step: at least ")[2].partition(" ms")[0]
    total = float(time_text.replace(",", ""))
    components = [line for line in text.splitlines() if line.startswith("  ") and " ms  " in line]
    sum_of_components = sum(float(line.split()[0]) for line in components)
    assert sum_of_components == pytest.approx(total, rel=0.05, abs=0.1)


@pytest.mark.parametrize("optimizer_name", ["lars", "adamw"])
def test_weights_and_optimizer_take_the_bytes_of_the_built_run(run, optimizer_name):
    run = replace(run, optim=replace(run.optim, name=optimizer_name))
    method = build_method(run)
    optimizer = optim.build(run.optim, method)
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optim.step_if_finite(optimizer)
    estimate = Estimate(run, ONE_GPU, TOY)
    sizes = estimate.memory_by_component(4)
    assert sizes["parameters"] + sizes["teacher"] == sum(p.nbytes for p in method.parameters())
    assert estimate.gradient_bytes == sum(p.nbytes for p in method.parameters() if p.requires_grad)
    state = [value for entries in optimizer.state.values() for value in entries.values()]
    assert sizes["optimizer"] == sum(value.nbytes for value in state)
    assert sizes["buffers"] == sum(buffer.nbytes for buffer in method.buffers())


@pytest.mark.parametrize(
    ("precision", "has_copies"),
    quick_and_full([("bfloat16", True)], [("bfloat16", True), ("float32", False)]),
)
def test_a_teachers_weights_are_also_kept_in_bfloat16(tmp_path, precision, has_copies):
    path = next(path for path in REPRESENTATIVES if path.stem == "byol_imagenet")
    run = reduce_recipe(path, tmp_path)
    run = replace(run, parallel=replace(run.parallel, precision=precision))
    estimate = Estimate(run, ONE_GPU, TOY)
    teacher = estimate.method.teacher
    bytes_in_float32 = sum(4 * p.numel() for p in teacher.parameters())
    matrices = [p for name, p in teacher.named_parameters() if p.ndim > 1]
    copied = estimate.memory_by_component(16)["teacher"] - bytes_in_float32
    if has_copies:  # biases of linear layers are the only other copies
        assert copied == pytest.approx(sum(2 * p.numel() for p in matrices), rel=0.01)
    else:
        assert copied == 0


def test_an_operation_takes_the_longer_of_its_arithmetic_and_its_memory_time():
    trace = make_trace(
        [2e12, 1e11, 5e11, 10],
        [10, 10, 3e9, 2e9],
        [MATMUL, MATMUL, CONVOLUTION, OTHER],
        [False, True, False, False],
    )
    assert TOY.bound_seconds(trace) == pytest.approx((2.0 + 1.0, 3.0 + 2.0))
    half_rate = replace(TOY, roofline_share=0.5)
    assert replace(half_rate, launch_seconds=0.25).trace_seconds(trace) == pytest.approx(16.0)
    assert replace(half_rate, launch_seconds=5.0).trace_seconds(trace) == pytest.approx(20.0)


def test_a_collective_takes_the_bandwidth_of_a_ring_and_the_latency_of_a_tree():
    one_node, four_nodes = Cluster(1, 16), Cluster(4, 4)
    gather, reduction = (Message(name, 16_000_000, 16) for name in ("allgather", "allreduce"))
    small_gather = replace(gather, num_ranks=4)
    for cluster, messages, expected in (
        (one_node, [gather], 15 / 16 * 0.16 + 4e-3),
        (one_node, [reduction, gather], 3 * 15 / 16 * 0.16 + 8e-3),
        (four_nodes, [gather], 15 / 16 * 1.6 + 4e-3),
        (
            four_nodes,
            [small_gather, replace(small_gather, num_repeats=2)],
            3 * (3 / 4 * 0.16 + 2e-3),
        ),
        (four_nodes, [replace(small_gather, crosses_nodes=True)], 3 / 4 * 1.6 + 2e-3),
    ):
        assert communication.message_seconds(TOY, cluster, messages) == pytest.approx(expected)


def test_batch_norm_across_ranks_sends_its_statistics_and_their_gradients():
    channels = {"forward": [3, 5], "backward": [5]}
    messages = communication.batch_norm_messages(channels, ranks_per_group=4, itemsize=4)
    assert [(m.collective, m.num_bytes) for m in messages] == [
        ("allgather", 4 * 4 * 7),
        ("allgather", 4 * 4 * 11),
        ("allreduce", 4 * 10),
    ]


@pytest.mark.parametrize("ranks", [3, 4])
def test_sharded_weights_send_the_predicted_bytes(run, ranks):
    """The prediction of tests/traffic.py, which the tests of FSDP compare with counted bytes."""
    method = build_method(run).double()
    settings = replace(run.parallel, strategy="fsdp")
    units = communication.divide_into_units(method, {"backbone": 1}, ranks)
    forward, backward = communication.weight_messages(
        units, settings, Cluster(1, ranks), in_bfloat16=False, itemsize=8
    )
    with process_group.fake_process_group(ranks):
        expected = traffic.predict_bytes(method, "fsdp", dim=8, rows=2, calls=1)
    gathered_bytes = sum(m.bytes_sent for m in forward + backward if m.collective == "allgather")
    reduced_bytes = sum(m.bytes_sent for m in backward if m.collective == "reduce_scatter")
    assert gathered_bytes == pytest.approx(float(expected["weights"]))
    assert reduced_bytes == pytest.approx(float(expected["gradients"]))


def test_the_blocks_of_a_predictor_are_units_of_the_student(tmp_path):
    path = next(path for path in REPRESENTATIVES if path.stem == "ijepa_imagenet")
    method = build_method(reduce_recipe(path, tmp_path))
    units = communication.divide_into_units(method, {"backbone": 2, "teacher.backbone": 1}, 1)
    assert sum(unit.num_weights for unit in units) == backbones.count_parameters(method)
    blocks = [unit for unit in units if unit.is_block]
    predictor_blocks = [unit for unit in blocks if unit.num_weights == blocks[6].num_weights]
    assert len(blocks) == 6 + 3 + 6 and len(predictor_blocks) == 3
    assert all(unit.is_student and unit.num_calls == 2 for unit in predictor_blocks)
    assert all(unit.num_trained == unit.num_weights for unit in predictor_blocks)


def test_shards_divide_memory_and_cost_communication(run):
    machine = replace(TOY, inter_node_bandwidth=1e6)
    ddp, fsdp, hybrid = (
        Estimate(
            replace(run, parallel=replace(run.parallel, strategy=strategy)), Cluster(2, 2), machine
        )
        for strategy in ("ddp", "fsdp", "hybrid")
    )
    for estimate, num_shards in ((fsdp, 4), (hybrid, 2)):
        sizes = estimate.memory_by_component(4)
        for name in ("parameters", "optimizer", "teacher"):
            assert sizes[name] == ddp.memory_by_component(4)[name] / num_shards
        assert sizes["DDP buckets"] == 0 < sizes["gathered weights"]
        assert estimate.peak_bytes(4) < ddp.peak_bytes(4)
    # FSDP sends three times the bytes. The slow links of hybrid carry half of the gradients.
    exposed_seconds = [estimate.step_time(4).exposed_seconds for estimate in (fsdp, ddp, hybrid)]
    assert exposed_seconds[0] > exposed_seconds[1] > exposed_seconds[2]


def test_activation_checkpointing_saves_memory_and_repeats_operations(run):
    run = replace(run, backbone=replace(run.backbone, name="test_vit"))
    stored, recomputed = (
        Estimate(
            replace(run, parallel=replace(run.parallel, activation_checkpointing=mode)),
            ONE_GPU,
            TOY,
        )
        for mode in ("none", "blocks")
    )

    def flops(estimate: Estimate, phase: str) -> float:
        return estimate.micro_batch_traces.trace_for(2).phase(phase).flops.sum()

    assert recomputed.activation_bytes(4) < stored.activation_bytes(4)
    assert flops(recomputed, "backward") > flops(stored, "backward")
    assert flops(recomputed, "forward") == flops(stored, "forward")


def test_the_largest_micro_batch_just_fits(run):
    run = replace(run, parallel=replace(run.parallel, bn_group_images=2))
    estimate = Estimate(run, ONE_GPU, TOY)
    required_bytes = sum(estimate.memory_by_component(8).values())
    for usable_bytes, expected in ((required_bytes, 8), (required_bytes - 1, 4)):
        estimate.machine = replace(TOY, memory_bytes=usable_bytes / USABLE_FRACTION)
        assert estimate.largest_micro_batch()[0] == expected
    assert estimate.takes_two_passes(8)
    assert estimate.step_time(8).compute_seconds > estimate.step_time(16).compute_seconds
    estimate.machine = replace(TOY, memory_bytes=1000.0)
    assert estimate.largest_micro_batch() == (
        0,
        "batch norm over 2 images needs 2 at once, which take "
        f"{sum(estimate.memory_by_component(2).values()) / GIB:.1f} GiB, "
        "more than the usable 0.0 GiB; "
        "use more GPUs or a smaller group",
    )


def test_a_slow_loader_bounds_the_step(run):
    fast, slow = (
        Estimate(run, ONE_GPU, replace(TOY, decoded_per_core=rate)).step_time(16)
        for rate in (1e9, 1e-3)
    )
    assert fast.loader_seconds == 0 and slow.bottleneck == "data"
    assert slow.total_seconds == pytest.approx(16 / 1e-3 / max(1, run.data.num_workers))


def test_the_links_of_the_config_replace_those_of_the_data_sheet(run):
    settings = replace(run.plan, gpu="H100", inter_node_gb_per_second=25.0)
    assert hardware.configured_machine(settings) == replace(
        MACHINES["H100"], inter_node_bandwidth=25e9
    )


def test_data_sheets_are_in_the_right_units():
    for machine in MACHINES.values():
        assert 1e14 < machine.matmul_rate < 1e15
        assert 5e11 < machine.memory_bandwidth < 5e12
        assert 4e10 < machine.memory_bytes < 2e11
    assert MACHINES["H200"].memory_bandwidth / MACHINES["H100"].memory_bandwidth == pytest.approx(
        4.8 / 3.35
    )


def test_every_gpu_that_can_be_planned_has_rates():
    gpus = schema.field_types(config.PlanConfig)["gpu"].__args__
    assert set(gpus) - {""} == MACHINES.keys()


def test_a_plan_is_for_the_nodes_and_gpus_of_launch(run):
    planned_run = replace(
        run,
        plan=replace(run.plan, gpu="A100"),
        launch=replace(run.launch, nodes=3, gpus_per_node=8),
    )
    assert plan.num_ranks(planned_run, default=2) == 24
    assert plan.num_ranks(run, default=2) == 2
    assert "memory and time: set plan.gpu to H100" in plan.describe(run)


def test_an_automatic_micro_batch_can_be_planned(run):
    text = plan.describe(replace(run, micro_batch_size="auto"))
    assert "in micro-batches as large as memory allows, measured at the start, on 1 rank" in text


def test_a_resumed_run_may_have_a_different_plan(run):
    other = replace(run, plan=replace(run.plan, gpu="L40S"))
    config.check_resume_config(config.to_dict(run), other, "runs/x/checkpoints/step_1")
