"""Ranks on this machine or on named hosts, by torchrun, without a scheduler."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ssl_pretrain.config import RunConfig


def ranks_here(config: RunConfig) -> int:
    """Processes on each machine: as asked, else one a GPU, else one; never more than GPUs, where there are any."""
    gpus = torch.cuda.device_count()
    return min(config.launch.ranks or gpus, gpus) if gpus else config.launch.ranks or 1


def train_command(
    path: str, overrides: Sequence[str], ranks: int, max_restarts: int = 0, rendezvous: Sequence[str] = ("--standalone",)
) -> list[str]:
    """The command that trains on `ranks` processes: python alone for one, torchrun for more, which starts all again after one was lost."""
    if ranks == 1 and rendezvous == ("--standalone",):
        return [sys.executable, "-m", "ssl_pretrain.train", path, *overrides]
    return [
        sys.executable, "-m", "torch.distributed.run", *rendezvous, "--max-restarts", str(max_restarts), "--nproc-per-node", str(ranks),
        "-m", "ssl_pretrain.train", path, *overrides,
    ]  # fmt: skip


def host_commands(config: RunConfig, path: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """(host, torchrun line to run there), the first host being where all meet. GPUs are counted on this machine.

    They meet through torchrun's c10d rendezvous, whose agents outlive a lost host: the others wait for it, its line is run
    again, and all ranks go on from the newest checkpoint. The static one (--master-addr) cannot be joined again. Without the
    variable, the agents (torch 2.13) would hand the ranks one store in all rounds, with the addresses of ranks that are dead.
    """
    hosts = [host.strip() for host in config.launch.hosts.split(",") if host.strip()]
    overrides = [override for override in overrides if not override.startswith("launch.hosts=")]
    lines = []
    for number, host in enumerate(hosts):
        meet = (
            "--nnodes", str(len(hosts)), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0]}:{config.launch.port}",
            "--rdzv-id", Path(config.output).name, "--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", host,
        )  # fmt: skip
        command = train_command(path, overrides, ranks_here(config), config.launch.max_restarts, meet)
        lines.append((host, shlex.join(["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "torchrun", *command[3:]])))
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
