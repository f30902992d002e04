"""What can go wrong while a checkpoint is written, and with those that lie there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
import warnings

import pytest
import ranks
import tiny
from ranks import Ranks
from undisturbed import MORE, STEPS, goes_on, place, undisturbed

from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.system.exit_status import STOPPED

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


def saved(run):
    return [int(found.name[5:]) for found in checkpoint.checkpoints(run)]


@pytest.mark.case(3)
@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("method.safetensors", [3]),
        ("optimizer.safetensors", [3]),
        ("manifest.json", [3]),
        ("rename", [3]),
        ("prune", [3, 6]),
    ],
)
def test_killed_in_a_save(place, goes_on, seen, moment, left):
    path, run = place
    statuses, _ = ranks.run(path, *MORE, fault=f"kill_writing@0:6:{moment}")
    assert statuses[0] == -signal.SIGKILL and all(status > 0 for status in statuses[1:])
    assert saved(run) == left and bool(list((run / "checkpoints").glob(".writing-*"))) == (
        moment != "prune"
    )
    assert f"after step {left[-1]}" in goes_on()
    seen(f"at {moment}: went on from step {left[-1]}, the same bits")


@pytest.mark.case(4)
@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_signal_to_one_rank_stops_all_at_one_step_and_a_second_changes_nothing(
    place, goes_on, seen, name
):
    path, run = place
    number = getattr(signal, name)
    asked = Ranks(path, *MORE, "checkpoint.every_epochs=0", fault="slow@1:1,writing@0:0:2")
    asked.until_step(run, 5)
    asked.send(number, 1)
    asked.until("writing")
    asked.send(signal.SIGUSR2)
    asked.send(signal.SIGTERM)
    assert asked.end() == [STOPPED] * 3, asked.said()
    assert asked.said(0).count("writing") == 1
    (step,) = saved(run)
    goes_on()
    seen(
        f"{name} to rank 1 at step 5, SIGUSR2 and SIGTERM to all in the save of step {step}: statuses {STOPPED}, the same bits"
    )


@pytest.mark.case(5)
def test_less_grace_than_a_save_takes(place, goes_on, seen):
    path, run = place
    asked = Ranks(path, *MORE, fault="writing@0:6:30")
    asked.until("writing")
    asked.send(signal.SIGTERM)
    time.sleep(1)
    asked.send(signal.SIGKILL)
    assert set(asked.end(10)) == {-signal.SIGKILL}
    assert saved(run) == [3]
    goes_on()
    seen("killed 1 s after SIGTERM in a save of 30 s: went on from step 3, the same bits")


@pytest.fixture
def small_disk(place):
    """A disk of 8 MiB for the checkpoints, which are 3 MB each."""
    folder = place[1] / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.case(6)
@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_full_disk(place, small_disk, seen, policy):
    path, run = place
    statuses, said = ranks.run(path, *MORE, f"checkpoint.on_failure={policy}")
    kept = saved(run)
    assert "could not be written to" in said and "No space left on device" in said, said[-2000:]
    assert not list(small_disk.glob(".writing-*")) and 0 < len(kept) < 4
    for step in kept:
        checkpoint.verify(small_disk / f"step_{step:08d}")
    assert statuses == [74, 74, 74], said[-2000:]  # with `warn` at the last save, which has no next
    seen(
        f"a real disk of 8 MiB, {policy}: statuses {statuses}, checkpoints {kept} whole, no debris"
    )


@pytest.mark.case(7)
@pytest.mark.parametrize("error", ["EIO", "EROFS", "EACCES"])
def test_a_disk_that_fails(place, goes_on, seen, error):
    path, run = place
    statuses, said = ranks.run(path, *MORE, fault=f"refuse@0:6:{error}")
    assert statuses == [74, 74, 74] and os.strerror(getattr(errno, error)) in said, said[-2000:]
    assert saved(run)[0] == 3 and 6 not in saved(run)
    goes_on()
    seen(f"{error} in the save of step 6: statuses {statuses}, the same bits after a resume")


@pytest.mark.case(7)
def test_where_nothing_can_be_written_is_said_at_the_start(place, seen):
    path, run = place
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("a read-only disk needs root")
    try:
        statuses, said = ranks.run(path, *MORE)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    message = (
        f"error: output: no checkpoint can be written to {folder}: Read-only file system (make a folder); "
        "make room or give the right to write there, or give another output"
    )
    assert statuses == [2, 2, 2] and said.count(message) == 3, said
    statuses, said = ranks.run(path, *MORE, "output=/proc/run")
    assert (
        statuses == [2, 2, 2]
        and said.count("error: output: /proc/run cannot be written to: No such file or directory")
        == 3
    ), said
    seen("a read-only disk, and /proc: refused on all ranks at the start, status 2")


def harm(file, kind):
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
def test_a_damaged_checkpoint_is_named_and_written_anew(place, goes_on, seen, kind):
    """The last one, so that the run ends at the very step whose checkpoint is damaged."""
    path, run = place
    assert ranks.run(path, *MORE)[0] == [0, 0, 0]
    harm(run / "checkpoints" / f"step_{STEPS:08d}" / "method.safetensors", kind)
    said = goes_on()
    assert (
        f"step_{STEPS:08d}/method.safetensors is " in said and "using step_00000009 instead" in said
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.newest(run)
    seen(f"{kind}: named, step 9 used, step {STEPS} written anew, the same bits")


@pytest.mark.case(10)
def test_what_lies_among_the_checkpoints_does_not_matter(place, goes_on, seen):
    path, run = place
    assert ranks.run(path, *MORE, "--stop-after", "4")[0] == [0] * 3
    folder = run / "checkpoints"
    (folder / "latest").symlink_to("step_00000099")
    (folder / "step_00000098").symlink_to("nowhere")
    (folder / "step_00000097").write_text("")
    (folder / "step_00000096").mkdir()
    (folder / "step_last").mkdir()
    (folder / "step_00000095").mkdir()
    (folder / "step_00000095" / "manifest.json").write_text("")
    assert "step_00000096/manifest.json cannot be read" in goes_on("checkpoint.keep_last=1")
    manifest = checkpoint.verify(checkpoint.newest(run))
    assert manifest["step"] == STEPS and [step for step in saved(run) if step < 90] == [STEPS]
    seen(
        "dangling links, an empty file, empty folders and an empty manifest under higher steps: passed over; keep_last=1 kept step 12"
    )


@pytest.mark.case(26)
@pytest.mark.parametrize("written", [0, 99])
def test_another_format_is_refused_with_the_version_that_wrote_it(place, seen, written):
    path, run = place
    assert ranks.run(path, *MORE, "--stop-after", "4")[0] == [0] * 3
    file = run / "checkpoints" / "step_00000004" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(
        json.dumps(
            manifest | {"format": written, "versions": {"ssl_pretrain": "0.0.9", "revision": "abc"}}
        )
    )
    statuses, said = ranks.run(path, *MORE)
    assert statuses == [2, 2, 2] and (
        f"error: {file.parent} has checkpoint format {written}, this version reads {checkpoint.FORMAT}; it was written by ssl_pretrain "
        "0.0.9 (abc): use that version, or start a new run" in said
    ), said
    seen(f"format {written}: refused, status 2")
