"""Meet the other ranks at the address of rank 0."""

import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ssl_pretrain.system.exit_status import LostError

NAME_SERVER_SECONDS = 30.0  # a name server may be late when a whole cluster starts
MISSING_RANK_REMEDY = (
    "check that every rank was started, and that the port on the first rank's machine can be "
    "reached"
)


class RendezvousError(LostError):
    """The ranks did not meet. The message names the address, the time waited, and a remedy."""


def join(backend: str, timeout: timedelta, device: torch.device | None) -> None:
    """Join the process group described by torchrun's environment variables.

    Raises:
        RendezvousError: The ranks did not meet within the timeout.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    place = f"rank {rank} of {size} at {host}:{port} (MASTER_ADDR, MASTER_PORT)"
    _wait_for_name(host, place, min(NAME_SERVER_SECONDS, timeout.total_seconds()))
    began = time.monotonic()
    try:
        store = _fresh_store(host, port, timeout)
        dist.init_process_group(backend, timeout=timeout, device_id=device, **store)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        waited = f"{time.monotonic() - began:.0f} s"
        remedy = MISSING_RANK_REMEDY
        if "EADDRINUSE" in str(error):
            remedy = (
                "another process uses that port; give another one "
                "(launch.port, torchrun --master-port)"
            )
        raise RendezvousError(
            f"{place}: the ranks did not meet after {waited} "
            f"(parallel.timeout_seconds {timeout.total_seconds():g}): {reason}; {remedy}"
        ) from None


def _wait_for_name(host: str, place: str, seconds: float) -> None:
    began = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() - began > seconds:
                raise RendezvousError(
                    f"{place}: this machine does not know that host: {error}; "
                    "give the name or address of the first rank's machine"
                ) from None
            time.sleep(1)


def _fresh_store(host: str, port: str, timeout: timedelta) -> dict[str, Any]:
    """Return arguments of `init_process_group` for a store that no earlier start of the ranks used.

    torchrun's agent keeps one store over all its restarts (torch 2.13), in which a rank would find
    the addresses of dead ranks. The agent counts its restarts, and the count makes a new prefix. It
    does not count restarts on behalf of another machine, so `launch.local` makes it create a new
    store for each of those.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    variables = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    rank, size, attempt = (int(os.environ[name]) for name in variables)
    store = dist.TCPStore(host, int(port), size, is_master=False, timeout=timeout)
    prefixed = dist.PrefixStore(f"attempt {attempt}", store)
    return {"store": prefixed, "rank": rank, "world_size": size}
