"""Planned size, host memory and time of a checkpoint, against one on the disk and by hand."""

from dataclasses import replace

import pytest
import torch
from suites import quick_and_full
from test_configs import REPRESENTATIVES, reduce_recipe

from ssl_pretrain import config
from ssl_pretrain.build import build_method
from ssl_pretrain.checkpoint import tensor_files
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.optim import optimizers
from ssl_pretrain.planning import checkpoint_plan
from ssl_pretrain.planning.checkpoint_plan import CheckpointPlan
from ssl_pretrain.planning.communication import Cluster
from ssl_pretrain.planning.estimate import Estimate
from ssl_pretrain.planning.hardware import MACHINES

MIB = 2**20
ONE_GPU = Cluster(1, 1)


def load_run(tmp_path, stem):
    path = next(path for path in REPRESENTATIVES if path.stem == stem)
    return reduce_recipe(path, tmp_path)


@pytest.mark.parametrize(
    "stem", quick_and_full(["simclr_imagenet"], ["simclr_imagenet", "moco_v3_imagenet"])
)
def test_the_planned_size_is_that_of_the_tensors_on_the_disk(stem, tmp_path):
    run = load_run(tmp_path, stem)
    method = build_method(run)
    optimizer = optimizers.build(run.optim, method)
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizers.step_if_finite(optimizer)
    tensors_by_file = TrainingState(method, optimizer).snapshot()
    tensor_files.write_full_tensors(tmp_path / "step", tmp_path / "staging", tensors_by_file, {})
    estimate = Estimate(run, ONE_GPU, MACHINES["H100"])
    plan = CheckpointPlan.build(estimate.method, estimate.optimizer_trace_and_bytes[1], 1)
    assert plan.disk_bytes == sum(
        value.nbytes for tensors in tensors_by_file.values() for value in tensors.values()
    )
    written_bytes = sum(file.stat().st_size for file in (tmp_path / "step").glob("*.safetensors"))
    assert plan.disk_bytes < written_bytes < 1.1 * plan.disk_bytes  # headers are small
    assert plan.host_bytes == plan.disk_bytes


def test_a_vit_l_on_one_rank_is_planned_whole(tmp_path):
    run = load_run(tmp_path, "simclr_imagenet")
    run = replace(run, checkpoint=replace(run.checkpoint, keep_last=3, asynchronous=False))
    num_weights = 303_301_632
    plan = CheckpointPlan(4 * num_weights, 0, 8 * num_weights, 1)
    assert checkpoint_plan.describe(run, plan, ONE_GPU) == [
        "checkpoint: 3.39 GiB (1.13 weights, 2.26 optimizer, 0.00 buffers); the newest 3 are kept, "
        "and one more while it is written",
        "  host memory of a save: 3.39 GiB on rank 0",
        "  written in 3.6 s at 1 GB/s (plan.disk_gb_per_second, for all ranks together); training "
        "waits",
    ]


def test_a_vit_g_on_sixteen_ranks_is_planned_in_shards(tmp_path):
    run = load_run(tmp_path, "simclr_imagenet")
    run = replace(run, plan=replace(run.plan, disk_gb_per_second=4.0))
    num_weights = 1_011_202_432
    # Student and teacher, AdamW's two moments of the student.
    plan = CheckpointPlan(8 * num_weights, 64 * MIB, 8 * num_weights, 16)
    own_bytes = num_weights + 64 * MIB
    assert plan.host_bytes == own_bytes + 2 * tensor_files.MAX_SHARD_FILE_BYTES
    assert checkpoint_plan.describe(run, plan, Cluster(2, 8)) == [
        "checkpoint: 15.13 GiB (7.53 weights, 7.53 optimizer, 0.06 buffers); the newest 2 are "
        "kept, and one more while it is written",
        "  host memory of a save: 1.50 GiB per rank, 12.03 GiB per node",
        "  written in 4.1 s at 4 GB/s (plan.disk_gb_per_second, for all ranks together); training "
        "continues meanwhile",
    ]


def test_a_disk_without_a_rate_is_refused(tmp_path):
    path = next(path for path in REPRESENTATIVES if path.stem == "simclr_imagenet")
    with pytest.raises(ValueError) as error:
        config.load(path, ["plan.disk_gb_per_second=0"])
    assert str(error.value) == (
        f"{path}: plan.disk_gb_per_second: 0.0 is out of range; give a finite number > 0 and "
        "<= 1000000.0"
    )
