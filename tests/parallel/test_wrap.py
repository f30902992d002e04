"""Replicated and sharded runs train the same weights on any number of ranks.

The bytes that travel between ranks are counted as well.
"""

import os
import shutil

import networks
import pytest
import torch
from conftest import run_ranks
from networks import CASES, run
from suites import quick_and_full
from traffic import Traffic, predict_bytes

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.initial_weights import read_evaluated_weights
from ssl_pretrain.checkpoint.manifest import verify_checkpoint
from ssl_pretrain.checkpoint.tensor_files import import_dcp_with_safetensors
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel import wrap as parallel

NUM_STEPS, SAVED_STEP = 20, 16
SGD = {
    "name": "sgd",
    "base_lr": 0.01,
    "lr_scaling": "none",
    "warmup_epochs": 1,
    "nesterov": True,
    "clip_norm": 0.5,
}
LARC = {"name": "larc", "base_lr": 0.1, "lr_scaling": "none", "warmup_epochs": 1}
NO_WARMUP = {**SGD, "base_lr": 1.0, "warmup_epochs": 0, "nesterov": False}
MICRO_BATCHES = {"num_micro_batches": 2, "bn_group_images": 2}  # on 2 ranks
NORMS = {"simclr": "bn1", "clip": "bn1", "simcse": "network.embeddings.LayerNorm"}
FLOAT64 = {"precision": "float64"}  # orders of summation differ by less than 1e-9


def _assert_close(tensors, expected, tolerance=1e-9):
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            tensors[name],
            value,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# The other cases take a minute each.
NAMES = quick_and_full(["dino"], CASES)


def _resume_on_four_ranks(folder, name):
    """Stop and resume on 4 ranks with sharded weights. Copy the checkpoint for other ranks."""
    run(name, SAVED_STEP, folder / "four", strategy="fsdp", **FLOAT64)
    if process_group.is_main():
        for copy_name in ("one", "two ddp", "two fsdp"):
            shutil.copytree(folder / "four", folder / copy_name)
    collectives.barrier()
    return run(name, NUM_STEPS - SAVED_STEP, folder / "four", strategy="fsdp", **FLOAT64)["state"]


def _train_on_two_ranks(folder, name):
    """Train from the start and from the checkpoint of 4 ranks, replicated and sharded."""
    states = {}
    for strategy in ("ddp", "fsdp"):
        settings = {"strategy": strategy, **FLOAT64}
        checkpoint = folder / f"two {strategy}"
        states[strategy] = run(name, NUM_STEPS, **settings)["state"]
        resumed = run(name, NUM_STEPS - SAVED_STEP, checkpoint, **settings)
        states[f"resumed {strategy}"] = resumed["state"]
    return states


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_are_the_same_replicated_or_sharded_on_one_two_or_four_ranks(name, tmp_path):
    """Runs stopped on four ranks resume on four, two and one."""
    uninterrupted = run(name, NUM_STEPS, **FLOAT64)["state"]
    for state in run_ranks(_resume_on_four_ranks, tmp_path, name, world_size=4):
        _assert_close(state, uninterrupted)
    for rank in run_ranks(_train_on_two_ranks, tmp_path, name, world_size=2):
        for state in rank.values():
            _assert_close(state, uninterrupted)
    with pytest.warns(
        UserWarning,
        match="resuming is exact up to rounding, not bit for bit: world_size was 4 and is now 1",
    ):
        _assert_close(
            run(name, NUM_STEPS - SAVED_STEP, tmp_path / "one", **FLOAT64)["state"], uninterrupted
        )
    prefix = "teacher.backbone." if name == "dino" else "backbone."
    expected = {
        key.removeprefix(prefix): value
        for key, value in uninterrupted.items()
        if key.startswith(prefix)
    }
    for folder in ("four", "two ddp", "two fsdp", "one"):
        _assert_close(read_evaluated_weights(newest_checkpoint(tmp_path / folder)), expected)
    norm = uninterrupted[f"backbone.model.{NORMS.get(name, 'norm')}.weight"]
    assert not torch.allclose(norm, torch.ones(()).double())


def _run_cases_on_four_ranks(folder):
    uninterrupted = run("dino", 4, strategy="fsdp")["state"]
    run("dino", 2, folder, strategy="fsdp")
    results = {"bits": (uninterrupted, run("dino", 2, folder, strategy="fsdp")["state"])}
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return results | {
        "hybrid": run("dino", 2, strategy="hybrid", **FLOAT64)["state"],
        "node": _ranks_of_bn_group(),
    }


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_ranks(_run_cases_on_four_ranks, tmp_path_factory.mktemp("four"), world_size=4)


def _find_tensors_changed_by_nan():
    """Return the tensors that a sharded step changes if one pixel of one rank is NaN."""
    changed = {}
    for name in ("dino", "simclr"):  # AdamW and LARS
        stepper, sizes = networks.build_case(name, strategy="fsdp")
        networks.take_step(stepper, sizes, 0)
        before = networks.full_state(parallel.unwrap(stepper.model))
        local_batch = networks.random_batch(1, sizes).slice(
            process_group.rank(), process_group.world_size()
        )
        local_batch.views[1][0, 0, 0, 0] = float("nan") if process_group.rank() else 0.0
        logs = stepper(Progress(1, 20, 2), local_batch).logs
        after = networks.full_state(parallel.unwrap(stepper.model))
        assert logs["skipped_steps"] == 1
        changed[name] = [
            key
            for key, value in after.items()
            if not torch.equal(value, before[key]) and "num_batches" not in key
        ]
    return changed


def _run_cases_on_two_ranks():
    results: dict = {"changed": _find_tensors_changed_by_nan()}
    results |= {
        name: run(
            name, 2, strategy="fsdp", reshard_after_forward=False, **MICRO_BATCHES, **FLOAT64
        )["state"]
        for name in ("simclr", "dino")
    }
    for name, optimizer in (("sgd", SGD), ("larc", LARC)):
        results[name] = run("dino", 2, strategy="fsdp", optimizer=optimizer, **FLOAT64)["state"]
    for strategy in ("ddp", "fsdp"):
        settings = {"strategy": strategy, "optimizer": NO_WARMUP}
        results[f"gradients {strategy}"] = [
            run("dino", 1, gradients=kind, **settings)["state"] for kind in ("float32", "bfloat16")
        ]
        results[f"bfloat16 {strategy}"] = run(
            "moco_v3", 2, strategy=strategy, precision="bfloat16"
        )["state"]
    return results


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(_run_cases_on_two_ranks, world_size=2)


def test_four_resumed_ranks_equal_uninterrupted_ones_bit_for_bit(four_ranks):
    for rank in four_ranks:
        uninterrupted, resumed = rank["bits"]
        assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())


def test_shards_within_each_node_train_the_same_weights(four_ranks):
    expected = run("dino", 2, **FLOAT64)["state"]
    for rank in four_ranks:
        _assert_close(rank["hybrid"], expected)


@pytest.mark.parametrize("name", ["simclr", "dino"])
def test_micro_batches_of_sharded_ranks_equal_those_of_one_process(name, two_ranks):
    expected = run(name, 2, num_micro_batches=4, bn_group_images=2, **FLOAT64)["state"]
    for rank in two_ranks:
        _assert_close(rank[name], expected)


@pytest.mark.parametrize(("name", "optimizer"), [("sgd", SGD), ("larc", LARC)])
def test_norms_of_shards_equal_those_of_whole_tensors(name, optimizer, two_ranks):
    expected = run("dino", 2, optimizer=optimizer, **FLOAT64)["state"]
    for rank in two_ranks:
        _assert_close(rank[name], expected)


def test_a_nonfinite_batch_changes_no_shard_on_any_rank(two_ranks):
    assert [rank["changed"] for rank in two_ranks] == [{"dino": [], "simclr": []}] * 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bfloat16_gradients_differ_only_by_rounding(strategy, two_ranks):
    start = networks.full_state(
        parallel.unwrap(networks.build_case("dino", optimizer=NO_WARMUP)[0].model)
    )
    exact, rounded = two_ranks[0][f"gradients {strategy}"]
    update_norms = {
        name: (exact[name] - start[name]).norm()
        for name in exact
        if name.startswith(("backbone", "head"))
    }
    errors = {
        name: ((rounded[name] - exact[name]).norm() / norm).item()
        for name, norm in update_norms.items()
        if norm > 1e-3
    }
    assert len(errors) > 10 and 1e-4 < max(errors.values()) < 2**-6


def test_bfloat16_shards_train_like_replicated_weights(two_ranks):
    replicated, sharded = two_ranks[0]["bfloat16 ddp"], two_ranks[0]["bfloat16 fsdp"]
    assert all(value.isfinite().all() for value in sharded.values() if value.is_floating_point())
    _assert_close(sharded, replicated, tolerance=5e-3)


def _ranks_of_bn_group():
    import torch.distributed as dist

    module = batch_norm.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), 2, 4)
    return dist.get_process_group_ranks(module[0].group)


def test_a_batch_norm_group_within_a_node_uses_its_ranks(four_ranks):
    assert [rank["node"] for rank in four_ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def _count_bytes(name, strategy):
    """Return counted and predicted bytes that this rank sends in one step, by kind."""
    stepper, sizes = networks.build_case(name, strategy=strategy, rows=6, **FLOAT64)
    networks.take_step(stepper, sizes, 0)
    local_batch = networks.random_batch(1, sizes, 6).slice(
        process_group.rank(), process_group.world_size()
    )
    with Traffic() as traffic:
        stepper(Progress(1, 20, 2), local_batch)
    expected = predict_bytes(
        parallel.unwrap(stepper.model),
        strategy,
        dim=9,
        rows=len(local_batch),
        calls=1 if name == "simclr" else 2,
    )
    return dict(traffic.sent), {kind: count for kind, count in expected.items() if count}


def _count_bytes_of_all_cases():
    return {
        f"{name} {strategy}": _count_bytes(name, strategy)
        for name in ("simclr", "moco_v3")
        for strategy in ("ddp", "fsdp")
    }


def test_bytes_sent_equal_the_formulas():
    for rank in run_ranks(_count_bytes_of_all_cases, world_size=3):
        for case, (counted, expected) in rank.items():
            assert counted == expected, case
        assert rank["simclr ddp"][0].keys() == {
            "gather",
            "loss backward",
            "batch norm forward",
            "batch norm backward",
            "gradients",
        }
        assert rank["simclr fsdp"][0].keys() == {*rank["simclr ddp"][0], "weights", "norms"}


def _save_with_a_full_disk_on_rank_1(folder):
    import resource

    run("dino", 1, folder, strategy="fsdp")
    if process_group.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        run("dino", 1, folder, strategy="fsdp")
    except OSError as error:
        return str(error)


def test_all_ranks_name_the_one_that_cannot_write_and_older_checkpoints_stay(tmp_path):
    messages = run_ranks(_save_with_a_full_disk_on_rank_1, tmp_path, world_size=2)
    assert messages[0] == messages[1]
    assert "rank 1: [Errno 27] File too large" in messages[0]
    assert "Older checkpoints are intact" in messages[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    verify_checkpoint(newest_checkpoint(tmp_path))
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}  # no pickle


def test_a_torch_without_safetensors_shards_is_refused(monkeypatch):
    import torch.distributed.checkpoint as dcp

    monkeypatch.delattr(dcp, "HuggingFaceStorageWriter")
    with pytest.raises(ValueError) as error:
        import_dcp_with_safetensors()
    assert str(error.value) == (
        "parallel.strategy: sharded checkpoints need the safetensors storage of "
        f"torch.distributed.checkpoint, which torch {torch.__version__} does not have; install "
        "torch>=2.13, or train with parallel.strategy=ddp"
    )
