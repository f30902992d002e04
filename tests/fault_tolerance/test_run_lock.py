"""One run per folder: a second run is refused, and a stale lock is taken over."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import run_ranks

from ssl_pretrain.fault_tolerance import run_lock
from ssl_pretrain.fault_tolerance.lock_holder import LockHolder
from ssl_pretrain.fault_tolerance.run_lock import RunLock, find_holder


def refusal_message(run) -> str:
    with pytest.raises(ValueError) as error, RunLock(run):
        pass
    return str(error.value)


def write_lock(run, **changes):
    run.mkdir(exist_ok=True)
    (run / "lock.json").write_text(replace(LockHolder.this_process(), **changes).to_json())


def read_lock(run):
    return json.loads((run / "lock.json").read_text())


def assert_takes_over_after_waiting(run):
    start = time.monotonic()
    with RunLock(run):
        assert 1.5 < time.monotonic() - start < 60


def start_python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_run_is_refused_and_the_folder_is_free_afterwards(tmp_path):
    with RunLock(tmp_path):
        message = refusal_message(tmp_path)
    assert message == (
        f"output: {tmp_path} is in use by process {os.getpid()} on "
        f"{LockHolder.this_process().host}, whose last sign of life was 0 s ago; give another "
        "output, or end that run"
    )
    with RunLock(tmp_path):
        assert (tmp_path / "lock.json").exists()
    assert list(tmp_path.iterdir()) == []


TAKE_LOCK = """
import os, sys, time
from pathlib import Path
from ssl_pretrain.fault_tolerance.run_lock import RunLock
lock = RunLock(Path(sys.argv[1])).__enter__()
"""


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    start_python(TAKE_LOCK + "os.kill(os.getpid(), 9)", tmp_path).communicate(timeout=120)
    assert (tmp_path / "lock.json").exists()
    with RunLock(tmp_path):
        assert read_lock(tmp_path)["pid"] == os.getpid()


def test_a_reused_process_id_is_not_the_process_that_held_the_lock(tmp_path):
    write_lock(tmp_path, born="1")
    with RunLock(tmp_path):
        pass


@pytest.mark.case(28)
def test_another_machine_keeps_the_folder_while_it_shows_signs_of_life(tmp_path, monkeypatch):
    write_lock(tmp_path, host="elsewhere", job="77")
    stop_touching = threading.Event()

    def touch_regularly() -> None:
        while not stop_touching.wait(0.3):
            os.utime(tmp_path / "lock.json")

    other_machine = threading.Thread(target=touch_regularly)
    other_machine.start()
    try:
        message = refusal_message(tmp_path)
        assert "on elsewhere, SLURM job 77, whose last sign of life was 0 s ago" in message
    finally:
        stop_touching.set()
        other_machine.join()
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # requeued on another node
    with RunLock(tmp_path):
        pass
    monkeypatch.delenv("SLURM_JOB_ID")
    write_lock(tmp_path, host="elsewhere")
    stale_time = (tmp_path / "lock.json").stat().st_mtime - run_lock.STALE_SECONDS - 1
    os.utime(tmp_path / "lock.json", (stale_time, stale_time))
    with RunLock(tmp_path):
        pass


def test_a_silent_machine_is_waited_for(tmp_path, monkeypatch):
    """A machine that lost its power looks like a healthy one until the next sign of life is due."""
    write_lock(tmp_path, host="elsewhere")
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    assert_takes_over_after_waiting(tmp_path)


def test_an_unreadable_lock_is_taken_over(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with RunLock(tmp_path):
        pass


@pytest.fixture
def without_links(monkeypatch):
    def link(*_arguments, **_options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


@pytest.fixture
def without_flock(monkeypatch):
    def flock(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_run_is_refused_without_hard_links_and_flock(
    tmp_path, without_links, without_flock
):
    with RunLock(tmp_path):
        assert "is in use by process" in refusal_message(tmp_path)
    write_lock(tmp_path, born="1")
    with RunLock(tmp_path):
        assert read_lock(tmp_path)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_being_written_is_not_taken_over(tmp_path, without_links, without_flock):
    """Without hard links the file is empty for a moment."""
    (tmp_path / "lock.json").touch()
    content = LockHolder.this_process().to_json()
    writer = threading.Timer(1.0, lambda: (tmp_path / "lock.json").write_text(content))
    writer.start()
    assert f"is in use by process {os.getpid()}" in refusal_message(tmp_path)
    writer.join()


HOLD_IN_CONTAINER = """
import sys, time
from pathlib import Path
from ssl_pretrain.fault_tolerance import lock_holder, run_lock
lock_holder._pid_namespace = lambda: "pid:[1]"
lock = run_lock.RunLock(Path(sys.argv[1])).__enter__()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def container(tmp_path):
    """Yield a process that holds the folder from another namespace of process ids."""
    with start_python(HOLD_IN_CONTAINER, tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        content = read_lock(tmp_path) | {"pid": 1, "born": "1"}  # ids as the container sees them
        (tmp_path / "lock.json").write_text(json.dumps(content))
        yield process
        process.kill()


def test_a_live_container_keeps_the_folder_and_a_dead_one_loses_it_at_once(tmp_path, container):
    assert "is in use by process 1 on" in refusal_message(tmp_path)
    assert find_holder(tmp_path).pid == 1
    container.kill()
    container.wait()
    assert find_holder(tmp_path) is None
    start = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - start < run_lock.CLEANUP_SECONDS


def test_without_flock_another_container_is_treated_like_another_machine(
    tmp_path, without_flock, monkeypatch
):
    write_lock(tmp_path, namespace="pid:[1]", born="1", pid=1)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    assert_takes_over_after_waiting(tmp_path)


def test_a_flock_on_another_mount_proves_nothing(tmp_path, monkeypatch):
    """Two containers that mount one network folder separately have separate flocks."""
    write_lock(tmp_path, namespace="pid:[1]", flock="1:2")
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    assert_takes_over_after_waiting(tmp_path)


def test_a_lock_written_by_an_older_version_is_understood(tmp_path):
    content = json.loads(LockHolder.this_process().to_json())
    del content["namespace"], content["flock"]
    (tmp_path / "lock.json").write_text(json.dumps(content))
    assert "is in use by process" in refusal_message(tmp_path)
    (tmp_path / "lock.json").write_text(json.dumps(content | {"born": "1"}))
    with RunLock(tmp_path):
        pass


FORK_AND_DIE = """
child = os.fork()
if not child:
    print(os.getpid(), flush=True)
    time.sleep(600)
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    process = start_python(TAKE_LOCK + FORK_AND_DIE, tmp_path)
    worker = int(process.stdout.readline())
    process.wait()
    with RunLock(tmp_path):
        pass
    os.kill(worker, 9)


def take_lock_on_rank(run):
    try:
        with RunLock(run):
            return "free"
    except ValueError as error:
        return str(error)


def test_every_rank_gets_the_error(tmp_path):
    with RunLock(tmp_path):
        answers = run_ranks(take_lock_on_rank, tmp_path, world_size=2)
    assert len(set(answers)) == 1 and "is in use by process" in answers[0]
    assert run_ranks(take_lock_on_rank, tmp_path, world_size=2) == ["free", "free"]


HOLD = """
import sys, time
from pathlib import Path
from ssl_pretrain.fault_tolerance import run_lock
run_lock.TOUCH_SECONDS = 0.3
with run_lock.RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start_holder(run, seconds):
    process = start_python(HOLD, run, seconds)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_that_lost_its_folder_ends(tmp_path):
    """Another machine took over while this one was suspended."""
    process = start_holder(tmp_path, 60)
    write_lock(tmp_path, host="elsewhere", pid=7)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err == (
        f"error: output: {tmp_path} was taken over by process 7 on elsewhere while this run was "
        "silent; this run ends and writes nothing more\n"
    )
    assert read_lock(tmp_path)["host"] == "elsewhere"


@pytest.mark.parametrize(
    "damage",
    [
        "removed",
        pytest.param("emptied", marks=pytest.mark.full),
        pytest.param("removed with its folder", marks=pytest.mark.full),
    ],
)
def test_a_lock_that_vanishes_is_written_again(tmp_path, damage):
    run = tmp_path / "run"
    process = start_holder(run, 7)
    if damage == "emptied":
        os.truncate(run / "lock.json", 0)
    else:
        (run / "lock.json").unlink()
    if damage == "removed with its folder":
        run.rmdir()
    time.sleep(5)
    assert read_lock(run)["pid"] == process.pid
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and not (run / "lock.json").exists()
    path = run / "lock.json"
    assert err == (
        f"warning: {path} was removed or damaged while this run holds its folder; "
        "writing it again\n"
    )


def test_the_lock_is_checked_again_after_a_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 1000.0)
    with RunLock(tmp_path) as lock:
        write_lock(tmp_path, host="elsewhere", pid=7)
        lock.check()  # the last check was a moment ago
        lock._last_check -= 1001
        with pytest.raises(ValueError, match="was taken over by process 7 on elsewhere"):
            lock.check()
        (tmp_path / "lock.json").write_text(lock._this_process.to_json())
        lock.check()


def test_a_suspended_machine_loses_the_folder_though_it_keeps_its_flock(tmp_path, monkeypatch):
    """A suspended run ends when it wakes. A machine that shows signs of life keeps its folder."""
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    write_lock(tmp_path, host="elsewhere")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        touch = threading.Timer(0.7, os.utime, [tmp_path / "lock.json"])
        touch.start()
        assert "is in use by process" in refusal_message(tmp_path)
        touch.join()
        with RunLock(tmp_path) as lock:
            assert read_lock(tmp_path) == json.loads(lock._this_process.to_json())
    finally:
        os.close(descriptor)
