"""Weights & Biases with the real client: offline runs read back, and servers that fail."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import tiny
import torch
import wandb_file

from ssl_pretrain import config
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.checkpoint.manifest import verify_checkpoint
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.monitoring.log_config import LogConfig
from ssl_pretrain.monitoring.logger import Logger
from ssl_pretrain.monitoring.wandb import client as wandb_client
from ssl_pretrain.monitoring.wandb import run as wandb_run
from ssl_pretrain.train import train

pytest.importorskip("wandb", reason="wandb is not installed")
OVERRIDES = [
    "log.wandb=offline",
    "online.knn_every_epochs=1",
    "online.k=5",
    "log.name=named",
    "log.tags=[a]",
    "log.group=seeds",
    "checkpoint.every_epochs=0.34",
]
STEPS = {"num_steps_done": 0, "last_step": 20, "steps_per_epoch": 5, "global_batch_size": 8}


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory):
    """Return the folder of a resumed run and its .wandb files in order.

    The run had taken 5 steps and lost the checkpoints of the last 2.
    """
    folder = tmp_path_factory.mktemp("wandb")
    path = tiny.write_config(folder)
    train(config.load(path, OVERRIDES), torch.device("cpu"), 5)
    run = folder / "run"
    (run / "eval" / "step_00000003").mkdir(parents=True)
    for folder_name, step in (("eval", 5), ("eval/step_00000003", 3)):
        rows = [
            {"features": "raw pixels", "metrics": {"clean": 1.0}},
            {"features": "pretrained", "metrics": {"clean": 10.0 * step}},
        ]
        result = {"name": "linear", "step": step, "rows": rows}
        (run / folder_name / "linear.json").write_text(json.dumps(result))
    for checkpoint in list_checkpoints(run)[-2:]:
        if checkpoint.name > "step_00000003":
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    train(config.load(path, OVERRIDES), torch.device("cpu"), 4)
    files = run.glob("wandb/offline-run-*/*.wandb")
    return run, sorted(files, key=lambda file: file.stat().st_mtime)


def read_entries(file, kind):
    """Return the entries of one type in a .wandb file."""
    records = wandb_file.records(file)
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def test_both_halves_are_one_run_with_config_and_tags(resumed_run):
    run, files = resumed_run
    ids = {verify_checkpoint(path)["wandb_id"] for path in list_checkpoints(run)}
    starts = [start for file in files for start in read_entries(file, "run")]
    assert len(files) == 2 and {start.run_id for start in starts} == ids and len(ids) == 1
    logged_config = {item.key: json.loads(item.value_json) for item in starts[0].config.update}
    assert logged_config["method"]["name"] == "simclr" and logged_config["global_batch_size"] == 24
    assert starts[0].display_name == "named" and list(starts[0].tags) == ["a"]
    assert starts[0].project == "ssl_pretrain" and starts[0].run_group == "seeds"
    assert "api_key" not in (run / "config.yaml").read_text()


def test_every_metric_is_logged_once_per_step_in_order(resumed_run):
    run, files = resumed_run
    rows = [row for file in files for row in wandb_file.history(file) if "step" in row]
    steps = [1, 2, 3, 4, 5, 6, 7]
    assert [row["_step"] for row in rows] == [row["step"] for row in rows] == steps
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = {record["step"]: record for record in map(json.loads, lines)}
    varying_keys = {
        "images_per_second",
        "seconds_per_step",
        "data_wait",
        "memory_gib",
        "model_tflops",
    }
    for row in rows:
        for key, value in records[row["step"]].items():
            ran_twice = row["step"] in (4, 5)
            if key == "time" or (ran_twice and key in varying_keys):
                continue
            logged = row[metric_names.tracker_name(key)]
            assert logged == pytest.approx(value, rel=1e-12), (row["step"], key)


def test_a_client_knows_the_last_step_that_was_logged(resumed_run):
    run, _ = resumed_run
    (run_id,) = {verify_checkpoint(path)["wandb_id"] for path in list_checkpoints(run)}
    assert wandb_client.read_last_step(run, run_id) == 7
    assert wandb_client.read_last_step(run, "another") == -1


def test_pictures_curves_and_evaluations_are_logged_at_their_step(resumed_run):
    _, files = resumed_run
    rows = {row["_step"]: row for file in files for row in wandb_file.history(file)}
    views = rows[1]["Pictures/views"]
    assert views["_type"] == "image-file" and "image 1, column 1:" in views["caption"]
    assert (files[0].parent / "files" / views["path"]).stat().st_size > 1000
    assert rows[3]["Pictures/neighbors"]["_type"] == "image-file"
    assert rows[2]["Collapse/deviations"]["_type"] == "histogram"
    evaluations = {
        row["evaluated_step"]: row["Evaluation/linear/clean"]
        for row in rows.values()
        if "evaluated_step" in row
    }
    assert evaluations == {3: 30.0, 5: 50.0}


def test_axes_are_declared(resumed_run):
    metrics = read_entries(resumed_run[1][0], "metric")
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in metrics}
    assert axes["*"] == "step" and axes["Evaluation/*"] == "evaluated_step"
    assert {"step", "epoch", "evaluated_step"} <= axes.keys()


def test_an_alert_is_sent_and_tags_the_run(tmp_path):
    settings = LogConfig(wandb="offline")
    with Logger(settings, tmp_path, config={}, wandb_id="abcdefgh", **STEPS) as logger:
        logger.raise_alert("collapse", "the embeddings are similar")
    (file,) = tmp_path.glob("wandb/offline-run-*-abcdefgh/*.wandb")
    alerts = [(alert.title, alert.text) for alert in read_entries(file, "alert")]
    assert alerts == [("collapse", "the embeddings are similar")]
    assert any("collapse" in run.tags for run in read_entries(file, "run"))
    assert json.loads((tmp_path / "alerts.jsonl").read_text())["title"] == "collapse"


@contextmanager
def run_server(answer):
    """Serve on a socket of this machine and yield its address.

    Every request gets `answer`, or no reply if it is None.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    connections = []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            if answer is not None:
                threading.Thread(target=reply, args=(connection,), daemon=True).start()

    def reply(connection):
        try:
            while connection.recv(65536):
                connection.sendall(answer)
        except OSError:
            pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for connection in (*connections, listener):
            connection.close()


@pytest.fixture
def api_key(monkeypatch, tmp_path):
    """Set an API key in the environment, without any other setting of W&B."""
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


MODES = [  # (environment, log.wandb, mode, True if there is a message)
    ({}, "auto", "online", False),
    ({"WANDB_MODE": "disabled"}, "auto", "off", False),
    ({"WANDB_MODE": "offline"}, "auto", "offline", False),
    ({"WANDB_MODE": "dryrun"}, "auto", "offline", False),
    ({"WANDB_MODE": "no"}, "auto", "off", False),
    ({"WANDB_DISABLED": "true"}, "auto", "off", False),
    ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "auto", "off", False),
    ({"WANDB_DISABLED": "false"}, "auto", "online", False),
    ({"WANDB_MODE": "disabled"}, "online", "off", True),
    ({"WANDB_MODE": "offline"}, "online", "offline", True),
    ({"WANDB_DISABLED": "true"}, "offline", "off", True),
    ({"WANDB_MODE": "online"}, "offline", "offline", False),
    ({"WANDB_MODE": "online"}, "off", "off", False),
]


@pytest.mark.parametrize(("environment", "setting", "mode", "has_message"), MODES)
def test_no_more_is_sent_than_the_settings_of_wandb_allow(
    api_key, monkeypatch, environment, setting, mode, has_message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    message = ""
    if has_message:
        name, value = next(iter(environment.items()))
        message = f"W&B: {mode}, because {name}={value} overrides log.wandb={setting}"
    assert wandb_run.resolve_mode(setting) == (mode, message)


@pytest.mark.parametrize("folder", ["wandb", "config"])
def test_the_command_wandb_offline_is_obeyed(api_key, monkeypatch, tmp_path, folder):
    """`wandb offline` and `wandb disabled` write a settings file to this or the home folder."""
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "settings").write_text("[default]\nmode = offline\n")
    assert wandb_run.resolve_mode("auto")[0] == "offline"
    mode, message = wandb_run.resolve_mode("online")
    assert mode == "offline" and message.startswith("W&B: offline, because mode = offline in ")
    assert message.endswith(f"{folder}/settings overrides log.wandb=online")
    monkeypatch.setenv("WANDB_MODE", "online")  # the environment takes priority
    assert wandb_run.resolve_mode("auto")[0] == "online"


def test_without_a_key_auto_is_off_and_offline_is_suggested(api_key, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", "nothing")
    assert wandb_run.resolve_mode("auto") == ("off", "")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_run.resolve_mode("auto") == (
        "off",
        "W&B: off, because no API key was found. WANDB_MODE=offline requests offline mode; "
        "log.wandb=offline does that without a key",
    )


def test_the_client_leaves_no_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    arguments = {"project": "p", "name": "n", "run_id": "abcdefgh", "config": {}, "tags": []}
    run = wandb_run.WandbRun(
        tmp_path / "run", mode="offline", print_line=lambda line: None, **arguments
    )
    curves = {"deviations": [1.0], "spectrum_index": [1], "spectrum": [1.0]}
    run.log_record({"step": 1, "loss": 1.0}, curves)
    run.close()
    assert run._process.wait(60) == 0
    assert list((tmp_path / "tmp").iterdir()) == []


def find_closed_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


UNAUTHORIZED = (
    b"HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.full) for kind in ("refuses", "hangs")), "401"]
)
def test_a_server_that_fails_costs_at_most_five_seconds_and_no_record(tmp_path, monkeypatch, kind):
    with run_server(None if kind == "hangs" else UNAUTHORIZED) as address:
        monkeypatch.setenv(
            "WANDB_BASE_URL", find_closed_address() if kind == "refuses" else address
        )
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_MODE", "online")
        start = time.monotonic()
        settings = LogConfig(wandb="online", every_steps=1)
        logger = Logger(settings, tmp_path, config={}, **STEPS)
        for step in range(1, 21):
            logger.log_step(step, {"loss": torch.tensor(1.0 / step)}, {"lr": 0.1})
        process = logger._trackers[0]._process
        logger.close()
        assert time.monotonic() - start < 5
        process.wait(200)  # the client saves the run offline by itself
    messages = (tmp_path / "wandb" / "client.log").read_text()
    files = tmp_path.glob(f"wandb/offline-run-*-{logger.wandb_id}/*.wandb")
    rows = [row for file in files for row in wandb_file.history(file)]
    assert [row["step"] for row in rows] == list(range(1, 21)), messages
    assert "kept offline" in messages


IMPORTS = """
import sys
import ssl_pretrain.train
assert "wandb" not in sys.modules, "importing it takes a third of the startup time of every command"
import timm
timm.utils.summary.wandb.Settings
assert "wandb" in sys.modules
"""


@pytest.mark.full
def test_a_run_starts_without_wandb_and_timm_imports_it_on_demand():
    process = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
