"""Whole or sharded, on one process or several: the same weights; what travels, in bytes; blocks recomputed and compiled."""

from __future__ import annotations

import os
import shutil

import networks
import pytest
import torch
from conftest import run_ranks
from networks import CASES, run
from traffic import Traffic, predicted

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.initial_weights import read_evaluated_weights
from ssl_pretrain.checkpoint.manifest import verify
from ssl_pretrain.checkpoint.tensor_files import sharded_storage
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel import wrap as parallel

SAVED, LAST = 16, 20  # steps: stopped once, and the end
SGD = {
    "name": "sgd",
    "base_lr": 0.01,
    "lr_scaling": "none",
    "warmup_epochs": 1,
    "nesterov": True,
    "clip_norm": 0.5,
}
LARC = {"name": "larc", "base_lr": 0.1, "lr_scaling": "none", "warmup_epochs": 1}
AT_ONCE = {**SGD, "base_lr": 1.0, "warmup_epochs": 0, "nesterov": False}  # moves in its first step
PARTS = {"parts": 2, "bn_group_images": 2}  # on 2 ranks
WIDE = {"precision": "float64"}  # where sums in another order may differ by 1e-9


def _same(got, expected, tolerance=1e-9):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name],
            value,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


NAMES = [
    pytest.param(name, marks=() if name == "dino" else pytest.mark.full) for name in CASES
]  # the others take a minute each


def _stopped_on_four(folder, name):
    """Stopped and resumed, sharded over 4 ranks."""
    run(name, SAVED, folder / "four", strategy="fsdp", **WIDE)
    if process_group.is_main():
        for place in ("one", "two ddp", "two fsdp"):
            shutil.copytree(folder / "four", folder / place)
    collectives.barrier()
    return run(name, LAST - SAVED, folder / "four", strategy="fsdp", **WIDE)["state"]


def _on_two(folder, name):
    found = {
        strategy: run(name, LAST, strategy=strategy, **WIDE)["state"]
        for strategy in ("ddp", "fsdp")
    }
    for strategy in ("ddp", "fsdp"):
        found[f"resumed {strategy}"] = run(
            name, LAST - SAVED, folder / f"two {strategy}", strategy=strategy, **WIDE
        )["state"]
    return found


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_whole_or_sharded_on_one_two_or_four_ranks_are_the_same(name, tmp_path):
    """In one go, and stopped after 16 on four ranks and resumed on four, on two, whole, and on one."""
    straight = run(name, LAST, **WIDE)["state"]
    for state in run_ranks(_stopped_on_four, tmp_path, name, world_size=4):
        _same(state, straight)
    for rank in run_ranks(_on_two, tmp_path, name, world_size=2):
        for state in rank.values():
            _same(state, straight)
    with pytest.warns(
        UserWarning,
        match="resuming is exact but not bit for bit: world_size was 4 and is 1",
    ):
        _same(run(name, LAST - SAVED, tmp_path / "one", **WIDE)["state"], straight)
    prefix = "teacher.backbone." if name == "dino" else "backbone."
    expected = {
        key.removeprefix(prefix): value for key, value in straight.items() if key.startswith(prefix)
    }
    for place in ("four", "two ddp", "two fsdp", "one"):
        _same(read_evaluated_weights(newest_checkpoint(tmp_path / place)), expected)
    assert not torch.allclose(
        straight["backbone.model.norm.weight" if name != "simclr" else "backbone.model.bn1.weight"],
        torch.ones(()).double(),
    )


def _of_four(folder):
    straight = run("dino", 4, strategy="fsdp")["state"]
    run("dino", 2, folder, strategy="fsdp")
    found = {"bits": (straight, run("dino", 2, folder, strategy="fsdp")["state"])}
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return found | {
        "hybrid": run("dino", 2, strategy="hybrid", **WIDE)["state"],
        "node": _ranks_of_bn_group(),
    }


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return run_ranks(_of_four, tmp_path_factory.mktemp("four"), world_size=4)


def _nothing_moves():
    """What a step moves, sharded, when one pixel of one rank is not a number."""
    moved = {}
    for name in ("dino", "simclr"):  # AdamW and LARS
        stepper, sizes = networks.setting_up(name, strategy="fsdp")
        networks.take_step(stepper, sizes, 0)
        before = networks.whole(parallel.unwrap(stepper.model))
        own = networks.batch(1, sizes).slice(process_group.rank(), process_group.world_size())
        own.views[1][0, 0, 0, 0] = float("nan") if process_group.rank() else 0.0
        logs = stepper(Progress(1, 20, 2), own).logs
        after = networks.whole(parallel.unwrap(stepper.model))
        assert logs["skipped_steps"] == 1
        moved[name] = [
            key
            for key, value in after.items()
            if not torch.equal(value, before[key]) and "num_batches" not in key
        ]
    return moved


def _of_two():
    found: dict = {"moved": _nothing_moves()}
    found |= {
        name: run(name, 2, strategy="fsdp", reshard_after_forward=False, **PARTS, **WIDE)["state"]
        for name in ("simclr", "dino")
    }
    for name, optimizer in (("sgd", SGD), ("larc", LARC)):
        found[name] = run("dino", 2, strategy="fsdp", optimizer=optimizer, **WIDE)["state"]
    for strategy in ("ddp", "fsdp"):
        shipped = {"strategy": strategy, "optimizer": AT_ONCE}
        found[f"gradients {strategy}"] = [
            run("dino", 1, gradients=kind, **shipped)["state"] for kind in ("float32", "bfloat16")
        ]
        found[f"bfloat16 {strategy}"] = run("moco_v3", 2, strategy=strategy, precision="bfloat16")[
            "state"
        ]
    return found


@pytest.fixture(scope="module")
def of_two():
    return run_ranks(_of_two, world_size=2)


def test_four_ranks_stopped_and_resumed_are_bit_for_bit_those_that_never_stopped(of_four):
    for rank in of_four:
        straight, resumed = rank["bits"]
        assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_shards_within_each_node_train_the_same_weights(of_four):
    expected = run("dino", 2, **WIDE)["state"]
    for rank in of_four:
        _same(rank["hybrid"], expected)


@pytest.mark.parametrize("name", ["simclr", "dino"])
def test_parts_of_shards_leave_the_weights_of_parts_on_one_process(name, of_two):
    expected = run(name, 2, parts=4, bn_group_images=2, **WIDE)["state"]
    for rank in of_two:
        _same(rank[name], expected)


@pytest.mark.parametrize(("name", "optimizer"), [("sgd", SGD), ("larc", LARC)])
def test_norms_of_shards_are_those_of_whole_tensors(name, optimizer, of_two):
    expected = run("dino", 2, optimizer=optimizer, **WIDE)["state"]
    for rank in of_two:
        _same(rank[name], expected)


def test_a_broken_batch_moves_no_shard_on_any_rank(of_two):
    assert [rank["moved"] for rank in of_two] == [{"dino": [], "simclr": []}] * 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_in_bfloat16_are_rounded_and_no_more(strategy, of_two):
    start = networks.whole(parallel.unwrap(networks.setting_up("dino", optimizer=AT_ONCE)[0].model))
    exact, rounded = of_two[0][f"gradients {strategy}"]
    moved = {
        name: (exact[name] - start[name]).norm()
        for name in exact
        if name.startswith(("backbone", "head"))
    }
    errors = {
        name: ((rounded[name] - exact[name]).norm() / size).item()
        for name, size in moved.items()
        if size > 1e-3
    }
    assert len(errors) > 10 and 1e-4 < max(errors.values()) < 2**-6


def test_bfloat16_shards_train_as_whole_weights_do(of_two):
    whole, sharded = of_two[0]["bfloat16 ddp"], of_two[0]["bfloat16 fsdp"]
    assert all(value.isfinite().all() for value in sharded.values() if value.is_floating_point())
    _same(sharded, whole, tolerance=5e-3)


def _ranks_of_bn_group():
    import torch.distributed as dist

    module = batch_norm.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), 2, 4)
    return dist.get_process_group_ranks(module[0].group)


def test_a_batch_norm_group_of_a_node_has_that_nodes_process_group(of_four):
    assert [rank["node"] for rank in of_four] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def _bytes(name, strategy):
    """(counted, predicted) bytes that this rank sends in one step, by kind."""
    stepper, sizes = networks.setting_up(name, strategy=strategy, rows=6, **WIDE)
    networks.take_step(stepper, sizes, 0)
    own = networks.batch(1, sizes, 6).slice(process_group.rank(), process_group.world_size())
    with Traffic() as traffic:
        stepper(Progress(1, 20, 2), own)
    expected = predicted(
        parallel.unwrap(stepper.model),
        strategy,
        dim=9,
        rows=len(own),
        calls=1 if name == "simclr" else 2,
    )
    return dict(traffic.sent), {kind: count for kind, count in expected.items() if count}


def _all_bytes():
    return {
        f"{name} {strategy}": _bytes(name, strategy)
        for name in ("simclr", "moco_v3")
        for strategy in ("ddp", "fsdp")
    }


def test_bytes_sent_are_those_of_the_formulas():
    for rank in run_ranks(_all_bytes, world_size=3):
        for what, (counted, expected) in rank.items():
            assert counted == expected, what
        assert rank["simclr ddp"][0].keys() == {
            "gather",
            "loss backward",
            "batch norm forward",
            "batch norm backward",
            "gradients",
        }
        assert rank["simclr fsdp"][0].keys() == {*rank["simclr ddp"][0], "weights", "norms"}


def _one_rank_has_no_room(folder):
    import resource

    run("dino", 1, folder, strategy="fsdp")
    if process_group.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        run("dino", 1, folder, strategy="fsdp")
    except OSError as error:
        return str(error)


def test_a_rank_that_cannot_write_is_named_on_all_and_older_checkpoints_stay(tmp_path):
    said = run_ranks(_one_rank_has_no_room, tmp_path, world_size=2)
    assert (
        said[0] == said[1]
        and "rank 1: [Errno 27] File too large" in said[0]
        and "Older checkpoints are intact" in said[0]
    )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    verify(newest_checkpoint(tmp_path))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
    }  # never a pickle


def test_a_torch_without_safetensors_shards_is_refused(monkeypatch):
    import torch.distributed.checkpoint as dcp

    monkeypatch.delattr(dcp, "HuggingFaceStorageWriter")
    with pytest.raises(ValueError) as error:
        sharded_storage()
    assert str(error.value) == (
        "parallel.strategy: sharded checkpoints need the safetensors storage of "
        f"torch.distributed.checkpoint, which torch {torch.__version__} does not have; install "
        "torch>=2.13, or train with parallel.strategy=ddp"
    )
