"""Weights & Biases with the real client: an offline run read back from its own file, and servers that refuse, hang or say 401."""

from __future__ import annotations

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

from ssl_pretrain import config
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.monitoring import logger as log
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.monitoring.wandb import offline_file
from ssl_pretrain.monitoring.wandb import run as wandb_run
from ssl_pretrain.train import train

pytest.importorskip("wandb", reason="wandb is not installed")
WANTED = [
    "log.wandb=offline",
    "online.knn_every_epochs=1",
    "online.k=5",
    "log.name=named",
    "log.tags=[a]",
    "checkpoint.every_epochs=0.34",
]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run of 5 steps, killed as it were after 3 of them were saved, and gone on with: (folder, its .wandb files in order)."""
    folder = tmp_path_factory.mktemp("wandb")
    path = tiny.config(folder)
    train(config.load(path, WANTED), torch.device("cpu"), 5)
    run = folder / "run"
    (run / "eval" / "step_00000003").mkdir(parents=True)
    for place, step in (("eval", 5), ("eval/step_00000003", 3)):
        rows = [
            {"features": "raw pixels", "metrics": {"clean": 1.0}},
            {"features": "pretrained", "metrics": {"clean": 10.0 * step}},
        ]
        (run / place / "linear.json").write_text(
            json.dumps({"name": "linear", "step": step, "rows": rows})
        )
    for saved in checkpoint.checkpoints(run)[-2:]:
        if saved.name > "step_00000003":
            for file in saved.iterdir():
                file.unlink()
            saved.rmdir()
    train(config.load(path, WANTED), torch.device("cpu"), 4)
    return run, sorted(
        run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime
    )


def test_both_halves_are_one_run_with_config_and_tags(resumed):
    run, files = resumed
    ids = {checkpoint.verify(found)["wandb_id"] for found in checkpoint.checkpoints(run)}
    started = [
        record.run
        for file in files
        for record in offline_file.records(file)
        if record.WhichOneof("record_type") == "run"
    ]
    assert len(files) == 2 and {one.run_id for one in started} == ids and len(ids) == 1
    written = {item.key: json.loads(item.value_json) for item in started[0].config.update}
    assert written["method"]["name"] == "simclr" and written["global_batch_size"] == 24
    assert (
        started[0].display_name == "named"
        and list(started[0].tags) == ["a"]
        and started[0].project == "ssl_pretrain"
    )
    assert "api_key" not in (run / "config.yaml").read_text()


def test_every_metric_of_every_step_once_and_in_order(resumed):
    run, files = resumed
    rows = [row for file in files for row in offline_file.history(file)]
    training = [row for row in rows if "step" in row]
    assert (
        [row["_step"] for row in training]
        == [row["step"] for row in training]
        == [1, 2, 3, 4, 5, 6, 7]
    )
    records = {
        record["step"]: record
        for line in (run / "metrics.jsonl").read_text().splitlines()
        for record in [json.loads(line)]
    }
    for row in training:
        for key, value in records[row["step"]].items():
            exact = key in (
                "images_per_second",
                "seconds_per_step",
                "data_wait",
                "memory_gib",
                "model_tflops",
            )  # steps 4 and 5 ran twice
            if key != "time" and not (exact and row["step"] in (4, 5)):
                assert row[metric_names.name(key)] == pytest.approx(value, rel=1e-12), (
                    row["step"],
                    key,
                )


def test_media_plots_and_evaluations_at_their_step(resumed):
    _, files = resumed
    rows = {row["_step"]: row for file in files for row in offline_file.history(file)}
    assert (
        rows[1]["Pictures/views"]["_type"] == "image-file"
        and "image 1, view 1:" in rows[1]["Pictures/views"]["caption"]
    )
    assert (files[0].parent / "files" / rows[1]["Pictures/views"]["path"]).stat().st_size > 1000
    assert rows[3]["Pictures/nearest neighbours"]["_type"] == "image-file"
    assert rows[2]["Collapse/spread of the dimensions"]["_type"] == "histogram"
    judged = {
        row["evaluated_step"]: row["Evaluation/linear, clean"]
        for row in rows.values()
        if "evaluated_step" in row
    }
    assert judged == {3: 30.0, 5: 50.0}


def test_axes_are_declared(resumed):
    _, files = resumed
    metrics = [
        record.metric
        for record in offline_file.records(files[0])
        if record.WhichOneof("record_type") == "metric"
    ]
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in metrics}
    assert (
        axes["*"] == "step"
        and axes["Evaluation/*"] == "evaluated_step"
        and {"step", "epoch", "evaluated_step"} <= axes.keys()
    )


def test_an_alarm_alerts_and_marks_the_run(tmp_path):
    facts = {"wandb_id": "abcdefgh"}
    made = log.Logger(
        log.LogConfig(wandb="offline"), tmp_path, first_step=0, last_step=10, steps_per_epoch=5, global_batch_size=8, config={}, facts=facts
    )  # fmt: skip
    made.alert("collapse", "the embeddings have moved together")
    made.close()
    (file,) = tmp_path.glob("wandb/offline-run-*-abcdefgh/*.wandb")
    found = list(offline_file.records(file))
    alerts = [record.alert for record in found if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.text) for alert in alerts] == [
        ("collapse", "the embeddings have moved together")
    ]
    assert any(
        "collapse" in record.run.tags
        for record in found
        if record.WhichOneof("record_type") == "run"
    )
    assert json.loads((tmp_path / "alarms.jsonl").read_text())["title"] == "collapse"


def test_a_file_cut_off_or_damaged_gives_its_whole_records(resumed, tmp_path):
    content = resumed[1][0].read_bytes()
    whole = len(list(offline_file.payloads(resumed[1][0])))
    (tmp_path / "cut.wandb").write_bytes(content[:-5])
    assert len(list(offline_file.payloads(tmp_path / "cut.wandb"))) == whole - 1
    (tmp_path / "flipped.wandb").write_bytes(content[:30] + bytes([content[30] ^ 1]) + content[31:])
    assert list(offline_file.payloads(tmp_path / "flipped.wandb")) == []
    (tmp_path / "other.wandb").write_bytes(b"PK" + content)
    assert list(offline_file.payloads(tmp_path / "other.wandb")) == []


@contextmanager
def server(answer):
    """A real socket on localhost that gives `answer` to every request; None: never answers. Yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    kept = []

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            kept.append(connection)
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
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        for one in (*kept, listening):
            one.close()


@pytest.fixture
def key(monkeypatch, tmp_path):
    """A machine that knows a key, without settings of W&B."""
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


MODES = [  # (what W&B was told, log.wandb, the mode, whether it is said)
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


@pytest.mark.parametrize(("told", "asked", "mode", "said"), MODES)
def test_no_more_is_sent_than_wandb_itself_was_told(key, monkeypatch, told, asked, mode, said):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    found, line = wandb_run.mode_of(asked)
    assert found == mode and bool(line) == said
    if said:
        name, value = next(iter(told.items()))
        assert (
            line
            == f"W&B: {mode}, as {name}={value} says, although log.wandb is {asked}; nothing is sent"
        )


@pytest.mark.parametrize("place", ["wandb", "config"])
def test_wandb_offline_as_a_command_is_obeyed(key, monkeypatch, tmp_path, place):
    """`wandb offline` and `wandb disabled` write a settings file, here or in the home."""
    (tmp_path / place).mkdir()
    (tmp_path / place / "settings").write_text("[default]\nmode = offline\n")
    assert wandb_run.mode_of("auto")[0] == "offline"
    assert wandb_run.mode_of("online") == (
        "offline", f"W&B: offline, as mode = offline in {wandb_run._told()[1].rpartition(' in ')[2]} says, although log.wandb is online; nothing is sent"
    )  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "online")  # the environment is nearer
    assert wandb_run.mode_of("auto")[0] == "online"


def test_without_a_key_auto_is_off_and_says_what_offline_needs(key, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", "nothing")
    assert wandb_run.mode_of("auto") == ("off", "")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_run.mode_of("auto") == (
        "off", "W&B: off, as there is no key here; WANDB_MODE=offline asks for offline: log.wandb=offline does that without a key"
    )  # fmt: skip


def test_the_client_leaves_no_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    made = wandb_run.WandbRun(
        tmp_path / "run", mode="offline", project="p", name="n", run_id="abcdefgh", config={}, tags=[], say=lambda line: None
    )  # fmt: skip
    made.send(
        "record",
        record={"step": 1, "loss": 1.0},
        plots={"deviations": [1.0], "spectrum_index": [1], "spectrum": [1.0]},
    )
    made.close()
    assert made._process.wait(60) == 0
    assert list((tmp_path / "tmp").iterdir()) == []


def refusing():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


UNAUTHORIZED = (
    b"HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
)


@pytest.mark.parametrize("kind", [pytest.param("refuses", marks=pytest.mark.full), "hangs", "401"])
def test_a_server_that_does_not_serve_costs_five_seconds_at_most_and_no_record(
    tmp_path, monkeypatch, kind
):
    with server(None if kind == "hangs" else UNAUTHORIZED) as address:
        monkeypatch.setenv("WANDB_BASE_URL", refusing() if kind == "refuses" else address)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_MODE", "online")
        facts = {"wandb_id": None}
        start = time.monotonic()
        made = log.Logger(
            log.LogConfig(wandb="online", every_steps=1), tmp_path, first_step=0, last_step=20, steps_per_epoch=5, global_batch_size=8,
            config={}, facts=facts,
        )  # fmt: skip
        for step in range(1, 21):
            made.step(step, {"loss": torch.tensor(1.0 / step)}, {"lr": 0.1})
        client = made._wandb._process
        made.close()
        assert time.monotonic() - start < 5
        client.wait(200)  # it keeps the run offline by itself
    said = (tmp_path / "wandb" / "client.log").read_text()
    rows = [
        row
        for file in tmp_path.glob(f"wandb/offline-run-*-{facts['wandb_id']}/*.wandb")
        for row in offline_file.history(file)
    ]
    assert [row["step"] for row in rows] == list(range(1, 21)), said
    assert "kept offline" in said


ALONE = """
import sys
import ssl_pretrain.train
assert "wandb" not in sys.modules, "it takes a third of the start of every command"
import timm
timm.utils.summary.wandb.Settings
assert "wandb" in sys.modules
"""


def test_a_run_starts_without_wandb_and_timm_finds_it_when_asked():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
