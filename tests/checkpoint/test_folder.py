"""Checkpoints in a run's folder are listed, skipped if damaged, replaced and pruned."""

import os
import stat

import pytest
import saving

from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint, prepare_folder
from ssl_pretrain.checkpoint.manifest import verify_checkpoint

pytestmark = pytest.mark.promise


@pytest.fixture
def run(tmp_path):
    checkpoints = saving.build_checkpoints(tmp_path, saving.build_linear_state())
    for step in (2, 4):
        checkpoints.save(step)
    return tmp_path


DAMAGE = {
    "truncated": (
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        "step_00000004/method.safetensors is truncated: {short} bytes of {bytes}",
    ),
    "flipped": (
        lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
        "step_00000004/method.safetensors is damaged: its SHA-256 differs from the manifest",
    ),
    "missing": (lambda file: file.unlink(), "step_00000004/method.safetensors is missing"),
    "manifest": (
        lambda file: (file.parent / "manifest.json").write_text("{"),
        "step_00000004/manifest.json cannot be read (JSONDecodeError)",
    ),
}


@pytest.mark.case(8)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(run, damage):
    file = run / "checkpoints" / "step_00000004" / "method.safetensors"
    size = file.stat().st_size
    apply_damage, message = DAMAGE[damage]
    apply_damage(file)
    with pytest.warns(UserWarning) as warnings:
        assert saving.resume(run, saving.build_linear_state()) == 2
    expected = message.format(short=size - 5, bytes=size) + "; using step_00000002 instead"
    assert str(warnings[0].message) == expected


def test_the_error_lists_all_checkpoints_if_none_is_intact(run):
    for file in run.rglob("method.safetensors"):
        file.unlink()
    with pytest.raises(ValueError) as error:
        newest_checkpoint(run)
    assert str(error.value) == (
        f"{run}: all 2 checkpoints are damaged: step_00000004/method.safetensors is missing; "
        "step_00000002/method.safetensors is missing. Nothing was loaded. Restore one, or give a "
        "new output"
    )


def test_a_run_without_checkpoints_is_an_error(tmp_path):
    with pytest.raises(ValueError) as error:
        newest_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no checkpoint found (looked for {tmp_path / 'checkpoints' / 'step_*'}); "
        "give the folder of a run that has saved one"
    )


def test_pruning_keeps_the_newest_checkpoints_and_the_milestones(tmp_path):
    checkpoints = saving.build_checkpoints(
        tmp_path, saving.build_linear_state(), steps_per_epoch=3, keep_last=2, keep_every_epochs=2
    )
    for step in range(1, 8):
        checkpoints.save(3 * step)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [6, 12, 18, 21]


def test_files_and_links_at_the_path_of_a_checkpoint_are_replaced(run):
    """A link is replaced, but its target is left alone."""
    folder, target = run / "checkpoints", run / "elsewhere"
    (folder / "step_00000006").write_text("")
    (folder / "step_00000008").symlink_to("nowhere")
    target.mkdir()
    (target / "file").write_text("content")
    (folder / "step_00000010").symlink_to(target)
    checkpoints = saving.build_checkpoints(run, saving.build_linear_state(), keep_last=9)
    for step in (6, 8, 10):
        checkpoints.save(step)
        path = folder / f"step_{step:08d}"
        assert not path.is_symlink()
        assert verify_checkpoint(path)["step"] == step
    assert (target / "file").read_text() == "content"


def test_starting_a_run_removes_unfinished_checkpoints(run):
    (run / "checkpoints" / ".writing-step_00000006-abc").mkdir()
    prepare_folder(run)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, mask):
    previous_mask = os.umask(mask)
    try:
        saving.build_checkpoints(tmp_path, saving.build_linear_state()).save(1)
    finally:
        os.umask(previous_mask)
    (path,) = list_checkpoints(tmp_path)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~mask}
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask
