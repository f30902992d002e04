"""File systems and containers that lack something: a run works there, or is refused at its start by name."""

from __future__ import annotations

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

TRAIN = ("-m", "ssl_pretrain.train")


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """A library that makes every file system lack what the variable LACKS names."""
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


def test_a_run_does_without_hard_links_flock_and_fsync_of_folders(config, lacking, tmp_path):
    finished = commands.run(*TRAIN, config, LD_PRELOAD=lacking, LACKS="link flock folder_fsync")
    assert finished.status == 0, finished.text
    assert records(tmp_path / "run") == [1, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("fsync", "Invalid argument (fsync a file)"),
        pytest.param("folder_rename", "Function not implemented (rename a folder)", marks=pytest.mark.full),
    ],
)
def test_what_a_checkpoint_cannot_do_without_is_refused_at_the_start(config, lacking, tmp_path, lacks, said):
    finished = commands.run(*TRAIN, config, LD_PRELOAD=lacking, LACKS=lacks)
    assert finished.status == 2, finished.text
    place = tmp_path / "run" / "checkpoints"
    assert f"error: output: no checkpoint can be written to {place}: {said}; make room or give the right" in finished.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and list(place.iterdir()) == []


@pytest.mark.full
def test_two_containers_exclude_each_other_and_a_dead_one_is_taken_over(config, tmp_path):
    """The host's name, and process ids of their own: as docker run --network host."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a PID namespace needs root and unshare")
    first = commands.start(*TRAIN, config, "epochs=100000")
    inside = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, *TRAIN, config]
    environment = os.environ | {"PYTHONPATH": str(commands.ROOT)}
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        end = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        second = subprocess.run(inside, env=environment, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2 and f"is in use by process {first.pid} on " in second.stderr, second.stderr
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    third = subprocess.run([*inside, "epochs=100000", "--stop-after", "1"], env=environment, capture_output=True, text=True, timeout=120)
    assert third.returncode == 75, third.stderr


def test_a_checkout_with_a_space_trains_as_a_user_without_a_passwd_entry(tmp_path):
    """As in a container that is started with an arbitrary user: a number without a name, and no home."""
    nobody = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if shutil.which("unshare") is None or subprocess.run([*nobody, "true"], capture_output=True).returncode:
        pytest.skip("a user without a name needs user namespaces")
    checkout = tmp_path / "a check out"
    for name in ("ssl_pretrain", "eval", "launch"):
        shutil.copytree(commands.ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    config = commands.write_config(tmp_path, commands.class_folders(tmp_path / "images", "train"))
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME", "PYTHONPATH")}
    finished = subprocess.run(
        [*nobody, sys.executable, "launch/pretrain.py", config, "evaluation.at_end=[]"],
        cwd=checkout, env=environment | {"HOME": "/nonexistent"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert records(tmp_path / "run") == [1, 2]
