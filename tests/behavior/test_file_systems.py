"""Unusual file systems and containers: a run works, or is refused at its start with the reason."""

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
def lacking(tmp_path_factory):
    """Return a library that removes the features in the variable LACKS from every file system."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("lacking") / "lacking.so"
    source = Path(__file__).with_name("lacking.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


@pytest.fixture
def config(tmp_path):
    root = commands.class_folders(tmp_path / "images", "train")
    return commands.write_config(tmp_path, root)


def records(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_needs_no_hard_links_flock_or_fsync_of_folders(config, lacking, tmp_path):
    finished = commands.run(*TRAIN, config, LD_PRELOAD=lacking, LACKS="link flock folder_fsync")
    assert finished.status == 0, finished.text
    assert records(tmp_path / "run") == [1, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("fsync", "Invalid argument (fsync a file)"),
        pytest.param(
            "folder_rename", "Function not implemented (rename a folder)", marks=pytest.mark.full
        ),
    ],
)
def test_a_file_system_that_cannot_hold_checkpoints_is_refused_at_the_start(
    config, lacking, tmp_path, lacks, said
):
    finished = commands.run(*TRAIN, config, LD_PRELOAD=lacking, LACKS=lacks)
    assert finished.status == 2, finished.text
    place = tmp_path / "run" / "checkpoints"
    assert (
        f"error: output: no checkpoint can be written to {place}: {said}; free space, get "
        in finished.stderr
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and list(place.iterdir()) == []


def test_a_disk_that_is_full_for_the_log_ends_a_run_saved_and_retryable(config, lacking, tmp_path):
    """The steps done are saved, the file is named, and torchrun and SLURM start the run again."""
    finished = commands.run(*TRAIN, config, "epochs=10", LD_PRELOAD=lacking, FULL="metrics.jsonl")
    assert finished.status == 74, finished.text
    said = (
        f"error: {tmp_path / 'run' / 'metrics.jsonl'} could not be written: No "
        f"space left on device. What was written before is complete"
    )
    assert said in finished.stderr
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    finished = commands.run(*TRAIN, config, "epochs=10", "--stop-after", "1")
    assert finished.status == 0, finished.text
    assert records(tmp_path / "run")[-1] == int(saved.name.removeprefix("step_")) + 1


def test_a_disk_that_is_slow_or_full_for_the_log_does_not_hold_up_a_run_told_to_warn(
    config, lacking, tmp_path
):
    run = tmp_path / "run"
    finished = commands.run(
        *TRAIN,
        config,
        "epochs=4",
        "checkpoint.on_failure=warn",
        "health.every_steps=1",
        LD_PRELOAD=lacking,
        SLOW="metrics.jsonl",
        FULL="plots.jsonl",
    )
    assert finished.status == 0, finished.text
    assert f"{run / 'plots.jsonl'} could not be written: No space left on device" in finished.text
    assert finished.text.count("plots.jsonl could not be written") == 1
    assert records(run) == list(range(1, 9))
    times = [
        json.loads(line)["seconds_per_step"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert min(times) < 1, times


@pytest.mark.full
def test_records_on_the_disk_survive_a_power_cut_during_a_resumed_run(config, tmp_path):
    """The file system is an ext4 that, like XFS, does not flush before a rename.

    The power cut is a copy of the device while it is mounted.
    """
    if os.getuid() != 0:
        pytest.skip("a loop device needs root")
    for name in ("m", "c"):
        (tmp_path / name).mkdir()
    device, cut = tmp_path / "disk", tmp_path / "cut"
    device.touch()
    os.truncate(device, 96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    if subprocess.run(
        ["mount", "-o", "loop,noauto_da_alloc", device, tmp_path / "m"], capture_output=True
    ).returncode:
        pytest.skip("no loop device here")
    run = tmp_path / "m" / "run"
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
        written, saved = (run / "config.yaml").stat().st_size, records(run)
        going = commands.start(
            *TRAIN, config, f"output={run}", "epochs=10000", "checkpoint.every_epochs=1"
        )
        try:
            end = time.monotonic() + 120
            while not (run / "checkpoints" / "step_00000010").exists() and time.monotonic() < end:
                time.sleep(0.05)
            os.killpg(going.pid, signal.SIGSTOP)
            shutil.copyfile(device, cut)
        finally:
            os.killpg(going.pid, signal.SIGKILL)
            going.communicate()
        subprocess.run(["e2fsck", "-p", cut], capture_output=True)
        subprocess.run(["mount", "-o", "loop", cut, tmp_path / "c"], check=True)
        kept = tmp_path / "c" / "run"
        assert [
            json.loads(line)["step"] for line in (kept / "metrics.jsonl").read_text().splitlines()
        ][: len(saved)] == saved
        assert (kept / "config.yaml").stat().st_size == written
    finally:
        for name in ("m", "c"):
            subprocess.run(["umount", "-l", tmp_path / name], capture_output=True)


@pytest.mark.full
def test_two_containers_exclude_each_other_and_a_dead_one_is_replaced(config, tmp_path):
    """Containers of `docker run --network host` share the host name but not the process ids."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a PID namespace needs root and unshare")
    first = commands.start(*TRAIN, config, "epochs=100000")
    inside = [
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
        end = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        second = subprocess.run(
            inside, env=environment, capture_output=True, text=True, timeout=120
        )
        assert (
            second.returncode == 2 and f"is in use by process {first.pid} on " in second.stderr
        ), second.stderr
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    third = subprocess.run(
        [*inside, "--stop-after", "1"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert third.returncode == 0, third.stderr


def test_a_checkout_with_a_space_trains_as_a_user_without_a_passwd_entry(tmp_path):
    """A container may be started with a user id that has no name and no home."""
    nobody = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*nobody, "true"], capture_output=True).returncode
    ):
        pytest.skip("a user without a name needs user namespaces")
    checkout = tmp_path / "a check out"
    for name in ("ssl_pretrain", "eval", "launch"):
        shutil.copytree(
            commands.ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    config = commands.write_config(tmp_path, commands.class_folders(tmp_path / "images", "train"))
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("HOME", "USER", "LOGNAME", "PYTHONPATH")
    }
    finished = subprocess.run(
        [*nobody, sys.executable, "launch/pretrain.py", config, "evaluation.at_end=[]"],
        cwd=checkout,
        env=environment | {"HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert records(tmp_path / "run") == [1, 2]
