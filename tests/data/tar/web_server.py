"""A web server in this process that serves shards by ranges, and fixtures for it."""

import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tars import JPEG, make_tar


class WebServer(ThreadingHTTPServer):
    """Server whose attributes change the answers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}  # content by path
        self.status = 0  # status of all answers, or 0 for the usual ones
        self.supports_ranges, self.num_short_answers = True, 0
        self.ranges: list[tuple[str, int, int]] = []  # path, first byte and end of each range
        self.before_answer: Callable[[], object] = lambda: None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Serve the objects of the server by ranges."""

    def do_HEAD(self):
        self.answer(is_head=True)

    def do_GET(self):
        self.answer(is_head=False)

    def answer(self, is_head: bool) -> None:
        content = self.server.objects.get(self.path.partition("?")[0])
        if self.server.status or content is None:
            self.send_error(self.server.status or 404)
            return
        requested = self.headers.get("Range")
        body, status = content, 200
        if requested and self.server.supports_ranges:
            start, _, last = requested.removeprefix("bytes=").partition("-")
            body, status = content[int(start) : int(last) + 1], 206
            self.server.ranges.append((self.path, int(start), int(start) + len(body)))
            self.server.before_answer()
            if self.server.num_short_answers:
                self.server.num_short_answers -= 1
                body = body[: len(body) // 2]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        if not is_head:
            with suppress(BrokenPipeError):  # a client was killed
                self.wfile.write(body)

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def server():
    server = WebServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server, tmp_path) -> str:
    path = make_tar(tmp_path / "a.tar", [(f"{k}.jpg", JPEG + b"%d" % k) for k in range(5)])
    server.objects["/a.tar"] = path.read_bytes()
    return f"{server.address}/a.tar"
