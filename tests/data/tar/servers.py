"""An S3 server in a process of its own, and a TCP proxy that disturbs the connections to it."""

import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

BUCKET = "images"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret-value"}
_START_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class S3Server:
    """moto's S3 server. It keeps objects in memory, so a restart uploads them again."""

    def __init__(self):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.objects: dict[str, bytes] = {}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.address}/moto-api/", timeout=5).close()
                break
            assert time.monotonic() < deadline, "the S3 server did not start"
            assert self.process.poll() is None, "the S3 server ended"
            time.sleep(0.1)
        self.client().create_bucket(Bucket=BUCKET)
        for key, content in self.objects.items():
            self.client().put_object(Bucket=BUCKET, Key=key, Body=content)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def client(self):
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.address, region_name="us-east-1",
            aws_access_key_id="test-key", aws_secret_access_key="test-secret-value",
        )  # fmt: skip

    def check_keys(self, after_requests: float) -> None:
        """Let the server refuse unknown access keys after so many requests."""
        request = urllib.request.Request(
            f"{self.address}/moto-api/reset-auth",
            str(after_requests).encode(),
            {"Content-Type": "application/octet-stream"},
        )
        urllib.request.urlopen(request, timeout=10).close()

    def put(self, key: str, content: bytes) -> None:
        self.objects[key] = content
        self.client().put_object(Bucket=BUCKET, Key=key, Body=content)

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Upload the shards and the classes of a folder. Return their URL."""
        for path in sorted(folder.iterdir()):
            if path.suffix in (".tar", ".json"):
                self.put(f"{prefix}/{path.name}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


class FaultyProxy:
    """A TCP proxy that disturbs a share of the requests: one third each are cut, late, truncated.

    Args:
        target_port: Port of the server.
        share: Share of the requests that are cut, and of those that are late or truncated.
    """

    def __init__(self, target_port: int, share: float = 0.05, seed: int = 0):
        self.target_port, self.share = target_port, share
        self.is_open = True
        self.counts = dict.fromkeys(("intact", "cut", "late", "truncated", "refused"), 0)
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _choose(self) -> str:
        with self._lock:
            draw = self._random.random()
            names = ("cut", "late", "truncated")
            number = int(draw / self.share) if self.share else len(names)
            fault = names[number] if number < len(names) else "intact"
            fault = fault if self.is_open else "refused"
            self.counts[fault] += 1
            return fault

    def _serve(self, client: socket.socket) -> None:
        """Pass the requests of a connection on, and the responses back, until a fault ends it."""
        target = ("127.0.0.1", self.target_port)
        with (
            client,
            suppress(OSError),
            socket.create_connection(target, timeout=30) as server,
        ):
            while request := client.recv(1 << 16):
                fault = self._choose()
                if fault in ("cut", "refused"):
                    # Without lingering, closing resets the connection.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                if fault == "late":
                    time.sleep(0.5)
                server.sendall(request)
                is_whole = self._answer(server, client, request.startswith(b"HEAD"), fault)
                if not is_whole:
                    return  # closes the connection, for which the client waits

    def _answer(
        self, server: socket.socket, client: socket.socket, is_head: bool, fault: str
    ) -> bool:
        """Pass a response on. Return True if it was whole."""
        response = b""
        while b"\r\n\r\n" not in response:
            block = server.recv(1 << 16)
            if not block:
                client.sendall(response)
                return False
            response += block
        head, _, body = response.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        remaining = 0 if is_head else length - len(body)
        if fault == "truncated":
            client.sendall(response[: max(len(head) + 4, len(response) // 2)])
            return False
        client.sendall(response)
        while remaining > 0:
            block = server.recv(min(1 << 16, remaining))
            if not block:
                return False
            client.sendall(block)
            remaining -= len(block)
        return True


def client_settings(proxy: FaultyProxy) -> dict[str, str]:
    """Return the environment variables that direct s3fs to the proxy."""
    return {
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": proxy.address,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.stop()


def restart_server(server: S3Server, proxy: FaultyProxy) -> None:
    """Kill the server and start it again.

    The proxy refuses until the objects are back and a request was refused, for at most 30 seconds
    more. Without the second condition a loader that is far ahead may not notice.
    """
    num_refused = proxy.counts["refused"]
    proxy.is_open = False
    server.stop()
    server.start()
    deadline = time.monotonic() + 30
    while proxy.counts["refused"] == num_refused and time.monotonic() < deadline:
        time.sleep(0.01)
    proxy.is_open = True


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables, which worker processes inherit."""
    saved = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
