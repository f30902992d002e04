"""Ranks on this machine or on named hosts, by torchrun, without a scheduler."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

import torch

from ssl_pretrain.config import RunConfig


def ranks_here(config: RunConfig) -> int:
    """Processes on each machine: as asked, else one a GPU, else one; never more than GPUs, where there are any."""
    gpus = torch.cuda.device_count()
    return min(config.launch.ranks or gpus, gpus) if gpus else config.launch.ranks or 1


def train_command(path: str, overrides: Sequence[str], ranks: int, rendezvous: Sequence[str] = ("--standalone",)) -> list[str]:
    """The command that trains on `ranks` processes: python alone for one, torchrun for more."""
    if ranks == 1 and rendezvous == ("--standalone",):
        return [sys.executable, "-m", "ssl_pretrain.train", path, *overrides]
    return [
        sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(ranks),
        "-m", "ssl_pretrain.train", path, *overrides,
    ]  # fmt: skip


def host_commands(config: RunConfig, path: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """(host, torchrun line to run there), the first host being where all meet. GPUs are counted on this machine."""
    hosts = [host.strip() for host in config.launch.hosts.split(",") if host.strip()]
    ranks = ranks_here(config)
    lines = []
    for number, host in enumerate(hosts):
        meet = (
            "--nnodes",
            str(len(hosts)),
            "--node-rank",
            str(number),
            "--master-addr",
            hosts[0],
            "--master-port",
            str(config.launch.port),
        )
        command = train_command(path, [override for override in overrides if not override.startswith("launch.hosts=")], ranks, meet)
        lines.append((host, shlex.join(["torchrun", *command[3:]])))
    return lines


def run(command: Sequence[str]) -> int:
    """Runs to the end with this process's output, and passes Ctrl-C on; returns the exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if "torch.distributed.run" in command else None
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the ranks got it too: they save and leave
