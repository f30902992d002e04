"""A W&B server that is down, mute, or does not know the key: planted as an address of this machine."""

from __future__ import annotations

import http.server
import itertools
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import ranks
from ranks import free_port
from undisturbed import MORE, STEPS, goes_on, place, undisturbed

from ssl_pretrain.checkpoint import state as checkpoint

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
SECRET = "f00d" * 10  # as long as a key


@contextmanager
def refusing():
    yield free_port()


@contextmanager
def mute():
    with socket.create_server(
        ("127.0.0.1", 0), backlog=50
    ) as server:  # takes connections, and never answers
        yield server.getsockname()[1]


class Unauthorized(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_arguments):
        pass


@contextmanager
def unauthorized():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unauthorized)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.mark.case(24)
@pytest.mark.parametrize("server", [refusing, mute, unauthorized])
def test_the_training_goes_on_without_its_dashboard(place, goes_on, seen, server, tmp_path):
    path, run = place
    with server() as port:
        there = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
            "WANDB_API_KEY": SECRET,
            "WANDB_MODE": "online",
            "NETRC": str(tmp_path / "netrc"),
        }
        online = ("log.wandb=online", "log.every_steps=1")
        began = time.monotonic()
        statuses, said = ranks.run(path, *MORE, *online, "--stop-after", "6", environment=there)
        assert statuses == [0] * 3, said
        first = checkpoint.verify(checkpoint.newest(run))["wandb_id"]
        goes_on(*online, environment=there)
        took = time.monotonic() - began
    assert first and checkpoint.verify(checkpoint.newest(run))["wandb_id"] == first
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    waits = [
        after["time"] - before["time"]
        for before, after in itertools.pairwise(records)
        if after["step"] != 7
    ]
    assert not [
        file for file in run.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()
    ]
    seen(
        f"{server.__name__}: two starts in {took:.0f} s, longest step {max(waits):.1f} s, all records kept, one run id, the same bits"
    )
