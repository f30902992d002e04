"""Faults while a checkpoint is written, and damage to checkpoints on disk."""

import errno
import json
import os
import signal
import subprocess
import time
import warnings

import pytest
import ranks
from ranks import Ranks
from reference_run import OVERRIDES, STEPS, paths, reference, resume, saved_steps

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.manifest import FORMAT, verify_checkpoint
from ssl_pretrain.system.exit_status import STOPPED

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


@pytest.mark.case(3)
@pytest.mark.parametrize(
    ("moment", "remaining_steps"),
    [
        ("method.safetensors", [3]),
        ("optimizer.safetensors", [3]),
        ("manifest.json", [3]),
        ("rename", [3]),
        ("prune", [3, 6]),
    ],
)
def test_a_rank_killed_during_a_save_damages_nothing(
    paths, resume, observe, moment, remaining_steps
):
    path, run = paths
    statuses, _ = ranks.run(path, *OVERRIDES, fault=f"kill_writing@0:6:{moment}")
    assert statuses[0] == -signal.SIGKILL and all(status > 0 for status in statuses[1:])
    assert saved_steps(run) == remaining_steps
    has_unfinished_save = bool(list((run / "checkpoints").glob(".writing-*")))
    assert has_unfinished_save == (moment != "prune")
    assert f"after step {remaining_steps[-1]}" in resume()
    observe(f"at {moment}: resumed from step {remaining_steps[-1]}, the same bits")


@pytest.mark.case(4)
@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_signal_to_one_rank_stops_all_at_one_step_and_a_second_changes_nothing(
    paths, resume, observe, name
):
    path, run = paths
    group = Ranks(path, *OVERRIDES, "checkpoint.every_epochs=0", fault="slow@1:1,writing@0:0:2")
    group.wait_for_step(run, 5)
    group.send(getattr(signal, name), 1)
    group.wait_for_text("writing")
    group.send(signal.SIGUSR2)
    for rank in range(3):
        if (name, rank) != ("SIGTERM", 1):  # a second SIGTERM ends a rank after one second
            group.send(signal.SIGTERM, rank)
    assert group.wait() == [STOPPED] * 3, group.output()
    assert group.output(0).count("writing") == 1
    (step,) = saved_steps(run)
    resume()
    observe(
        f"{name} to rank 1 at step 5, SIGUSR2 to all and a first SIGTERM in the save of step "
        f"{step}: statuses {STOPPED}, the same bits"
    )


@pytest.mark.case(5)
def test_a_kill_before_the_save_is_complete_leaves_the_previous_checkpoint(paths, resume, observe):
    path, run = paths
    group = Ranks(path, *OVERRIDES, fault="writing@0:6:30")
    group.wait_for_text("writing")
    group.send(signal.SIGTERM)
    time.sleep(1)
    group.send(signal.SIGKILL)
    assert set(group.wait(10)) == {-signal.SIGKILL}
    assert saved_steps(run) == [3]
    resume()
    observe("killed 1 s after SIGTERM in a save of 30 s: resumed from step 3, the same bits")


@pytest.fixture
def small_disk(paths):
    """Mount a disk of 8 MiB for the checkpoints, which are 3 MB each."""
    folder = paths[1] / "checkpoints"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    mount = subprocess.run(command, capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk needs root: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.case(6)
@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_full_disk_ends_the_run_and_damages_nothing(paths, small_disk, observe, policy):
    path, run = paths
    statuses, output = ranks.run(path, *OVERRIDES, f"checkpoint.on_failure={policy}")
    steps = saved_steps(run)
    assert "could not be written to" in output, output[-2000:]
    assert "No space left on device" in output, output[-2000:]
    assert not list(small_disk.glob(".writing-*")) and 0 < len(steps) < 4
    for step in steps:
        verify_checkpoint(small_disk / f"step_{step:08d}")
    assert statuses == [74, 74, 74], output[-2000:]  # with `warn`, because the last save failed
    observe(
        f"a real disk of 8 MiB, {policy}: statuses {statuses}, checkpoints {steps} intact, "
        "no remains"
    )


@pytest.mark.case(7)
@pytest.mark.parametrize("error", ["EIO", "EROFS", "EACCES"])
def test_a_failing_disk_ends_the_run(paths, resume, observe, error):
    path, run = paths
    statuses, output = ranks.run(path, *OVERRIDES, fault=f"refuse@0:6:{error}")
    assert statuses == [74, 74, 74], output[-2000:]
    assert os.strerror(getattr(errno, error)) in output, output[-2000:]
    assert saved_steps(run)[0] == 3 and 6 not in saved_steps(run)
    resume()
    observe(f"{error} in the save of step 6: statuses {statuses}, the same bits after a resume")


@pytest.mark.case(7)
def test_an_output_that_cannot_be_written_is_refused_at_the_start(paths, observe):
    path, run = paths
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a read-only disk needs root")
    try:
        statuses, output = ranks.run(path, *OVERRIDES)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    message = (
        f"error: output: no checkpoint can be written to {folder}: Read-only file system "
        "(make a folder); free space, get write permission, or give another output"
    )
    assert statuses == [2, 2, 2] and output.count(message) == 3, output
    statuses, output = ranks.run(path, *OVERRIDES, "output=/proc/run")
    message = "error: output: /proc/run cannot be written to: No such file or directory"
    assert statuses == [2, 2, 2] and output.count(message) == 3, output
    observe("a read-only disk, and /proc: refused on all ranks at the start, status 2")


def damage(file, kind):
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("missing", marks=pytest.mark.case(8)),
        pytest.param("truncated", marks=pytest.mark.case(8)),
        pytest.param("flipped", marks=pytest.mark.case(9)),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_written_again(paths, resume, observe, kind):
    """The last checkpoint is damaged, so the resumed run reaches the same step again."""
    path, run = paths
    assert ranks.run(path, *OVERRIDES)[0] == [0, 0, 0]
    damage(run / "checkpoints" / f"step_{STEPS:08d}" / "method.safetensors", kind)
    output = resume()
    assert f"step_{STEPS:08d}/method.safetensors is " in output
    assert "using step_00000009 instead" in output
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newest_checkpoint(run)
    observe(f"{kind}: reported, step 9 used, step {STEPS} written again, the same bits")


@pytest.mark.case(10)
def test_entries_that_are_no_checkpoints_are_skipped(paths, resume, observe):
    path, run = paths
    assert ranks.run(path, *OVERRIDES, "--stop-after", "4")[0] == [0] * 3
    folder = run / "checkpoints"
    (folder / "latest").symlink_to("step_00000099")
    (folder / "step_00000098").symlink_to("nowhere")
    (folder / "step_00000097").write_text("")
    (folder / "step_00000096").mkdir()
    (folder / "step_last").mkdir()
    (folder / "step_00000095").mkdir()
    (folder / "step_00000095" / "manifest.json").write_text("")
    assert "step_00000096/manifest.json cannot be read" in resume("checkpoint.keep_last=1")
    manifest = verify_checkpoint(newest_checkpoint(run))
    assert manifest["step"] == STEPS
    assert [step for step in saved_steps(run) if step < 90] == [STEPS]
    observe(
        "dangling links, an empty file, empty folders and an empty manifest under higher steps: "
        "skipped; keep_last=1 kept step 12"
    )


@pytest.mark.case(26)
@pytest.mark.parametrize("version", [0, 99])
def test_another_format_is_refused_and_the_version_that_wrote_it_is_named(paths, observe, version):
    path, _ = paths
    assert ranks.run(path, *OVERRIDES, "--stop-after", "4")[0] == [0] * 3
    file = paths[1] / "checkpoints" / "step_00000004" / "manifest.json"
    versions = {"ssl_pretrain": "0.0.9", "revision": "abc"}
    manifest = json.loads(file.read_text()) | {"format": version, "versions": versions}
    file.write_text(json.dumps(manifest))
    statuses, output = ranks.run(path, *OVERRIDES)
    message = (
        f"error: {file.parent} has checkpoint format {version}; this version reads format "
        f"{FORMAT}. The checkpoint was written by ssl_pretrain 0.0.9 (abc). Use that version, or "
        "start a new run"
    )
    assert statuses == [2, 2, 2] and message in output, output
    observe(f"format {version}: refused, status 2")
