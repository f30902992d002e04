"""Saving and resuming: the state is restored exactly, and a full disk loses nothing."""

import errno
import json
import threading

import pytest
import saving
import torch
from torch import nn

from ssl_pretrain.checkpoint import tensor_files
from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from ssl_pretrain.checkpoint.manifest import verify_checkpoint
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.system.durable_files import SaveError

pytestmark = pytest.mark.promise
OPTIMIZERS = ["lars", "larc", "sgd", "adamw", "adam"]


def build_trained_state(seed=0):
    """Return the state after one optimizer step."""
    torch.manual_seed(seed)
    state = saving.build_linear_state()
    state.method.backbone(torch.ones(4, 3)).sum().backward()
    take_step(state)
    return state


def take_step(state, frozen=(), **config):
    optim.set_rates(state.optimizer, OptimConfig(**config), Progress(5, 10, 1), 10, 256)
    optim.step_if_finite(state.optimizer, frozen=frozen)


def assert_equal_parameters(method, expected):
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), expected, strict=True))


@pytest.fixture
def run(tmp_path):
    for step in (2, 4):
        saving.build_checkpoints(tmp_path, build_trained_state(step)).save(step)
    return tmp_path


def test_weights_and_moments_are_restored(run):
    fresh, saved = build_trained_state(9), build_trained_state(4)
    assert saving.resume(run, fresh) == 4
    assert_equal_parameters(fresh.method, saved.method.parameters())
    moments = [
        [state.optimizer.state[weight]["momentum_buffer"] for weight in state.method.parameters()]
        for state in (fresh, saved)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*moments))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_restored_in_the_memory_layout_of_their_weights(name, tmp_path):
    def after_one_step(seed):
        torch.manual_seed(seed)
        method = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, (1, 3)))
        method = method.to(memory_format=torch.channels_last)
        state = TrainingState(method, optim.build(OptimConfig(name=name), method))
        step(state)
        return state

    def step(state):
        state.method.zero_grad()
        state.method(torch.arange(192.0).view(1, 3, 8, 8)).square().sum().backward()
        take_step(state, name=name, base_lr=0.01)

    saved, fresh = after_one_step(0), after_one_step(1)
    saving.build_checkpoints(tmp_path, saved).save(1)
    saving.resume(tmp_path, fresh)
    for parameter in fresh.method.parameters():
        entries = fresh.optimizer.state[parameter].values()
        moments = [value for value in entries if value.shape == parameter.shape]
        assert moments and all(value.stride() == parameter.stride() for value in moments)
    step(saved)
    step(fresh)
    assert_equal_parameters(fresh.method, saved.method.parameters())


def test_moments_take_the_layout_of_the_resumed_weights(tmp_path):
    """A run may be resumed with another value of `parallel.channels_last`."""

    def after_one_step(layout, seed):
        torch.manual_seed(seed)
        method = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        optimizer = optim.build(OptimConfig(name="adamw"), method)
        method(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optim.step_if_finite(optimizer)
        return TrainingState(method, optimizer)

    saved = after_one_step(torch.contiguous_format, 0)
    fresh = after_one_step(torch.channels_last, 1)
    saving.build_checkpoints(tmp_path, saved).save(1)
    saving.resume(tmp_path, fresh)
    old, new = (state.optimizer.state[state.method.weight]["exp_avg"] for state in (saved, fresh))
    assert torch.equal(new, old)
    assert new.stride() == fresh.method.weight.stride() != old.stride()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rollback_clears_moments_of_parameters_that_were_frozen(name, tmp_path):
    """Training of DINO's last layer and SwAV's prototypes may begin after the checkpoint."""

    def step(state, frozen=()):
        state.method.zero_grad()
        state.method(torch.arange(8.0).view(2, 4)).square().sum().backward()
        take_step(state, frozen=frozen, name=name, base_lr=0.01)

    torch.manual_seed(0)
    method = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    state = TrainingState(method, optim.build(OptimConfig(name=name), method))
    step(state, frozen=list(method[1].parameters()))
    checkpoints = saving.build_checkpoints(tmp_path, state)
    checkpoints.save(1)
    step(state)
    expected = [parameter.detach().clone() for parameter in method.parameters()]
    assert checkpoints.roll_back() == "step_00000001"
    step(state)
    assert_equal_parameters(method, expected)


def test_no_pickle_is_written(run):
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_an_output_with_checkpoints_is_refused_if_resuming_is_off(run):
    with pytest.raises(ValueError) as error:
        saving.build_checkpoints(run, build_trained_state(), resume=False).resume(
            check_config=lambda saved_config, path: None
        )
    assert str(error.value) == (
        f"output: {run} already has step_00000004 and checkpoint.resume is false; give another "
        "output, or set checkpoint.resume=true"
    )


def test_a_resumed_run_keeps_its_wandb_id(run):
    first = saving.build_checkpoints(run, build_trained_state())
    first.facts.wandb_id = "abcdefgh"
    first.save(6)
    second = saving.build_checkpoints(run, build_trained_state())
    second.resume(check_config=lambda saved_config, path: None)
    assert second.facts.wandb_id == "abcdefgh"


def fail_to_write(tensors, path):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.case(6)
def test_a_full_disk_loses_nothing(run, monkeypatch):
    monkeypatch.setattr(tensor_files, "save_file", fail_to_write)
    message = (
        r"checkpoint of step 6 could not be written to .*No space left on device\. "
        r"Older checkpoints are intact\. Free space and resume"
    )
    with pytest.raises(SaveError, match=message):
        saving.build_checkpoints(run, build_trained_state()).save(6)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004"]
    verify_checkpoint(newest_checkpoint(run))


def test_a_full_disk_can_be_a_warning_except_for_the_last_save(run, monkeypatch):
    checkpoints = saving.build_checkpoints(run, build_trained_state(), on_failure="warn")
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", fail_to_write)
        with pytest.raises(SaveError, match=r"^checkpoint of step 5 could not be written to "):
            checkpoints.save(5, wait=True)
        checkpoints.save(6, wait=False)  # reported by the next save
        checkpoints._thread._thread.join()
    with pytest.warns(UserWarning, match=r"checkpoint of step 6 could not be .*No space left"):
        checkpoints.save(8)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000008"]


def test_an_asynchronous_save_holds_the_weights_of_its_step(tmp_path, monkeypatch):
    """The weights change while the disk is slow."""
    write_started, may_write = threading.Event(), threading.Event()
    save_file = tensor_files.save_file

    def write_slowly(tensors, path):
        write_started.set()
        assert may_write.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr(tensor_files, "save_file", write_slowly)
    state = build_trained_state()
    checkpoints = saving.build_checkpoints(tmp_path, state)
    expected = {name: value.clone() for name, value in state.method.state_dict().items()}
    checkpoints.save(3, wait=False)
    assert write_started.wait(60) and list_checkpoints(tmp_path) == []
    for parameter in state.method.parameters():
        parameter.data.add_(1)
    may_write.set()
    checkpoints.save(4)
    first, second = (read_checkpoint(path)[1] for path in list_checkpoints(tmp_path))
    assert all(torch.equal(first[name], value) for name, value in expected.items())
    assert not any(torch.equal(second[name], value) for name, value in expected.items())


def test_checkpoints_are_due_at_intervals_and_at_the_end():
    checkpoints = saving.build_checkpoints(
        "", saving.build_linear_state(), last_step=11, steps_per_epoch=5, every_epochs=0.5
    )
    assert [step for step in range(1, 12) if checkpoints.is_due(step)] == [3, 5, 8, 10, 11]


def test_versions_and_machine_are_recorded(run):
    manifest = json.loads((run / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    keys = {"world_size", "threads", "torch", "cpu", "micro_batch_size", "precision"}
    assert manifest["machine"].keys() == keys
    assert manifest["versions"]["torch"] in (
        torch.__version__,
        torch.__version__.partition("+")[0],
    )
