"""One run folder, one run; what is stale is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import run_ranks

from ssl_pretrain import lock
from ssl_pretrain.lock import Lock


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
    assert said == f"output: {tmp_path} is in use by process {pid} on {host}, heard of 0 s ago; give another output, or end that run"
    with Lock(tmp_path):
        assert (tmp_path / "lock.json").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_a_lock_that_is_taken_over(tmp_path):
    code = "import os, sys; from pathlib import Path; from ssl_pretrain.lock import Lock; Lock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=os.getcwd(), env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=120)
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
    past = (tmp_path / "lock.json").stat().st_mtime - lock.STALE_SECONDS - 1
    os.utime(tmp_path / "lock.json", (past, past))
    with Lock(tmp_path):
        pass


def test_another_machine_that_stays_silent_is_waited_for(tmp_path, monkeypatch):
    """A machine that lost its power a moment ago and a run that is well look alike, until one of them is heard."""
    _write(tmp_path, host="elsewhere")
    monkeypatch.setattr(lock, "STALE_SECONDS", 2.0)
    began = time.monotonic()
    with Lock(tmp_path):
        assert 1.5 < time.monotonic() - began < 60


def test_an_unreadable_lock_is_taken_over(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with Lock(tmp_path):
        pass


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
