"""Starts ranks without a scheduler: on this machine, or by one printed torchrun command per host."""

from __future__ import annotations

import ctypes
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain.config import ConfigError, RunConfig
from ssl_pretrain.monitoring.output_streams import lasting_output
from ssl_pretrain.system.exit_status import STOPPED
from ssl_pretrain.system.import_path import child_environment
from ssl_pretrain.system.stop_signals import STOP_SIGNALS

HOST = re.compile(r"(?!-)[A-Za-z0-9._:-]+")
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def ranks_here(config: RunConfig) -> int:
    """Return the number of ranks per machine: `launch.ranks`, else one per GPU, else one. GPUs are the upper limit."""
    gpus = torch.cuda.device_count()
    return min(config.launch.ranks or gpus, gpus) if gpus else config.launch.ranks or 1


def train_command(
    path: str,
    overrides: Sequence[str],
    ranks: int,
    max_restarts: int = 0,
    rendezvous: Sequence[str] = ("--standalone",),
) -> list[str]:
    """Return the command that trains on `ranks` processes: plain python for one, torchrun for more."""
    standalone = tuple(rendezvous) == ("--standalone",)
    if ranks == 1 and standalone:
        return [sys.executable, "-m", "ssl_pretrain.train", path, *overrides]
    module = "ssl_pretrain.launch.torchrun" if standalone else "torch.distributed.run"
    return [
        sys.executable, "-m", module, *rendezvous, "--max-restarts", str(max_restarts), "--nproc-per-node", str(ranks),
        "-m", "ssl_pretrain.train", path, *overrides,
    ]  # fmt: skip


def host_names(config: RunConfig) -> list[str]:
    """Return the hosts that `launch.hosts` names, none where it is empty.

    Raises:
        ConfigError: A name that no host has, or one host twice.
    """
    if not config.launch.hosts:
        return []
    hosts = [host.strip(" ") for host in config.launch.hosts.split(",")]
    wrong = next(
        (host for host in hosts if not HOST.fullmatch(host) or hosts.count(host) > 1), None
    )
    if wrong is not None:
        raise ConfigError(
            f"launch.hosts: {wrong!r} of {config.launch.hosts!r} is not the name or address of one more host; give such as a,b,10.0.0.3"
        )
    return hosts


def check_one_machine(config: RunConfig) -> None:
    """Raise ConfigError for `launch.hosts` where several runs follow each other on this machine."""
    if config.launch.hosts:
        raise ConfigError(
            f"launch.hosts: {config.launch.hosts!r}, and these runs follow each other on this machine; "
            "leave it out, or start each run with launch/pretrain.py"
        )


def host_commands(config: RunConfig, path: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Return (host, torchrun command) for each host of `launch.hosts`. GPUs are counted on this machine.

    All hosts meet at the first one, through torchrun's c10d rendezvous, whose agents outlive a lost
    host. The others wait until its command is run again, and all ranks resume from the newest
    checkpoint. A static rendezvous (--master-addr) cannot be joined again. Without the environment
    variable, the agents of torch 2.13 would give the ranks one store for all rounds, with the
    addresses of ranks that have exited.

    Raises:
        ConfigError: As `host_names`.
    """
    hosts = host_names(config)
    overrides = [override for override in overrides if not override.startswith("launch.hosts=")]
    lines = []
    for number, host in enumerate(hosts):
        meet = (
            "--nnodes", str(len(hosts)), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0]}:{config.launch.port}",
            "--rdzv-id", Path(config.output).name, "--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", host,
        )  # fmt: skip
        command = train_command(
            path, overrides, ranks_here(config), config.launch.max_restarts, meet
        )
        lines.append(
            (
                host,
                shlex.join(
                    ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "torchrun", *command[3:]]
                ),
            )
        )
    return lines


class Stop:
    """Requests to stop this launcher, and the command that they are forwarded to."""

    def __init__(self) -> None:
        self.requested = False
        self.process: subprocess.Popen[bytes] | None = None

    def receive(self, number: int, frame: Any) -> None:
        self.requested = True
        self.forward()

    def forward(self) -> None:
        """Ask the running command to stop. A second request ends the ranks at once."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)


_stop = Stop()


@contextmanager
def launching() -> Iterator[None]:
    """Go on without a reader of the output, and forward requests to stop: for the whole of a launcher."""
    with lasting_output(), stoppable():
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """Forward requests to stop to the command that `run` waits for, and start no further one.

    The handlers are set explicitly, as process 1 of a container has no default ones. SIGHUP stays
    ignored under nohup. Python hands signals to the main thread alone: in another, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in previous.items():
        if number != signal.SIGHUP or handler != signal.SIG_IGN:
            signal.signal(number, _stop.receive)
    try:
        yield
    finally:
        _stop.requested = False
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def stop_requested() -> bool:
    """Return True if this launcher was asked to stop."""
    return _stop.requested


def wait(seconds: float) -> None:
    """Sleep until the time is over or this launcher is asked to stop."""
    end = time.monotonic() + seconds
    while not _stop.requested and (left := end - time.monotonic()) > 0:
        time.sleep(min(0.2, left))


def _end_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher dies, so that a SIGKILL leaves no ranks behind."""
    if _LIBC is not None:
        _LIBC.prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def run(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit status, as a shell gives it.

    The command has a session of its own, so that a Ctrl-C in the terminal reaches it once, from
    here. After a request to stop nothing is started.
    """
    if _stop.requested:
        return STOPPED
    environment = child_environment()
    if "ssl_pretrain.launch.torchrun" in command:
        environment.setdefault("OMP_NUM_THREADS", "1")
    _stop.process = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=_end_with_launcher
    )
    if _stop.requested:  # meanwhile
        _stop.forward()
    try:
        status = _stop.process.wait()
    finally:
        _stop.process = None
    return 128 - status if status < 0 else status
