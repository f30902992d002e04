"""Settings of other programs are respected, and other people's files are never executed."""

import http.client
import http.server
import json
import re
import threading

import commands
import pytest

from ssl_pretrain.checkpoint.manifest import to_json

TRAIN = ("-m", "ssl_pretrain.train")


@pytest.fixture
def config(tmp_path):
    return commands.write_config(
        tmp_path, commands.write_class_folders(tmp_path / "images", "train")
    )


@pytest.fixture
def server():
    """Return the address of a local W&B server, and the list of requests that it receives."""
    requests: list[str] = []

    class RecordingHandler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(self.path)
            self.send_response(500)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RecordingHandler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}", requests
        http_server.shutdown()


@pytest.mark.parametrize(
    ("variable", "value", "override"),
    [
        ("WANDB_MODE", "disabled", "log.wandb=auto"),
        pytest.param("WANDB_MODE", "offline", "log.wandb=auto", marks=pytest.mark.full),
        pytest.param("WANDB_DISABLED", "true", "log.wandb=auto", marks=pytest.mark.full),
        pytest.param("WANDB_DISABLED", "true", "log.wandb=online", marks=pytest.mark.full),
    ],
)
def test_wandb_sends_nothing_if_its_variables_forbid_it(
    config, server, tmp_path, monkeypatch, variable, value, override
):
    address, requests = server
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    variables = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": address, variable: value}
    result = commands.run(*TRAIN, config, override, **variables)
    assert result.status == 0, result.text
    assert requests == []
    if override == "log.wandb=online":
        assert f"W&B: off, because {variable}={value} overrides log.wandb=online" in result.stdout
    assert (tmp_path / "run" / "wandb").exists() == (value == "offline")


def change_log_config(folder, **log):
    """Change values of `log` in a checkpoint's manifest, and update its hash."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["log"] |= log
    path.write_text(to_json(manifest))


@pytest.mark.full
def test_neither_a_manifest_nor_an_escaped_yaml_reads_the_environment(config, tmp_path):
    """A run folder or a YAML file from someone else must not read this user's environment."""
    message = "'${' is not allowed: values are not interpolated"
    escaped_config = tmp_path / "escaped.yaml"
    escaped_config.write_text(
        config.read_text().replace("log: {", 'log: {name: "\\x24{oc.env:SECRET}", ')
    )
    refusal = commands.run(*TRAIN, escaped_config, SECRET="hunter2")
    assert refusal.status == 2 and message in refusal.stderr and "hunter2" not in refusal.text
    training = commands.run(*TRAIN, config)
    assert training.status == 0, training.text
    change_log_config(tmp_path / "run" / "checkpoints" / "step_00000002", name="${oc.env:SECRET}")
    evaluation = commands.run("-m", "ssl_pretrain.eval.knn", tmp_path / "run", SECRET="hunter2")
    assert evaluation.status == 2, evaluation.text
    assert (
        f"the checkpoint's config: {message}" in evaluation.stderr
        and "hunter2" not in evaluation.text
    )


def test_the_live_page_answers_only_to_its_own_host(tmp_path):
    """A website whose host name resolves to this machine cannot read a run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("method: {name: secret_method}\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 0.5, "loss": 1.5}) + "\n")
    process = commands.start("-m", "ssl_pretrain.eval.report", run, "--follow")
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])

        def get(path, host):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.putrequest("GET", path, skip_host=True)
            if host is not None:
                connection.putheader("Host", host)
            connection.endheaders()
            response = connection.getresponse()
            return response.status, response.read().decode()

        for host in (
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            "LOCALHOST:9999",
            "localhost",
            f"[::1]:{port}",
        ):
            assert get("/main", host)[0] == 200, host
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "localhost.evil.example:1",
            "",
            None,
            "evil@localhost",
        ):
            status, body = get("/main", host)
            assert status == 403 and "secret_method" not in body, host
            assert get("/", host)[0] == 403
    finally:
        process.kill()
        process.communicate()
