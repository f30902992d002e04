"""Continued pretraining: the heads are trained alone first, and then with the backbone."""

import networks
import pytest
import torch
from conftest import run_ranks
from networks import ADAMW, run

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import wrap as parallel

pytestmark = pytest.mark.promise

FROZEN_STEPS, NUM_STEPS = 3, 5  # an epoch of networks.py has 2 steps
LARS = {"name": "lars", "base_lr": 0.02, "lr_scaling": "none", "warmup_epochs": 0}
FREEZE = {"freeze_backbone_epochs": FROZEN_STEPS / networks.STEPS_PER_EPOCH}
CASES = {  # LARS with batch norm and without a teacher, and AdamW with a teacher
    "simclr": {**LARS, **FREEZE, "clip_norm": 1.0},
    "dino": {**ADAMW, **FREEZE, "warmup_epochs": 0, "layer_decay": 0.7},
}


def states_after_each_step(name, **settings):
    stepper, sizes = networks.build_case(name, optimizer=CASES[name], **settings)
    method = parallel.unwrap(stepper.model)
    states = [networks.full_state(method)]
    for step in range(NUM_STEPS):
        networks.take_step(stepper, sizes, step)
        states.append(networks.full_state(method))
    return states


def backbones_of(state):
    """Return the tensors of the student's backbone and the teacher's, batch norm included."""
    return {key: value for key, value in state.items() if "backbone." in key}


def assert_frozen_then_trained(states):
    for state in states[1 : FROZEN_STEPS + 1]:
        assert all(value.equal(states[0][key]) for key, value in backbones_of(state).items())
    heads = [key for key in states[0] if "backbone." not in key and key.endswith("weight")]
    assert not all(states[1][key].equal(states[0][key]) for key in heads)
    for before, after in zip(states[FROZEN_STEPS:], states[FROZEN_STEPS + 1 :]):
        weights = [key for key in before if key.startswith("backbone.") and "weight" in key]
        unchanged = [key for key in weights if after[key].equal(before[key])]
        assert len(unchanged) < len(weights) / 4  # such as those behind a norm of weight 0


@pytest.mark.parametrize("name", CASES)
def test_the_backbone_moves_only_after_the_frozen_epochs(name):
    assert_frozen_then_trained(states_after_each_step(name))


def test_micro_batches_do_not_change_frozen_statistics():
    states = states_after_each_step("simclr", num_micro_batches=2, bn_group_images=4)
    assert_frozen_then_trained(states)


def test_resuming_within_and_after_the_frozen_epochs_is_exact(tmp_path):
    for name in CASES:
        folder = tmp_path / name
        settings = {"optimizer": CASES[name]}
        expected = run(name, NUM_STEPS, **settings)["state"]
        run(name, FROZEN_STEPS - 1, folder, **settings)
        saved = read_checkpoint(newest_checkpoint(folder))[1]
        assert saved.keys() == expected.keys()
        run(name, 2, folder, **settings)
        resumed = run(name, NUM_STEPS - FROZEN_STEPS - 1, folder, **settings)["state"]
        assert all(resumed[key].equal(value) for key, value in expected.items())


def _train_sharded(folder):
    settings = {"strategy": "fsdp", "optimizer": CASES["dino"]}
    run("dino", FROZEN_STEPS - 1, folder, **settings)
    resumed = run("dino", NUM_STEPS - FROZEN_STEPS + 1, folder, **settings)["state"]
    return {
        "states": states_after_each_step("dino", strategy="fsdp"),
        "resumed": resumed,
        "fsdp": states_after_each_step("dino", strategy="fsdp", precision="float64")[-1],
        "ddp": states_after_each_step("simclr", precision="float64")[-1],
    }


def test_ranks_freeze_and_resume_alike(tmp_path):
    expected = {
        "fsdp": states_after_each_step("dino", precision="float64")[-1],
        "ddp": states_after_each_step("simclr", precision="float64")[-1],
    }
    for rank in run_ranks(_train_sharded, tmp_path / "run", world_size=2):
        assert_frozen_then_trained(rank["states"])
        assert all(rank["resumed"][key].equal(value) for key, value in rank["states"][-1].items())
        for name, state in expected.items():
            assert networks.largest_difference(rank[name], state) < 1e-9


def test_gradients_of_the_frozen_backbone_count_toward_the_clipped_norm():
    torch.manual_seed(0)
    network = torch.nn.ModuleDict(
        {"backbone": torch.nn.Linear(2, 1, bias=False), "head": torch.nn.Linear(2, 1, bias=False)}
    )
    config = OptimConfig(name="sgd", base_lr=1.0, momentum=0.0, weight_decay=0.0, warmup_epochs=0)
    optimizer = optim.build(config, network)
    optim.set_rates(optimizer, config, Progress(0, 1, 1), 1, 256)
    before = network["head"].weight.detach().clone()
    network["backbone"].weight.grad = torch.tensor([[0.0, 4.0]])
    network["head"].weight.grad = torch.tensor([[3.0, 0.0]])
    norm, _ = optim.step_if_finite(
        optimizer, clip_norm=1.0, frozen=list(network["backbone"].parameters())
    )
    assert norm == 5
    assert network["backbone"].weight not in optimizer.state
    moved = (before - network["head"].weight).detach()
    torch.testing.assert_close(moved, torch.tensor([[3.0 / 5, 0.0]]))


def test_a_run_that_never_trains_the_backbone_is_warned_about():
    config = OptimConfig(warmup_epochs=0, freeze_backbone_epochs=10)
    assert optim.schedule_warnings(config, 20) == []
    assert optim.schedule_warnings(config, 10) == [
        "warning: optim.freeze_backbone_epochs: 10 takes the whole run of epochs: 10, so the "
        "backbone never changes; give a shorter phase, such as optim.freeze_backbone_epochs=1"
    ]
