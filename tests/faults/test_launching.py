"""Ranks that do not meet, and ranks that torchrun starts again: on one machine, and on two that are agents of this one."""

from __future__ import annotations

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
from undisturbed import MORE, STEPS, place, undisturbed

from ssl_pretrain import config
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.launch import local

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).parent / "faulty.py"
pytestmark = [pytest.mark.full, pytest.mark.timeout(2400)]


@pytest.mark.case(29)
def test_a_missing_node_is_said_in_time(place, seen):
    began = time.monotonic()
    statuses, said = ranks.run(
        place[0],
        *MORE,
        "parallel.timeout_seconds=5",
        size=1,
        environment={"RANK": "0", "WORLD_SIZE": "2"},
    )
    took = time.monotonic() - began
    assert statuses == [69] and "rank 0 of 2 at 127.0.0.1:" in said and "1/2 clients joined" in said
    assert "see whether every rank was started" in said and took < 60
    seen(f"1 of 2 ranks: said after {took:.0f} s of 5 given, status 69")


@pytest.mark.case(29)
def test_an_unknown_host_is_said_in_time(place, seen):
    there = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid"}
    statuses, said = ranks.run(
        place[0], *MORE, "parallel.timeout_seconds=3", size=1, environment=there
    )
    assert (
        statuses == [69]
        and "at nowhere.invalid:" in said
        and "that host is not known here: " in said
    )
    seen("unknown host: named, status 69")


@pytest.mark.case(29)
def test_a_port_in_use_is_said_at_once(place, seen):
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        other.bind(("::", 0))
        other.listen()
        port = str(other.getsockname()[1])
        statuses, said = ranks.run(
            place[0],
            *MORE,
            size=1,
            environment={"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port},
        )
    assert statuses == [69] and f":{port} (MASTER_ADDR, MASTER_PORT)" in said
    assert (
        "another process has that port; give another (launch.port, torchrun --master-port)" in said
    )
    seen("port in use: named, status 69")


def environment(path, fault="none@0:0"):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FAULT": fault,
        "FAULT_DONE": str(path.parent / "fault_done"),
        "OMP_NUM_THREADS": "1",
    }


def ended(command, variables, seconds=900):
    """(exit status, what it said); of its ranks none outlives this."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = process.communicate(timeout=seconds)[0]
        return process.returncode, said
    finally:
        if process.poll() is None:
            kill_with_children(process.pid)


def same(run, undisturbed):
    assert checkpoint.verify(checkpoint.newest(run))["step"] == STEPS
    tensors = ranks.weights(run)
    return all(torch.equal(tensors[name], value) for name, value in undisturbed.items())


@pytest.mark.case(1)
def test_torchrun_starts_all_ranks_again_from_the_newest_checkpoint(place, undisturbed, seen):
    path, run = place
    command = local.train_command(str(path), MORE, 3, max_restarts=2)
    assert command[command.index("--max-restarts") + 1] == "2"
    command[command.index("-m", 3) : command.index("-m", 3) + 2] = [str(FAULTY)]
    status, said = ended(command, environment(path, "kill@1:8"))
    assert status == 0, said[-3000:]
    assert "after step 6" in said and same(run, undisturbed)
    seen(
        "under torchrun --max-restarts: all ranks started again by it, from step 6; the same bits, status 0"
    )


def test_torchrun_does_not_repeat_a_mistake(place):
    path, _ = place
    command = local.train_command(str(path), [*MORE, "data.root=/nowhere"], 2, max_restarts=2)
    status, said = ended(command, environment(path))
    assert status != 0 and 1 <= said.count("error: data.root: /nowhere does not exist") <= 2


@pytest.mark.case(1)
def test_two_hosts_one_lost_and_started_again(place, undisturbed, seen):
    """The lines that launch.hosts prints, on two loopback addresses; all of the second host's processes die at once."""
    path, run = place
    asked = [
        "launch.hosts=127.0.0.1,127.0.0.2",
        "launch.ranks=2",
        f"launch.port={free_port()}",
        "epochs=40",
        "checkpoint.every_epochs=1",
    ]
    asked += ["parallel.bn_group_images=6", "parallel.timeout_seconds=30", f"output={run}"]
    lines = local.host_commands(config.load(path, asked), str(path), asked)
    straight, said = ranks.run(path, *asked[3:6], f"output={run}_straight", size=4)
    assert straight == [0] * 4, said

    def start(number):
        words = shlex.split(lines[number][1])
        words[words.index("torchrun")] = str(Path(sys.executable).parent / "torchrun")
        file = (path.parent / f"agent_{number}_{time.monotonic_ns()}").open("w")
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(path),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    agents = [start(0), start(1)]
    try:
        reached(run, 20)
        kill_with_children(agents[1].pid)
        agents[1].wait(30)
        kept = checkpoint.verify(checkpoint.newest(run))["step"]
        agents[1] = start(1)
        assert [agent.wait(900) for agent in agents] == [0, 0], "\n".join(
            file.read_text()[-3000:] for file in path.parent.glob("agent_*")
        )
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_with_children(agent.pid)
                agent.wait(30)
    expected, tensors = ranks.weights(run.with_name("run_straight")), ranks.weights(run)
    assert checkpoint.verify(checkpoint.newest(run))["step"] == 120
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))
    seen(
        f"two agents of two ranks, one killed with its ranks and started again by its line: on from step {kept}; the same bits"
    )


def reached(run, step, seconds=900):
    end = time.monotonic() + seconds
    while not (run / "checkpoints" / f"step_{step // 3 * 3:08d}").exists() and not any(
        int(found.name[5:]) >= step for found in checkpoint.checkpoints(run)
    ):
        assert time.monotonic() < end, f"step {step} not within {seconds} s"
        time.sleep(0.05)


def kill_with_children(pid):
    """As when a machine loses its power: SIGKILL to the process and all below it, which have sessions of their own."""
    family = [pid]
    for member in family:  # grows while it is walked
        os.kill(member, signal.SIGSTOP)  # so that it starts no more
        family += [
            int(child.parent.name)
            for child in Path("/proc").glob("[0-9]*/stat")
            if parent_of(child) == member
        ]
    for member in family:
        os.kill(member, signal.SIGKILL)


def parent_of(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return -1
