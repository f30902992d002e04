"""One run folder, one run; what is stale is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import run_ranks

from ssl_pretrain.fault_tolerance import run_lock
from ssl_pretrain.fault_tolerance.run_lock import Lock


def _refused(run) -> str:
    with pytest.raises(ValueError) as error, Lock(run):
        pass
    return str(error.value)


def _write(run, **changes):
    run.mkdir(exist_ok=True)
    own = Lock(run)._own
    (run / "lock.json").write_text(json.dumps(own | changes))


def test_a_second_run_is_refused_by_name_and_the_folder_is_free_afterwards(tmp_path):
    with Lock(tmp_path):
        said = _refused(tmp_path)
    pid, host = os.getpid(), json.dumps(Lock(tmp_path)._own["host"])[1:-1]
    assert (
        said
        == f"output: {tmp_path} is in use by process {pid} on {host}, heard of 0 s ago; give another output, or end that run"
    )
    with Lock(tmp_path):
        assert (tmp_path / "lock.json").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_a_lock_that_is_taken_over(tmp_path):
    code = "import os, sys; from pathlib import Path; from ssl_pretrain.fault_tolerance.run_lock import Lock; Lock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=os.getcwd(),
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=120,
    )
    assert (tmp_path / "lock.json").exists()
    with Lock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_a_number_given_again_is_not_the_process_that_was(tmp_path):
    _write(tmp_path, born="1")
    with Lock(tmp_path):
        pass


@pytest.mark.case(28)
def test_another_machine_is_believed_while_it_is_heard(tmp_path, monkeypatch):
    _write(tmp_path, host="elsewhere", job="77")
    refused = threading.Event()

    def lives() -> None:
        while not refused.wait(0.3):
            os.utime(tmp_path / "lock.json")

    other = threading.Thread(target=lives)
    other.start()
    try:
        assert "on elsewhere, SLURM job 77, heard of 0 s ago" in _refused(tmp_path)
    finally:
        refused.set()
        other.join()
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # requeued on another node
    with Lock(tmp_path):
        pass
    monkeypatch.delenv("SLURM_JOB_ID")
    _write(tmp_path, host="elsewhere")
    past = (tmp_path / "lock.json").stat().st_mtime - run_lock.STALE_SECONDS - 1
    os.utime(tmp_path / "lock.json", (past, past))
    with Lock(tmp_path):
        pass


def test_another_machine_that_stays_silent_is_waited_for(tmp_path, monkeypatch):
    """A machine that lost its power a moment ago and a run that is well look alike, until one of them is heard."""
    _write(tmp_path, host="elsewhere")
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    began = time.monotonic()
    with Lock(tmp_path):
        assert 1.5 < time.monotonic() - began < 60


def test_an_unreadable_lock_is_taken_over(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with Lock(tmp_path):
        pass


@pytest.fixture
def without_links(monkeypatch):
    def link(*_arguments, **_named):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


@pytest.fixture
def without_flock(monkeypatch):
    def flock(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_hard_links_and_flock_a_second_run_is_refused_all_the_same(
    tmp_path, without_links, without_flock
):
    with Lock(tmp_path):
        assert "is in use by process" in _refused(tmp_path)
    _write(tmp_path, born="1")
    with Lock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_just_being_written_is_not_taken(tmp_path, without_links, without_flock):
    """Without links there is a moment in which the file is there and empty."""
    (tmp_path / "lock.json").touch()
    content = json.dumps(Lock(tmp_path)._own)
    writer = threading.Timer(1.0, lambda: (tmp_path / "lock.json").write_text(content))
    writer.start()
    assert f"is in use by process {os.getpid()}" in _refused(tmp_path)
    writer.join()


HOLD = """
import json, os, sys, time
from pathlib import Path
from ssl_pretrain.fault_tolerance import run_lock as lock
lock._namespace = lambda: "pid:[1]"  # a container's
held = lock.Lock(Path(sys.argv[1])).__enter__()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def container(tmp_path):
    """A process that holds the folder, with this host's name and process ids of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        written = json.loads((tmp_path / "lock.json").read_text())
        (tmp_path / "lock.json").write_text(
            json.dumps(written | {"pid": 1, "born": "1"})
        )  # as it sees itself
        yield process
        process.kill()


def test_another_container_that_lives_is_refused_and_a_dead_one_is_taken_over_at_once(
    tmp_path, container
):
    assert "is in use by process 1 on" in _refused(tmp_path)
    assert run_lock.holder(tmp_path)["pid"] == 1
    container.kill()
    container.wait()
    assert run_lock.holder(tmp_path) is None
    began = time.monotonic()
    with Lock(tmp_path):
        assert time.monotonic() - began < run_lock.DYING_SECONDS


def test_without_flock_another_container_is_waited_for_as_another_machine_is(
    tmp_path, without_flock, monkeypatch
):
    _write(tmp_path, namespace="pid:[1]", born="1", pid=1)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    began = time.monotonic()
    with Lock(tmp_path):
        assert 1.5 < time.monotonic() - began < 60


def test_a_flock_of_another_mount_says_nothing_about_its_holder(tmp_path, monkeypatch):
    """Two containers may have mounted one network folder each by itself: their flocks do not meet."""
    _write(tmp_path, namespace="pid:[1]", flock="1:2")
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    began = time.monotonic()
    with Lock(tmp_path):
        assert time.monotonic() - began > 1.5


def test_a_lock_of_the_version_before_is_understood(tmp_path):
    own = Lock(tmp_path)._own
    older = {key: value for key, value in own.items() if key not in ("namespace", "flock")}
    (tmp_path / "lock.json").write_text(json.dumps(older))
    assert "is in use by process" in _refused(tmp_path)
    (tmp_path / "lock.json").write_text(json.dumps(older | {"born": "1"}))
    with Lock(tmp_path):
        pass


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from ssl_pretrain.fault_tolerance.run_lock import Lock; Lock(Path(sys.argv[1])).__enter__(); "
        "child = os.fork(); child or (print(os.getpid(), flush=True), time.sleep(600)); time.sleep(0.5); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        worker = int(process.stdout.readline())
        process.wait()
    with Lock(tmp_path):
        pass
    os.kill(worker, 9)


def _on_a_rank(run):
    try:
        with Lock(run):
            return "free"
    except ValueError as error:
        return str(error)


def test_every_rank_hears_of_it(tmp_path):
    with Lock(tmp_path):
        answers = run_ranks(_on_a_rank, tmp_path, world_size=2)
    assert len(set(answers)) == 1 and "is in use by process" in answers[0]
    assert run_ranks(_on_a_rank, tmp_path, world_size=2) == ["free", "free"]


HOLDER = """
import os, sys, time
from pathlib import Path
from ssl_pretrain.fault_tolerance import run_lock as lock
lock.BEAT_SECONDS = 0.3
with lock.Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _holding(run, seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run), str(seconds)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_that_lost_its_folder_ends_itself(tmp_path):
    """The machine was suspended, another one took over, and the first one wakes."""
    process = _holding(tmp_path, 60)
    _write(tmp_path, host="elsewhere", pid=7)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err == (
        f"error: output: {tmp_path} was taken over by process 7 on elsewhere while this run was silent; this one ends and writes nothing more\n"
    )
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == "elsewhere"


@pytest.mark.parametrize(
    "how",
    [
        "removed",
        *(pytest.param(how, marks=pytest.mark.full) for how in ("emptied", "with its folder")),
    ],
)
def test_a_lock_that_vanishes_is_written_again(tmp_path, how):
    run = tmp_path / "run"
    process = _holding(run, 7)
    if how == "emptied":
        os.truncate(run / "lock.json", 0)
    else:
        (run / "lock.json").unlink()
    if how == "with its folder":
        run.rmdir()
    time.sleep(5)
    assert json.loads((run / "lock.json").read_text())["pid"] == process.pid
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and not (run / "lock.json").exists()
    assert (
        err
        == f"warning: {run / 'lock.json'} was removed while this run holds its folder; written again\n"
    )


def test_a_step_and_a_save_look_after_a_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 1000.0)
    with Lock(tmp_path) as held:
        _write(tmp_path, host="elsewhere", pid=7)
        held.check()  # it was heard of a moment ago
        held._checked -= 1001
        with pytest.raises(ValueError, match="was taken over by process 7 on elsewhere"):
            held.check()
        (tmp_path / "lock.json").write_text(json.dumps(held._own))
        held.check()


def test_a_suspended_holder_of_another_name_is_taken_over_though_it_keeps_its_flock(
    tmp_path, monkeypatch
):
    """It ends itself when it wakes. One that is heard of keeps its folder."""
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    _write(tmp_path, host="elsewhere")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        beating = threading.Timer(0.7, os.utime, [tmp_path / "lock.json"])
        beating.start()
        assert "is in use by process" in _refused(tmp_path)
        beating.join()
        with Lock(tmp_path) as taken:
            assert json.loads((tmp_path / "lock.json").read_text()) == taken._own
    finally:
        os.close(descriptor)
