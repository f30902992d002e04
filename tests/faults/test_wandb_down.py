"""A local W&B server that refuses connections, never answers, or rejects the key."""

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
from reference_run import OVERRIDES, STEPS, paths, reference, resume

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.manifest import verify_checkpoint

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
API_KEY = "f00d" * 10  # as long as a real key


@contextmanager
def refusing_server():
    yield free_port()


@contextmanager
def silent_server():
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


class UnauthorizedHandler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_arguments):
        pass


@contextmanager
def unauthorized_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), UnauthorizedHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.mark.case(24)
@pytest.mark.parametrize("server", [refusing_server, silent_server, unauthorized_server])
def test_training_continues_without_its_dashboard(paths, resume, observe, server, tmp_path):
    path, run = paths
    with server() as port:
        environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
            "WANDB_API_KEY": API_KEY,
            "WANDB_MODE": "online",
            "NETRC": str(tmp_path / "netrc"),
        }
        online = ("log.wandb=online", "log.every_steps=1")
        start = time.monotonic()
        statuses, output = ranks.run(
            path, *OVERRIDES, *online, "--stop-after", "6", environment=environment
        )
        assert statuses == [0] * 3, output
        wandb_id = verify_checkpoint(newest_checkpoint(run))["wandb_id"]
        resume(*online, environment=environment)
        seconds = time.monotonic() - start
    assert wandb_id and verify_checkpoint(newest_checkpoint(run))["wandb_id"] == wandb_id
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    longest = max(
        after["time"] - before["time"]
        for before, after in itertools.pairwise(records)
        if after["step"] != 7  # the first step after the resume
    )
    files = [file for file in run.rglob("*") if file.is_file()]
    assert not [file for file in files if API_KEY.encode() in file.read_bytes()]
    observe(
        f"{server.__name__}: two starts in {seconds:.0f} s, longest step {longest:.1f} s, all "
        "records kept, one run id, the same bits"
    )
