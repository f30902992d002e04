"""The command starts a server, answers on a socket, keeps its limits, and stops cleanly."""

import asyncio
import errno
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from small_service import encode, offline_vector, random_pixels, write_export

from ssl_pretrain.eval import serve
from ssl_pretrain.eval.serving import http_server

MAX_BYTES = 200_000


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("exports") / "export")


class Server:
    """The command in a process of its own, on a free port."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "ssl_pretrain.cli", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.line)
        assert found, self.line + self.process.stderr.read()
        self.port = int(found[1])

    def request(self, method: str, path: str, body=None, headers=None, **options):
        """Send a request and return its status and its JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {}, **options)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def stop(self) -> tuple[int, str]:
        """Send SIGTERM, and return the exit status and what the server printed."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def server(export_folder):
    options = ["--max-bytes", str(MAX_BYTES), "--timeout", "3", "--threads", "1"]
    server = Server(str(export_folder), *options)
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.communicate()


def test_a_server_answers_on_a_socket(server, export_folder):
    assert server.line.startswith(
        "one_convolution by simclr, 24 numbers per image, float: http://127.0.0.1:"
    )
    content = encode(random_pixels(0))
    status, answer = server.request("POST", "/embed", content)
    assert status == 200
    assert answer["vector"] == pytest.approx(offline_vector(export_folder, content), abs=1e-4)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_above_the_limit_is_refused_with_and_without_its_length(server, is_chunked):
    body = bytes(MAX_BYTES + 1)
    chunks = (body[start : start + 8192] for start in range(0, len(body), 8192))
    status, answer = server.request(
        "POST",
        "/embed",
        chunks if is_chunked else body,
        encode_chunked=is_chunked,
        headers={"transfer-encoding": "chunked"} if is_chunked else None,
    )
    assert status == 413
    assert answer == {
        "error": "The body has more than 200,000 bytes.",
        "remedy": "Send images of at most 200,000 bytes, or start the service with a larger "
        "--max-bytes.",
    }


def test_a_declared_length_above_the_limit_is_refused_before_the_body(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(
            b"POST /embed HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99000000000\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 413")


def test_clients_that_never_finish_do_not_block_others(server, export_folder):
    slow = []
    try:
        for number in range(100):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            head = b"POST /embed HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            body = b"Content-Length: 1000\r\n\r\n\x89PNG"
            client.sendall(head if number % 2 else head + body)
            slow.append(client)
        content = encode(random_pixels(1))
        status, answer = server.request("POST", "/embed", content)
        assert status == 200
        assert answer["vector"] == pytest.approx(offline_vector(export_folder, content), abs=1e-4)
        answer = b""
        while not answer.endswith(b"}"):  # the head and the body may arrive apart
            received = slow[0].recv(4096)  # after --timeout
            assert received, answer
            answer += received
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"The body did not arrive within 3 seconds." in answer
    finally:
        for client in slow:
            client.close()


def test_a_client_that_leaves_does_no_harm(server, export_folder):
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(
            b"POST /embed HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n\x89PNG"
        )
    status, _ = server.request("POST", "/embed", encode(random_pixels(1)))
    assert status == 200


def test_what_is_no_http_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 400")
    assert server.request("GET", "/healthz") == (200, {"state": "live"})


def test_sigterm_finishes_what_runs_and_ends_with_status_0(server):
    content, answers = encode(random_pixels(2)), []

    def send_slowly():
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.putrequest("POST", "/embed")
        connection.putheader("Content-Length", str(len(content)))
        connection.endheaders(content[:100])
        time.sleep(1)
        connection.send(content[100:])
        answers.append(connection.getresponse().status)

    client = threading.Thread(target=send_slowly)
    client.start()
    time.sleep(0.5)
    status, errors = server.stop()
    client.join()
    assert answers == [200]
    assert status == 0
    assert errors.splitlines() == ["stopping: finishing the requests in progress", "stopped"]


def error_of(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def test_a_taken_port_and_a_wrong_host_are_named():
    with http_server.bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert error_of(http_server.bind, "127.0.0.1", port) == (
            f"--port {port}: cannot be used on 127.0.0.1 (Address already in use); stop the other "
            "program, or give another --port, or --port 0 for any free one"
        )
    message = error_of(http_server.bind, "no.such.host.invalid", 0)
    assert message.startswith("--host no.such.host.invalid: is no address of this machine (")
    assert message.endswith("; give 127.0.0.1, or 0.0.0.0 for all its addresses")
    assert error_of(http_server.bind, "203.0.113.1", 0) == (  # an address for documentation
        "--host 203.0.113.1: is no address of this machine; give 127.0.0.1, or 0.0.0.0 for all its "
        "addresses"
    )


def test_a_reserved_port_is_named(monkeypatch):
    class Reserved(socket.socket):
        def bind(self, address):
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", Reserved)
    assert error_of(http_server.bind, "127.0.0.1", 80) == (
        "--port 80: cannot be used on 127.0.0.1 (Permission denied); ports below 1024 are reserved "
        "for the system; give another --port, or --port 0 for any free one"
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_the_printed_address_can_be_opened(host):
    with http_server.bind(host, 0) as bound:
        name = socket.gethostname() if host == "0.0.0.0" else host
        expected = f"http://{name}:{bound.getsockname()[1]}"
        assert http_server.address_of(bound) == expected


def test_a_service_that_fails_to_start_exits_with_an_error():
    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "out of memory"})

    with http_server.bind("127.0.0.1", 0) as bound, pytest.raises(SystemExit) as error:
        http_server.serve(app, bound, 1)
    assert error.value.code == "the service did not start; the reason is above"


def test_a_connection_that_begins_a_second_request_is_closed_as_well(monkeypatch):
    import uvicorn
    from uvicorn.server import ServerState

    monkeypatch.setattr(http_server, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(http_server, "KEEP_ALIVE_SECONDS", 0.3)

    async def app(scope, receive, send):
        start = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"0")],
        }
        await send(start)
        await send({"type": "http.response.body"})

    async def use_connection() -> bytes:
        config = uvicorn.Config(app, ws="none", log_level="error")
        build, state = http_server._build_protocol(), ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: build(config, state, {}), "127.0.0.1", 0)
        async with server, asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answer = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"G")
            assert await reader.read() == b""  # until the server closes it
            writer.close()
        return answer

    assert asyncio.run(use_connection()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("host", "is_public"),
    [
        ("127.0.0.1", False),
        ("127.0.0.2", False),
        ("localhost", False),
        ("LOCALHOST", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("192.168.1.5", True),
        ("gpu-server", True),
    ],
)
def test_a_public_address_is_recognized(host, is_public):
    assert http_server.is_public(host) == is_public


def test_a_public_address_is_announced(export_folder, monkeypatch, capsys):
    monkeypatch.setattr(http_server, "serve", lambda *arguments: None)
    serve.main([str(export_folder), "--host", "0.0.0.0", "--port", "0", "--threads", "1"])
    assert capsys.readouterr().err.splitlines()[0] == (
        "WARNING: --host 0.0.0.0: other machines can reach this service, and it has no "
        "authentication; put it behind a proxy that authenticates, or drop --host"
    )
    serve.main([str(export_folder), "--port", "0", "--threads", "1"])
    assert "WARNING" not in capsys.readouterr().err


def test_a_queue_without_room_for_a_pair_is_refused(export_folder):
    assert error_of(serve.main, [str(export_folder), "--max-queue", "1", "--port", "0"]) == (
        "--max-queue: 1 has no place for the two images of a pair; give 2 or more"
    )
