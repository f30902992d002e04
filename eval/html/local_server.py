"""An HTTP server for pages on this machine only."""

import errno
import ipaddress
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ssl_pretrain.eval.html import page

ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Request:
    """A GET request."""

    path: str  # decoded, without the query
    query: Mapping[str, list[str]] = field(default_factory=dict)
    etag: str = ""  # identifies the answer that the browser already has


@dataclass(frozen=True)
class Answer:
    """Answer to a request. Its body is not sent if the browser has it, according to the ETag."""

    body: str | bytes
    status: int = 200
    content_type: str = "text/html; charset=utf-8"
    etag: str = ""
    location: str = ""  # new address, in a redirection


def not_found(text: str = "The page is at /") -> Answer:
    """Return the answer to a request for a page that does not exist."""
    return Answer(page.render("error.html.jinja", message=text), 404)


def is_loopback(host: str) -> bool:
    """Return True for localhost and the addresses that only this machine reaches.

    Args:
        host: Name or address without a port. IPv6 addresses may have brackets.
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def is_own_host(host: str) -> bool:
    """Return True if a Host header names this machine.

    Any port is accepted, because tunnels change it. Another site may point its own name to this
    machine (DNS rebinding). Requests from its pages carry that name and are refused.
    """
    is_bare_ipv6 = host.count(":") > 1 and not host.startswith("[")
    return is_loopback(host if is_bare_ipv6 else re.sub(r":\d*$", "", host))


def build(respond: Callable[[Request], Answer], port: int = 0) -> ThreadingHTTPServer:
    """Return a server, bound to the loopback address, that answers GET requests.

    Args:
        respond: Function that answers a request. It is called in several threads at a time. A
            ValueError becomes a page with its text.
        port: TCP port. 0 chooses a free port, which is the `server_port` of the result.

    Raises:
        ValueError: If the port is taken or reserved.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the reader has left
                self._send(self._answer())

        def _answer(self) -> Answer:
            if not is_own_host(self.headers.get("Host", "")):
                text = "This page is served at http://127.0.0.1 and http://localhost only"
                return Answer(text, 403, "text/plain; charset=utf-8")
            etag = self.headers.get("If-None-Match", "")
            try:
                address = urlsplit(self.path)
                if address.path == "/favicon.ico":
                    return Answer("", 204)
                answer = respond(Request(unquote(address.path), parse_qs(address.query), etag))
            except Exception as error:  # such as a file that cannot be read
                message = f"{type(error).__name__}: {error}"
                return Answer(page.render("error.html.jinja", message=message), 500)
            if answer.etag and answer.etag == etag:
                return Answer("", 304, etag=etag)
            return answer

        def _send(self, answer: Answer) -> None:
            body = answer.body.encode() if isinstance(answer.body, str) else answer.body
            headers = {
                "ETag": answer.etag,
                "Location": answer.location,
                "Content-Type": answer.content_type,
                "Cache-Control": "no-cache",
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": "frame-ancestors 'none'",
                "Referrer-Policy": "no-referrer",
                "Content-Length": "" if answer.status in (204, 304) else str(len(body)),
            }
            self.send_response(answer.status)
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Do not print a line per request."""

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise _explain(error, port) from None


def _explain(error: OSError, port: int) -> Exception:
    remedies = {
        errno.EADDRINUSE: "is taken by another program",
        errno.EACCES: "is reserved for the system",
    }
    if error.errno not in remedies:
        return error
    return ValueError(
        f"--port {port}: this port {remedies[error.errno]}; give another one, or leave --port out"
        " to take any free port"
    )


def serve(server: ThreadingHTTPServer, title: str) -> None:
    """Print the address and serve until Ctrl-C, which ends the server as usual.

    Args:
        server: The server.
        title: What the page shows, as the start of the line.
    """
    address = f"http://{ADDRESS}:{server.server_port}/"
    print(f"{title}: {address}   (this machine only; Ctrl-C to stop)", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
