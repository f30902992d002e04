"""A method may have any number of networks: each is trained, sharded, saved and resumed."""

import networks
import pytest
import torch
from conftest import run_ranks
from suites import quick_and_full

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.initial_weights import read_evaluated_weights

pytestmark = pytest.mark.promise

NAME, NUM_STEPS = "several_networks", 6
FLOAT64 = {"precision": "float64"}
NETWORKS = ("backbone.", "teacher.", "older_teacher.", "predictor.", "decoder.")


def _train_and_resume(folder, strategy):
    """Return the states of uninterrupted runs and of a resumed one, in the default precision."""
    results = {"float64": networks.run(NAME, NUM_STEPS, strategy=strategy, **FLOAT64)["state"]}
    results["uninterrupted"] = networks.run(NAME, NUM_STEPS, strategy=strategy)["state"]
    networks.run(NAME, 3, folder, strategy=strategy)
    return results | {"resumed": networks.run(NAME, 3, folder, strategy=strategy)["state"]}


@pytest.mark.parametrize("strategy", quick_and_full(["ddp"], ["ddp", "fsdp"]))
def test_two_ranks_equal_one_and_resume_bit_for_bit(strategy, tmp_path):
    expected = networks.run(NAME, NUM_STEPS, **FLOAT64)["state"]
    for prefix in NETWORKS:
        assert any(name.startswith(prefix) for name in expected)
    for rank in run_ranks(_train_and_resume, tmp_path, strategy, world_size=2):
        assert networks.largest_difference(rank["float64"], expected) < 1e-9
        for name, value in rank["uninterrupted"].items():
            assert torch.equal(rank["resumed"][name], value), name
        weights = read_evaluated_weights(newest_checkpoint(tmp_path))
        for name, value in weights.items():
            assert torch.equal(value, rank["resumed"][f"teacher.backbone.{name}"]), name


def test_the_older_teacher_is_the_teacher_of_the_last_refresh():
    at_refresh = networks.run(NAME, 4, **FLOAT64)["state"]
    later = networks.run(NAME, NUM_STEPS, **FLOAT64)["state"]
    for name, value in later.items():
        if name.startswith("older_teacher."):
            torch.testing.assert_close(value, at_refresh[name.removeprefix("older_")])
    name = "teacher.backbone.model.blocks.0.mlp.fc1.weight"
    assert not torch.equal(later[name], at_refresh[name])


def test_micro_batches_equal_the_whole_batch():
    expected = networks.run(NAME, 3, **FLOAT64)["state"]
    state = networks.run(NAME, 3, num_micro_batches=4, bn_group_images=2, **FLOAT64)["state"]
    assert networks.largest_difference(state, expected) < 1e-9


@pytest.mark.parametrize("way", ["blocks", "selective"])
def test_recomputed_activations_give_the_same_bits(way):
    expected = networks.run(NAME, 2)["state"]
    state = networks.run(NAME, 2, activation_checkpointing=way)["state"]
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
