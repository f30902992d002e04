"""Checkpoints: whole or absent, verified, pruned, and said what is wrong with them."""

from __future__ import annotations

import errno
import json
import threading

import pytest
import torch
from torch import nn

from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.checkpoint.state import CheckpointConfig, SaveError, State
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress

pytestmark = pytest.mark.promise


def state(seed=0):
    torch.manual_seed(seed)
    method = nn.Module()
    method.backbone = nn.Linear(3, 2)
    optimizer = optim.build(OptimConfig(), method)
    method.backbone(torch.ones(4, 3)).sum().backward()
    optim.set_rates(optimizer, OptimConfig(), Progress(5, 10, 1), 10, 256)
    optim.guarded_step(optimizer)
    return State(method, optimizer, {"seed": seed}, {"wandb_id": None})


@pytest.fixture
def run(tmp_path):
    for step in (2, 4):
        saved = state(step)
        saved.save(tmp_path, step, CheckpointConfig(keep_last=5), 1)
    return tmp_path


def test_a_state_comes_back(run):
    fresh = state(9)
    assert fresh.resume(run, CheckpointConfig(), lambda manifest: None) == 4
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.method.parameters(), state(4).method.parameters())
    )
    moments = [
        [one.optimizer.state[parameter]["momentum_buffer"] for parameter in one.method.parameters()]
        for one in (fresh, state(4))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*moments))


@pytest.mark.parametrize("name", ["lars", "larc", "sgd", "adamw", "adam"])
def test_moments_are_loaded_in_the_memory_layout_of_their_weights(name, tmp_path):
    def stepped(seed):
        torch.manual_seed(seed)
        method = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, (1, 3))).to(
            memory_format=torch.channels_last
        )
        optimizer = optim.build(OptimConfig(name=name), method)
        step(method, optimizer)
        return State(method, optimizer, {}, {})

    def step(method, optimizer):
        method.zero_grad()
        method(torch.arange(192.0).view(1, 3, 8, 8)).square().sum().backward()
        optim.set_rates(
            optimizer, OptimConfig(name=name, base_lr=0.01), Progress(5, 10, 1), 10, 256
        )
        optim.guarded_step(optimizer)

    saved, fresh = stepped(0), stepped(1)
    saved.save(tmp_path, 1, CheckpointConfig(), 1)
    fresh.resume(tmp_path, CheckpointConfig(), lambda manifest: None)
    for parameter in fresh.method.parameters():
        moments = [
            value
            for value in fresh.optimizer.state[parameter].values()
            if value.shape == parameter.shape
        ]
        assert moments and all(value.stride() == parameter.stride() for value in moments)
    step(saved.method, saved.optimizer)
    step(fresh.method, fresh.optimizer)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.method.parameters(), saved.method.parameters())
    )


def test_moments_take_the_layout_that_the_weights_have_now(tmp_path):
    """A run may go on with another `parallel.channels_last`."""

    def stepped(layout, seed):
        torch.manual_seed(seed)
        method = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        optimizer = optim.build(OptimConfig(name="adamw"), method)
        method(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optim.guarded_step(optimizer)
        return State(method, optimizer, {}, {})

    saved, fresh = stepped(torch.contiguous_format, 0), stepped(torch.channels_last, 1)
    saved.save(tmp_path, 1, CheckpointConfig(), 1)
    fresh.resume(tmp_path, CheckpointConfig(), lambda manifest: None)
    old, new = (state.optimizer.state[state.method.weight]["exp_avg"] for state in (saved, fresh))
    assert torch.equal(new, old)
    assert new.stride() == fresh.method.weight.stride() != old.stride()


@pytest.mark.parametrize("name", ["lars", "larc", "sgd", "adamw", "adam"])
def test_a_rollback_forgets_the_moments_of_parameters_that_were_frozen(name, tmp_path):
    """As of DINO's last layer and SwAV's prototypes, which begin to move after the checkpoint."""

    def step(state, frozen=()):
        state.method.zero_grad()
        state.method(torch.arange(8.0).view(2, 4)).square().sum().backward()
        optim.set_rates(
            state.optimizer, OptimConfig(name=name, base_lr=0.01), Progress(5, 10, 1), 10, 256
        )
        optim.guarded_step(state.optimizer, frozen=frozen)

    torch.manual_seed(0)
    method = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    state = State(method, optim.build(OptimConfig(name=name), method), {}, {})
    step(state, frozen=list(method[1].parameters()))
    state.save(tmp_path, 1, CheckpointConfig(), 1)
    step(state)
    expected = [parameter.detach().clone() for parameter in method.parameters()]
    assert state.roll_back(tmp_path) == "step_00000001"
    step(state)
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), expected))


def test_no_pickle_is_written(run):
    kinds = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}


DAMAGE = {
    "truncated": (
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        "step_00000004/method.safetensors is truncated: {short} bytes of {bytes}",
    ),
    "flipped": (
        lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
        "step_00000004/method.safetensors is damaged: its SHA-256 is not the manifest's",
    ),
    "missing": (lambda file: file.unlink(), "step_00000004/method.safetensors is missing"),
    "manifest": (
        lambda file: (file.parent / "manifest.json").write_text("{"),
        "step_00000004/manifest.json cannot be read (JSONDecodeError)",
    ),
}


@pytest.mark.case(8)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, damage):
    file = run / "checkpoints" / "step_00000004" / "method.safetensors"
    size = file.stat().st_size
    harm, message = DAMAGE[damage]
    harm(file)
    with pytest.warns(UserWarning) as warned:
        assert state(9).resume(run, CheckpointConfig(), lambda manifest: None) == 2
    assert (
        str(warned[0].message)
        == message.format(short=size - 5, bytes=size) + "; using step_00000002 instead"
    )


def test_nothing_whole_is_an_error_that_lists_all(run):
    for file in run.rglob("method.safetensors"):
        file.unlink()
    with pytest.raises(ValueError) as error:
        checkpoint.newest(run)
    assert str(error.value) == (
        f"{run}: none of its 2 checkpoints is whole: step_00000004/method.safetensors is missing; step_00000002/method.safetensors is missing. "
        "Nothing was loaded; restore one or give a new output"
    )


def test_a_run_without_checkpoints_is_named(tmp_path):
    with pytest.raises(ValueError) as error:
        checkpoint.newest(tmp_path)
    assert (
        str(error.value)
        == f"{tmp_path}: no checkpoint there (looked for {tmp_path / 'checkpoints' / 'step_*'}); give the folder of a run that has saved one"
    )


def test_resuming_can_be_refused(run):
    with pytest.raises(ValueError) as error:
        state().resume(run, CheckpointConfig(resume=False), lambda manifest: None)
    assert (
        str(error.value)
        == f"output: {run} holds step_00000004 already and checkpoint.resume is false; give another output, or resume"
    )


@pytest.mark.case(6)
def test_a_full_disk_loses_nothing(run, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        OSError,
        match=r"checkpoint of step 6 could not be written to .*No space left on device.*Older ones are whole; free space and resume",
    ):
        state().save(run, 6, CheckpointConfig(), 1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000004",
    ]
    checkpoint.verify(checkpoint.newest(run))


def test_behind_the_training_a_save_holds_what_was_when_it_was_asked_for(tmp_path, monkeypatch):
    """The weights move while the disk is slow; what is written does not."""
    begun, go_on, real = threading.Event(), threading.Event(), checkpoint.save_file

    def slow(tensors, path):
        begun.set()
        assert go_on.wait(60)
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saving = state()
    expected = {name: value.clone() for name, value in saving.method.state_dict().items()}
    saving.save(tmp_path, 3, CheckpointConfig(), 1, wait=False)
    assert begun.wait(60) and checkpoint.checkpoints(tmp_path) == []
    for parameter in saving.method.parameters():
        parameter.data.add_(1)
    go_on.set()
    saving.save(tmp_path, 4, CheckpointConfig(), 1)
    written = [checkpoint.read(path)[1] for path in checkpoint.checkpoints(tmp_path)]
    assert all(torch.equal(written[0][name], value) for name, value in expected.items())
    assert not any(
        torch.equal(written[1][name], value)
        for name, value in expected.items()
        if value.is_floating_point() and "running" not in name
    )


def test_a_full_disk_can_be_a_warning(run, monkeypatch):
    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            SaveError, match=r"^checkpoint of step 5 could not be written to "
        ):  # the last of a run
            state().save(run, 5, CheckpointConfig(on_failure="warn"), 1, wait=True)
        saving, lenient = state(), CheckpointConfig(on_failure="warn")
        saving.save(run, 6, lenient, 1, wait=False)  # heard of at the next save
        saving._writer.join()
    with pytest.warns(
        UserWarning, match=r"checkpoint of step 6 could not be written to .*No space left on device"
    ):
        saving.save(run, 8, lenient, 1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000008",
    ]


def test_pruning_keeps_the_last_and_the_milestones(tmp_path):
    settings = CheckpointConfig(keep_last=2, keep_every_epochs=2)
    for step in range(1, 8):
        state().save(tmp_path, 3 * step, settings, steps_per_epoch=3)
    assert [int(path.name[5:]) for path in checkpoint.checkpoints(tmp_path)] == [6, 12, 18, 21]


def test_due_at_intervals_and_at_the_end():
    settings = CheckpointConfig(every_epochs=0.5)
    assert [step for step in range(1, 12) if checkpoint.due(settings, step, 11, 5)] == [
        3,
        5,
        8,
        10,
        11,
    ]


def test_versions_and_machine_are_recorded(run):
    manifest = json.loads((run / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert manifest["machine"].keys() == {
        "world_size",
        "threads",
        "torch",
        "cpu",
        "micro_batch_size",
    }
    assert (
        manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
        or manifest["versions"]["torch"] == torch.__version__
    )


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (
            "nowhere.pth",
            "backbone.init: 'nowhere.pth' does not exist; give random, timm:<tag>, a weights file or the folder of a run",
        ),
        (
            "{tmp}/text.pth",
            "backbone.init: '{tmp}/text.pth' is no safetensors or torch file: it begins with b'hello'; get it again",
        ),
        (
            "{tmp}/text.safetensors",
            "backbone.init: '{tmp}/text.safetensors' is no safetensors or torch file: it begins with b'hello",
        ),
    ],
)
def test_weights_to_start_from_are_named(tmp_path, init, message):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello, this is text and not tensors")
    with pytest.raises(ValueError) as error:
        checkpoint.weights_to_start_from(init.format(tmp=tmp_path))
    assert str(error.value).startswith(message.format(tmp=tmp_path))
