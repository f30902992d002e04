"""Runs on unusual file systems and in containers work, or are refused with the reason."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest

pytestmark = pytest.mark.full  # each test starts several processes; `make test-full` runs them

TRAIN = ("-m", "ssl_pretrain.train")


@pytest.fixture(scope="module")
def preload_library(tmp_path_factory):
    """Compile the LD_PRELOAD library that imitates a limited file system. Return its path."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("library") / "limited_file_system.so"
    source = Path(__file__).with_name("limited_file_system.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


@pytest.fixture
def config(tmp_path):
    root = commands.write_class_folders(tmp_path / "images", "train")
    return commands.write_config(tmp_path, root)


def logged_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_needs_no_hard_links_flock_or_fsync_of_folders(config, preload_library, tmp_path):
    result = commands.run(
        *TRAIN, config, LD_PRELOAD=preload_library, LACKS="link flock folder_fsync"
    )
    assert result.status == 0, result.text
    assert logged_steps(tmp_path / "run") == [1, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("fsync", "Invalid argument (fsync a file)"),
        pytest.param(
            "folder_rename", "Function not implemented (rename a folder)", marks=pytest.mark.full
        ),
    ],
)
def test_a_file_system_that_cannot_hold_checkpoints_is_refused_at_the_start(
    config, preload_library, tmp_path, lacks, message
):
    result = commands.run(*TRAIN, config, LD_PRELOAD=preload_library, LACKS=lacks)
    assert result.status == 2, result.text
    folder = tmp_path / "run" / "checkpoints"
    assert (
        f"error: output: no checkpoint can be written to {folder}: {message}; free space, get "
        in result.stderr
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and list(folder.iterdir()) == []


def test_a_disk_too_full_for_the_log_ends_the_run_with_a_checkpoint_to_resume_from(
    config, preload_library, tmp_path
):
    """The error names the file, and the same command resumes the run once there is space."""
    result = commands.run(
        *TRAIN, config, "epochs=10", LD_PRELOAD=preload_library, FULL="metrics.jsonl"
    )
    assert result.status == 74, result.text
    message = (
        f"error: {tmp_path / 'run' / 'metrics.jsonl'} could not be written: No space left on "
        "device. Everything written earlier is intact"
    )
    assert message in result.stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    result = commands.run(*TRAIN, config, "epochs=10", "--stop-after", "1")
    assert result.status == 0, result.text
    assert logged_steps(tmp_path / "run")[-1] == int(checkpoint.name.removeprefix("step_")) + 1


def test_slow_or_failing_logs_do_not_delay_a_run_with_on_failure_warn(
    config, preload_library, tmp_path
):
    run = tmp_path / "run"
    result = commands.run(
        *TRAIN,
        config,
        "epochs=4",
        "checkpoint.on_failure=warn",
        "health.every_steps=1",
        LD_PRELOAD=preload_library,
        SLOW="metrics.jsonl",
        FULL="plots.jsonl",
    )
    assert result.status == 0, result.text
    assert f"{run / 'plots.jsonl'} could not be written: No space left on device" in result.text
    assert result.text.count("plots.jsonl could not be written") == 1
    assert logged_steps(run) == list(range(1, 9))
    times = [
        json.loads(line)["seconds_per_step"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert min(times) < 1, times


@pytest.mark.full
def test_records_on_the_disk_survive_a_power_cut_during_a_resumed_run(config, tmp_path):
    """The file system is ext4, mounted so that it does not flush before a rename, like XFS.

    A copy of the mounted device simulates the power cut.
    """
    if os.getuid() != 0:
        pytest.skip("a loop device needs root")
    for name in ("disk", "disk_after_cut"):
        (tmp_path / name).mkdir()
    device, device_copy = tmp_path / "device", tmp_path / "device_copy"
    device.touch()
    os.truncate(device, 96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    if subprocess.run(
        ["mount", "-o", "loop,noauto_da_alloc", device, tmp_path / "disk"], capture_output=True
    ).returncode:
        pytest.skip("this machine has no loop device")
    run = tmp_path / "disk" / "run"
    try:
        first = commands.run(
            *TRAIN,
            config,
            f"output={run}",
            "epochs=10000",
            "checkpoint.every_epochs=1",
            "--stop-after",
            "5",
        )
        assert first.status == 0, first.text
        os.sync()
        config_size, saved_steps = (run / "config.yaml").stat().st_size, logged_steps(run)
        process = commands.start(
            *TRAIN, config, f"output={run}", "epochs=10000", "checkpoint.every_epochs=1"
        )
        try:
            deadline = time.monotonic() + 120
            while (
                not (run / "checkpoints" / "step_00000010").exists() and time.monotonic() < deadline
            ):
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGSTOP)
            shutil.copyfile(device, device_copy)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        subprocess.run(["e2fsck", "-p", device_copy], capture_output=True)
        subprocess.run(
            ["mount", "-o", "loop", device_copy, tmp_path / "disk_after_cut"], check=True
        )
        run_after_cut = tmp_path / "disk_after_cut" / "run"
        assert [
            json.loads(line)["step"]
            for line in (run_after_cut / "metrics.jsonl").read_text().splitlines()
        ][: len(saved_steps)] == saved_steps
        assert (run_after_cut / "config.yaml").stat().st_size == config_size
    finally:
        for name in ("disk", "disk_after_cut"):
            subprocess.run(["umount", "-l", tmp_path / name], capture_output=True)


@pytest.mark.full
def test_two_containers_exclude_each_other_and_a_dead_one_is_replaced(config, tmp_path):
    """Containers of `docker run --network host` share the host name but not the process ids."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a PID namespace needs root and unshare")
    first = commands.start(*TRAIN, config, "epochs=100000")
    command = [
        "unshare",
        "--pid",
        "--fork",
        "--mount-proc",
        sys.executable,
        *TRAIN,
        config,
        "epochs=100000",
    ]
    environment = os.environ | {"PYTHONPATH": str(commands.ROOT)}
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        second = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120
        )
        assert (
            second.returncode == 2 and f"is in use by process {first.pid} on " in second.stderr
        ), second.stderr
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    third = subprocess.run(
        [*command, "--stop-after", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert third.returncode == 0, third.stderr


def test_a_user_without_a_passwd_entry_trains_from_a_checkout_with_spaces_in_its_path(tmp_path):
    """A container may be started with a user ID that has no name and no home."""
    as_unnamed_user = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*as_unnamed_user, "true"], capture_output=True).returncode
    ):
        pytest.skip("a user without a name needs user namespaces")
    checkout = tmp_path / "a check out"
    for name in ("ssl_pretrain", "eval", "launch"):
        shutil.copytree(
            commands.ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    config = commands.write_config(
        tmp_path, commands.write_class_folders(tmp_path / "images", "train")
    )
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("HOME", "USER", "LOGNAME", "PYTHONPATH")
    }
    result = subprocess.run(
        [*as_unnamed_user, sys.executable, "launch/pretrain.py", config, "evaluation.at_end=[]"],
        cwd=checkout,
        env=environment | {"HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert logged_steps(tmp_path / "run") == [1, 2]
