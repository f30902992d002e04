"""Launch without a scheduler: on this machine, or with one printed torchrun command per host."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain.config import ConfigError, RunConfig
from ssl_pretrain.system.exit_status import STOPPED, USER_ERROR
from ssl_pretrain.system.import_path import child_environment
from ssl_pretrain.system.output_streams import tolerate_lost_output
from ssl_pretrain.system.program import LAUNCHED_VARIABLE
from ssl_pretrain.system.stop_signals import HANGUP, STOP_SIGNALS

HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9._:-]+")
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_HAS_FORK = hasattr(os, "fork")  # Windows has none, and refuses a function for the child process


def num_ranks(config: RunConfig) -> int:
    """Return the number of ranks per machine.

    The number is `launch.ranks` if that is set. Otherwise it is the number of GPUs, or one on a
    machine without GPUs. A machine with GPUs never has more ranks than GPUs.
    """
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        return config.launch.ranks or 1
    return min(config.launch.ranks or num_gpus, num_gpus)


def train_command(
    path: str, overrides: Sequence[str], num_processes: int, max_restarts: int = 0
) -> list[str]:
    """Return the command that trains on this machine. It uses torchrun for several processes."""
    train_arguments = ["-m", "ssl_pretrain.train", path, *overrides]
    if num_processes == 1:
        return [sys.executable, *train_arguments]
    options = ["--max-restarts", str(max_restarts), "--nproc-per-node", str(num_processes)]
    return [
        sys.executable,
        "-m",
        "ssl_pretrain.launch.torchrun",
        "--standalone",
        *options,
        *train_arguments,
    ]


def host_names(config: RunConfig) -> list[str]:
    """Return the host names in `launch.hosts`.

    Raises:
        ConfigError: If a name is not valid or appears twice.
    """
    if not config.launch.hosts:
        return []
    hosts = [host.strip(" ") for host in config.launch.hosts.split(",")]
    for host in hosts:
        if not HOST_NAME.fullmatch(host) or hosts.count(host) > 1:
            raise ConfigError(
                f"launch.hosts: {host!r} in {config.launch.hosts!r} is not a valid host name "
                "or address, or appears twice; give distinct hosts, such as a,b,10.0.0.3"
            )
    return hosts


def check_no_hosts(config: RunConfig) -> None:
    """Raise ConfigError if `launch.hosts` is set for runs that start one after the other."""
    if config.launch.hosts:
        raise ConfigError(
            f"launch.hosts: {config.launch.hosts!r} cannot be used for a series of runs, which "
            "start one after the other on this machine; leave it out, or start each run with "
            "launch/pretrain.py"
        )


def host_commands(config: RunConfig, path: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Return the name and the torchrun command of each host in `launch.hosts`.

    Without `launch.ranks`, every host is assumed to have as many GPUs as this machine.

    The hosts meet at the first one through torchrun's c10d rendezvous. If another host is lost, the
    remaining agents wait until its command is run again, and then all ranks resume from the newest
    checkpoint. A static rendezvous (--master-addr) does not let a host rejoin. The environment
    variable makes each round of the rendezvous use its own store. Without it, ranks would find the
    addresses of ranks that have exited (seen with torch 2.13).

    Raises:
        ConfigError: If a host name is not valid or appears twice.
    """
    hosts, launch = host_names(config), config.launch
    overrides = [override for override in overrides if not override.startswith("launch.hosts=")]
    commands = []
    for host_index, host in enumerate(hosts):
        options = {
            "--nnodes": len(hosts),
            "--rdzv-backend": "c10d",
            "--rdzv-endpoint": f"{hosts[0]}:{launch.port}",
            "--rdzv-id": Path(config.output).name,
            "--rdzv-conf": f"is_host={int(host_index == 0)}",
            "--local-addr": host,
            "--max-restarts": launch.max_restarts,
            "--nproc-per-node": num_ranks(config),
        }
        option_words = [str(word) for option in options.items() for word in option]
        torchrun = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "torchrun", *option_words]
        train_arguments = ["-m", "ssl_pretrain.train", path, *overrides]
        commands.append((host, shlex.join([*torchrun, *train_arguments])))
    return commands


class StopRequest:
    """Request to stop this launcher, and the command that it is forwarded to."""

    def __init__(self) -> None:
        self.received = False
        self.process: subprocess.Popen[bytes] | None = None

    def receive(self, signal_number: int, frame: Any) -> None:
        """Handle a signal that asks this launcher to stop."""
        self.received = True
        self.forward()

    def forward(self) -> None:
        """Ask the running command to stop. A second request ends its ranks immediately."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)


_stop_request = StopRequest()


def launcher(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorate the main function of a launcher.

    The launcher survives the loss of its terminal and forwards requests to stop. It reports a
    ValueError or an OSError in one line and returns 2.
    """

    @wraps(main)
    def run_main(arguments: Sequence[str] | None = None) -> int:
        with tolerate_lost_output(), forward_stop_requests():
            try:
                return main(arguments)
            except (ValueError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                return USER_ERROR

    return run_main


@contextmanager
def forward_stop_requests() -> Iterator[None]:
    """Forward requests to stop to the command that `run` waits for.

    After such a request, `run` starts no further command. The handlers are set explicitly, because
    process 1 of a container has no default handlers. SIGHUP stays ignored under nohup. Python
    delivers signals to the main thread only, so nothing is forwarded in another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handlers = {
        signal_number: signal.getsignal(signal_number) for signal_number in STOP_SIGNALS
    }
    for signal_number, handler in previous_handlers.items():
        if signal_number not in HANGUP or handler != signal.SIG_IGN:
            signal.signal(signal_number, _stop_request.receive)
    try:
        yield
    finally:
        _stop_request.received = False
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, signal.SIG_DFL if handler is None else handler)


def stop_requested() -> bool:
    """Return True if this launcher was asked to stop."""
    return _stop_request.received


def wait(seconds: float) -> None:
    """Sleep, but return early if this launcher is asked to stop."""
    end = time.monotonic() + seconds
    while not _stop_request.received and (remaining := end - time.monotonic()) > 0:
        time.sleep(min(0.2, remaining))


def _terminate_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher dies, so that no ranks outlive a SIGKILL."""
    if _LIBC is not None:
        _LIBC.prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def run(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit status, as a shell would report it.

    The command has its own session, so that a Ctrl-C in the terminal reaches it only once, through
    this process. After a request to stop, no command is started.
    """
    if _stop_request.received:
        return STOPPED
    environment = {**child_environment(), LAUNCHED_VARIABLE: "1"}
    if "ssl_pretrain.launch.torchrun" in command:
        environment.setdefault("OMP_NUM_THREADS", "1")
    _stop_request.process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=_terminate_with_launcher if _HAS_FORK else None,
    )
    if _stop_request.received:  # the request came while the process was starting
        _stop_request.forward()
    try:
        status = _stop_request.process.wait()
    finally:
        _stop_request.process = None
    return 128 - status if status < 0 else status
