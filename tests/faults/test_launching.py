"""Ranks that cannot form a group, and ranks that torchrun restarts.

Two torchrun agents on this machine stand in for two hosts.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from ranks import free_port
from reference_run import OVERRIDES, STEPS, paths, reference, saved_steps

from ssl_pretrain import config
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.manifest import verify_checkpoint
from ssl_pretrain.launch import local

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).parent / "faulty.py"
pytestmark = [pytest.mark.full, pytest.mark.timeout(2400)]


def run_one_of_two(path, *arguments, **environment):
    """Start one rank of a group of two and return its exit status and its output."""
    environment = {"RANK": "0", "WORLD_SIZE": "2"} | environment
    (status,), output = ranks.run(path, *OVERRIDES, *arguments, size=1, environment=environment)
    return status, output


@pytest.mark.case(29)
def test_a_missing_host_is_reported_within_the_timeout(paths, observe):
    start = time.monotonic()
    status, output = run_one_of_two(paths[0], "parallel.timeout_seconds=5")
    seconds = time.monotonic() - start
    assert status == 69 and seconds < 60
    assert "rank 0 of 2 at 127.0.0.1:" in output and "1/2 clients joined" in output
    assert "check that every rank was started" in output
    observe(f"1 of 2 ranks: reported after {seconds:.0f} s with a timeout of 5 s, status 69")


@pytest.mark.case(29)
def test_an_unknown_host_is_reported_within_the_timeout(paths, observe):
    status, output = run_one_of_two(
        paths[0], "parallel.timeout_seconds=3", RANK="1", MASTER_ADDR="nowhere.invalid"
    )
    assert status == 69 and "at nowhere.invalid:" in output
    assert "this machine does not know that host: " in output
    observe("unknown host: named, status 69")


@pytest.mark.case(29)
def test_a_port_in_use_is_reported_at_once(paths, observe):
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        other.bind(("::", 0))
        other.listen()
        port = str(other.getsockname()[1])
        status, output = run_one_of_two(paths[0], MASTER_PORT=port)
    assert status == 69 and f":{port} (MASTER_ADDR, MASTER_PORT)" in output
    remedy = (
        "another process uses that port; give another one (launch.port, torchrun --master-port)"
    )
    assert remedy in output
    observe("port in use: named, status 69")


def build_environment(path, fault="none@0:0"):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FAULT": fault,
        "FAULT_DONE": str(path.parent / "fault_done"),
        "OMP_NUM_THREADS": "1",
    }


def run_command(command, environment, timeout_seconds=900):
    """Run a command and return its exit status and its output.

    After the timeout, the command is killed with its children.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=timeout_seconds)[0]
        return process.returncode, output
    finally:
        if process.poll() is None:
            kill_with_children(process.pid)


def has_same_tensors(run, expected):
    tensors = ranks.load_tensors(run)
    return all(torch.equal(tensors[name], value) for name, value in expected.items())


@pytest.mark.case(1)
def test_torchrun_restarts_all_ranks_from_the_newest_checkpoint(paths, reference, observe):
    path, run = paths
    command = local.train_command(str(path), OVERRIDES, 3, max_restarts=2)
    assert command[command.index("--max-restarts") + 1] == "2"
    position = command.index("-m", 3)
    command[position : position + 2] = [str(FAULTY)]
    status, output = run_command(command, build_environment(path, "kill@1:8"))
    assert status == 0, output[-3000:]
    assert "after step 6" in output
    assert verify_checkpoint(newest_checkpoint(run))["step"] == STEPS and has_same_tensors(
        run, reference
    )
    observe("torchrun --max-restarts: it restarted all ranks, from step 6; the same bits, status 0")


def test_torchrun_does_not_restart_ranks_after_a_users_mistake(paths):
    path, _ = paths
    command = local.train_command(str(path), [*OVERRIDES, "data.root=/nowhere"], 2, max_restarts=2)
    status, output = run_command(command, build_environment(path))
    assert status != 0 and 1 <= output.count("error: data.root: /nowhere does not exist") <= 2


@pytest.mark.case(1)
def test_a_lost_host_is_started_again_and_the_run_continues(paths, reference, observe):
    """The commands that launch.hosts prints run on two loopback addresses.

    All processes of the second host are killed at once.
    """
    path, run = paths
    settings = ["epochs=40", "checkpoint.every_epochs=1", "parallel.bn_group_images=6"]
    hosts = [
        "launch.hosts=127.0.0.1,127.0.0.2",
        "launch.ranks=2",
        f"launch.port={free_port()}",
        "parallel.timeout_seconds=30",
        f"output={run}",
    ]
    overrides = [*hosts, *settings]
    commands = local.host_commands(config.load(path, overrides), str(path), overrides)
    uninterrupted = run.with_name("run_uninterrupted")
    statuses, output = ranks.run(path, *settings, f"output={uninterrupted}", size=4)
    assert statuses == [0] * 4, output

    def start_agent(number):
        command = shlex.split(commands[number][1])
        command[command.index("torchrun")] = str(Path(sys.executable).parent / "torchrun")
        log = (path.parent / f"agent_{number}_{time.monotonic_ns()}").open("w")
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=build_environment(path),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    agents = [start_agent(0), start_agent(1)]
    try:
        wait_for_checkpoint(run, 20)
        kill_with_children(agents[1].pid)
        agents[1].wait(30)
        saved_step = verify_checkpoint(newest_checkpoint(run))["step"]
        agents[1] = start_agent(1)
        statuses = [agent.wait(900) for agent in agents]
        outputs = [file.read_text()[-3000:] for file in path.parent.glob("agent_*")]
        assert statuses == [0, 0], "\n".join(outputs)
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_with_children(agent.pid)
                agent.wait(30)
    assert verify_checkpoint(newest_checkpoint(run))["step"] == 120
    assert has_same_tensors(run, ranks.load_tensors(uninterrupted))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))
    observe(
        "two agents of two ranks, one killed with its ranks and started again by its command: "
        f"resumed from step {saved_step}; the same bits"
    )


def wait_for_checkpoint(run, step, timeout_seconds=900):
    deadline = time.monotonic() + timeout_seconds
    while not any(saved_step >= step for saved_step in saved_steps(run)):
        assert time.monotonic() < deadline, (
            f"no checkpoint of step {step} within {timeout_seconds} s"
        )
        time.sleep(0.05)


def kill_with_children(pid):
    """Kill a process and all its descendants at once, as if their machine had lost power.

    Killing the process group is not enough, because the descendants have their own sessions.
    """
    pids = [pid]
    for parent in pids:  # grows during the loop
        os.kill(parent, signal.SIGSTOP)  # so that it starts no more children
        stats = Path("/proc").glob("[0-9]*/stat")
        pids += [int(stat.parent.name) for stat in stats if read_parent_pid(stat) == parent]
    for member in pids:
        os.kill(member, signal.SIGKILL)


def read_parent_pid(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # the process has ended
        return -1
