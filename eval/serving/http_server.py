"""Run the application on a socket until the process is asked to stop."""

import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ssl_pretrain.eval.html import local_server

HEADER_SECONDS = 10  # time in which a connection must send the headers of a request
KEEP_ALIVE_SECONDS = 15  # time in which a connection must begin its next request
MAX_CONNECTIONS = 1000
BACKLOG = 256


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        ValueError: If the address is taken, or cannot be used.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _wrong_host(host, f" ({error.strerror})") from None
    bound = socket.socket(family, kind)
    if os.name == "posix":  # on Windows this option lets several servers share a port
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise _explain(error, host, port) from None
    return bound


def _wrong_host(host: str, reason: str = "") -> ValueError:
    return ValueError(
        f"--host {host}: is no address of this machine{reason}; give 127.0.0.1, or 0.0.0.0 for all "
        "its addresses"
    )


def _explain(error: OSError, host: str, port: int) -> ValueError:
    """Return the error of an address that cannot be used, with its remedy."""
    if error.errno == errno.EADDRNOTAVAIL:
        return _wrong_host(host)
    others = "give another --port, or --port 0 for any free one"
    remedies = {
        errno.EADDRINUSE: f"stop the other program, or {others}",
        errno.EACCES: f"ports below 1024 are reserved for the system; {others}",
    }
    remedy = remedies.get(error.errno or 0, f"give another --host, or {others}")
    return ValueError(f"--port {port}: cannot be used on {host} ({error.strerror}); {remedy}")


def is_public(host: str) -> bool:
    """Return True if other machines can reach this address."""
    return not local_server.is_loopback(host)


def address_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket, with this machine's name if it has all addresses."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Any, bound: socket.socket, timeout_seconds: float) -> None:
    """Serve requests until SIGTERM or SIGINT, then finish the ones in progress.

    Args:
        app: ASGI application.
        bound: Socket to listen on.
        timeout_seconds: Longest time that requests in progress get after the signal.

    Raises:
        SystemExit: If the application does not start.
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
                print("stopping: finishing the requests in progress", file=sys.stderr, flush=True)
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
    server = Server(config)
    with suppress(KeyboardInterrupt, SystemExit):  # uvicorn exits if the application fails to start
        server.run(sockets=[bound])
    if not server.started:
        raise SystemExit("the service did not start; the reason is above")


def _build_protocol() -> Any:
    """Return uvicorn's protocol, with a limit on the time until each request."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """Closes connections that send no complete headers, which would stay open forever."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.header_timer = self.loop.call_later(HEADER_SECONDS, self.close_if_silent)

        def on_response_complete(self) -> None:
            self.header_timer.cancel()
            seconds = KEEP_ALIVE_SECONDS + HEADER_SECONDS
            self.header_timer = self.loop.call_later(seconds, self.close_if_silent)
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self.header_timer.cancel()
            super().connection_lost(exc)

        def close_if_silent(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Protocol
