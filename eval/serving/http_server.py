"""Run the application on a socket until the process is asked to stop."""

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

HEADER_SECONDS = 10  # time in which a new connection must send the headers of its first request
KEEP_ALIVE_SECONDS = 15
MAX_CONNECTIONS = 1000
BACKLOG = 256


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, and does not listen yet.

    Raises:
        ValueError: If the address is taken, or cannot be used.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(
            f"--host {host}: is no address of this machine ({error.strerror}); give 127.0.0.1, or "
            "0.0.0.0 for all its addresses"
        ) from None
    bound = socket.socket(family, kind)
    if os.name == "posix":  # on Windows this option lets several servers share a port
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"--port {port}: cannot be used on {host} ({error.strerror}); stop the other program, "
            "or give another --port, or --port 0 for any free one"
        ) from None
    return bound


def is_public(host: str) -> bool:
    """Return True unless only this machine reaches an address."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def address_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Any, bound: socket.socket, timeout_seconds: float) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those that run.

    Args:
        app: ASGI application.
        bound: Socket to listen on.
        timeout_seconds: Longest time that running requests get after the signal.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """A server that ends with status 0 after a signal."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            previous = {
                number: signal.signal(number, self.handle_exit)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
            try:
                yield
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if not self.should_exit:
                print("stopping: running requests are finished", file=sys.stderr, flush=True)
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        http=_build_protocol(),
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(timeout_seconds)),
        limit_concurrency=MAX_CONNECTIONS,
    )
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets=[bound])


def _build_protocol() -> Any:
    """Return uvicorn's protocol, with a limit on the time until the first request."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """Closes connections that send no complete headers, which would stay open forever."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.header_timer = self.loop.call_later(HEADER_SECONDS, self.close_if_silent)

        def connection_lost(self, exc: Exception | None) -> None:
            self.header_timer.cancel()
            super().connection_lost(exc)

        def close_if_silent(self) -> None:
            if self.cycle is None:
                self.transport.close()

    return Protocol
