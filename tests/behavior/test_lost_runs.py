"""Failures that could go unnoticed: ranks that differ, little shared memory, a lost folder."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import commands
import pytest

pytestmark = pytest.mark.full  # each test starts several processes; `make test-full` runs them

TRAIN = ("-m", "ssl_pretrain.train")


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def run_two_ranks(config, first: str, second: str) -> list[commands.CommandResult]:
    """Run two ranks as two machines would start them, each with its own override."""
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        commands.start(*TRAIN, config, override, RANK=str(rank), **variables)
        for rank, override in enumerate((first, second))
    ]
    return [commands.finish(process, 300) for process in processes]


def test_ranks_with_different_settings_do_not_train(tmp_path):
    root = commands.write_class_folders(tmp_path / "images", "train")
    config = commands.write_config(tmp_path, root)
    for result in run_two_ranks(config, "seed=0", "seed=1"):
        assert result.status == 2, result.text
        host = socket.gethostname()
        assert result.stderr.splitlines()[-1] == (
            f"error: the ranks disagree: seed: 0 on rank 0 ({host}), 1 on rank 1 ({host}); "
            "start every rank with the same configuration and overrides"
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.full
def test_ranks_with_different_images_do_not_train(tmp_path):
    roots = [commands.write_class_folders(tmp_path / name, "train") for name in ("x", "y")]
    (roots[1] / "train" / "class_0" / "0.png").unlink()
    config = commands.write_config(tmp_path, roots[0])
    for result in run_two_ranks(config, f"data.root={roots[0]}", f"data.root={roots[1]}"):
        assert result.status == 2, result.text
        assert "data.root: training images: 16 on rank 0" in result.stderr
        assert "15 on rank 1" in result.stderr and "the same copy of the data set" in result.stderr


@pytest.mark.full
def test_workers_send_smaller_chunks_if_shared_memory_is_small(tmp_path):
    """A container has 64 MiB of /dev/shm. This test has 1 MiB for 16 images of 0.3 MiB each."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting needs root")
    root = commands.write_class_folders(tmp_path / "images", "train")
    config = commands.write_config(tmp_path, root)
    overrides = ["data.num_workers=1", "views.crops.global.size=160", "global_batch_size=16"]
    mount = 'mount -t tmpfs -o size=SIZE tmpfs /dev/shm && exec "$@"'

    def run_with_shared_memory(size: str) -> commands.CommandResult:
        command = ["unshare", "-m", "bash", "-c", mount.replace("SIZE", size), "-"]
        command += [sys.executable, *TRAIN, str(config), *overrides]
        result = subprocess.run(
            command, cwd=commands.ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        return commands.CommandResult(result.returncode, result.stdout, result.stderr)

    result = run_with_shared_memory("1m")
    assert result.status == 0 and "so workers send 1 images at a time instead of 16" in result.text
    shutil.rmtree(tmp_path / "run")
    result = run_with_shared_memory("256k")
    assert result.status == 2, result.text
    last_line = result.stderr.splitlines()[-1]
    assert (
        last_line.startswith("error: data.num_workers: 1 workers")
        and "/dev/shm has 0.2 MiB" in last_line
    )
    assert "--shm-size=8g or --ipc=host" in last_line


@pytest.mark.full
def test_a_killed_worker_is_reported_and_the_run_can_be_started_again(tmp_path):
    """The kernel kills a worker when memory runs out."""
    root = commands.write_class_folders(tmp_path / "images", "train")
    config = commands.write_config(tmp_path, root)
    process = commands.start(*TRAIN, config, "epochs=100000", "data.num_workers=2")
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    fork_servers = [pid for pid in find_child_processes(process.pid) if find_child_processes(pid)]
    os.kill(find_child_processes(fork_servers[0])[0], signal.SIGKILL)
    result = commands.finish(process, 60)
    assert result.status == 69 and "Traceback" not in result.text, result.text
    assert "error: data.num_workers: a process that reads images was killed" in result.stderr


def find_child_processes(pid: int) -> list[int]:
    result = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in result.stdout.split()]


@pytest.mark.full
def test_a_suspended_run_that_lost_its_folder_ends_when_it_wakes(tmp_path):
    root = commands.write_class_folders(tmp_path / "images", "train")
    config = commands.write_config(tmp_path, root)
    run = tmp_path / "run"
    process = commands.start(*TRAIN, config, "epochs=100000", "checkpoint.every_epochs=0")
    try:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        lock = run / "lock.json"
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "elsewhere", "pid": 7}))
        time.sleep(31)  # longer than the interval of the lock's checks
    finally:
        process.send_signal(signal.SIGCONT)
    result = commands.finish(process, 60)
    assert result.status == 2
    assert f"error: output: {run} was taken over by process 7 on elsewhere" in result.stderr
    assert json.loads(lock.read_text())["host"] == "elsewhere"


@pytest.mark.full
def test_the_watchdog_waits_for_a_slow_save(tmp_path):
    program = tmp_path / "slow.py"
    program.write_text(
        "import os, sys, time\n"
        "from ssl_pretrain import train\n"
        "real_fsync = os.fsync\n"
        "def fsync(descriptor):\n"
        "    if '.writing-step' in os.readlink(f'/proc/self/fd/{descriptor}'):\n"
        "        time.sleep(4)\n"
        "    return real_fsync(descriptor)\n"
        "os.fsync = fsync\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(train.main(sys.argv[1:]))\n"
    )
    root = commands.write_class_folders(tmp_path / "images", "train")
    config = commands.write_config(tmp_path, root)
    result = commands.run(program, config, "parallel.timeout_seconds=5", timeout=300)
    assert result.status == 0, result.text
    assert "still waiting for the disk to write the checkpoint of step 2 in " in result.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
