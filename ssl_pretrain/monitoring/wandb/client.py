"""The Weights & Biases client, in a process of its own: whatever the network does, the training does not wait for it.

It reads one JSON message a line from its standard input and answers with lines for people. Where the server cannot be reached,
or refuses, the run is kept offline under the same id, for `wandb sync`. The end of the input ends the run.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.monitoring.wandb import offline_file
from ssl_pretrain.monitoring.wandb import run as wandb_run

START_SECONDS = 20  # to reach the server, before the run is kept offline
TEMPORARY = "SSL_PRETRAIN_WANDB_TMPDIR"  # from a process to the one that it becomes in `start_over`
FINISH_SECONDS = 300  # for what is still on its way at the end


class Client:
    """One run at W&B: the records of one training, in the order of their steps, each step once."""

    def __init__(self, settings: dict[str, Any]):
        import wandb

        self.wandb: Any = wandb
        self.folder = Path(settings["dir"])
        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        arguments = {
            key: settings[key] for key in ("project", "name", "id", "dir", "config", "tags")
        }
        self.online = settings["mode"] == "online"
        try:
            self.run = wandb.init(
                **arguments,
                mode=settings["mode"],
                resume="allow" if self.online else None,
                settings=self._settings(),
            )
        except Exception as error:  # whatever the client raises
            if not self.online:
                raise
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            command = shlex.join(["wandb", "sync", str(self.folder / "wandb")])
            say(f"W&B: not reached ({reason}); the run is kept offline, `{command}` sends it later")
            start_over(settings | {"mode": "offline"})
        if self.online:
            say(f"W&B: {self.run.url}")
        self.done = (
            -1 if self.online else offline_file.last_step(self.folder, settings["id"])
        )  # online, the server knows
        self.latest = max(self.done, self.run.step - 1)
        for axis in metric_names.AXES:
            self.run.define_metric(axis)
        self.run.define_metric("*", step_metric="step")
        self.run.define_metric(f"{metric_names.EVALUATION}/*", step_metric="evaluated_step")
        self.run.define_metric(metric_names.name("loss"), step_metric="step", summary="min")
        self.run.define_metric(metric_names.name("knn"), step_metric="step", summary="max")

    def _settings(self) -> Any:
        return self.wandb.Settings(
            init_timeout=START_SECONDS,
            login_timeout=START_SECONDS,
            console="off",
            silent=True,
            x_disable_stats=True,
        )

    def record(self, record: dict[str, Any], plots: dict[str, list[float]] | None = None) -> None:
        """One record of metrics.jsonl under its names for people, and one evaluation that came since."""
        step = record["step"]
        if step <= self.done:
            return
        row: dict[str, Any] = {
            metric_names.name(key): value for key, value in record.items() if key != "time"
        }
        if plots:
            row[f"{metric_names.COLLAPSE}/spread of the dimensions"] = self.wandb.Histogram(
                plots["deviations"], num_bins=32
            )
            row[f"{metric_names.COLLAPSE}/spectrum"] = self.wandb.plot.line_series(
                xs=plots["spectrum_index"],
                ys=[plots["spectrum"]],
                keys=[f"step {step}"],
                title="Covariance spectrum",
                xname="eigenvalue",
            )
        self._log(row | next(self._evaluations(), {}), step)

    def image(self, key: str, path: str, caption: str, step: int) -> None:
        if step > self.done:
            self._log({key: self.wandb.Image(path, caption=caption)}, step)

    def _log(self, row: dict[str, Any], step: int) -> None:
        self.latest = max(self.latest, step)
        self.run.log(row, step=step)

    def alert(self, title: str, text: str, tag: str = "") -> None:
        self.run.alert(title=title, text=text, level=self.wandb.AlertLevel.ERROR)
        if tag and tag not in (self.run.tags or ()):
            self.run.tags = (*(self.run.tags or ()), tag)
        self.run.summary["health"] = f"{title}: {text}"

    def rest(self) -> None:
        """The evaluations that no record took along: at the training's last step, unless W&B was told of none."""
        last = self.latest
        for row in self._evaluations():
            self._log({"step": max(last, row["evaluated_step"])} | row, self.latest + 1)

    def _evaluations(self) -> Iterator[dict[str, Any]]:
        """Of RUN/eval/, those not sent yet, one after the other; each with the step whose weights it judged."""
        for key, content, written in wandb_run.unsent(self.folder):
            metrics: dict[str, float] = next(
                (row["metrics"] for row in written["rows"] if row["features"] == "pretrained"), {}
            )
            wandb_run.note_sent(self.folder, key, content)
            yield {"evaluated_step": written["step"]} | {
                metric_names.evaluation(written["name"], column): value
                for column, value in metrics.items()
            }


def use_own_temporary_folder() -> Path:
    """Make W&B's library keep its temporary files in one folder, which goes with this process: it ends too early to do that."""
    folder = os.environ.get(TEMPORARY) or tempfile.mkdtemp(prefix="ssl_pretrain-wandb-")
    os.environ[TEMPORARY] = os.environ["TMPDIR"] = tempfile.tempdir = folder
    return Path(folder)


def start_over(settings: dict[str, Any]) -> NoReturn:
    """This process anew, with the messages not read yet. What an attempt left behind in W&B's library and service, which may hold
    the run's id for as long as their requests take, cannot reach into the next one."""
    with tempfile.TemporaryFile() as handed:
        handed.write(json.dumps(settings).encode())
        handed.seek(0)
        os.set_inheritable(handed.fileno(), True)
        environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        os.execve(
            sys.executable,
            [sys.executable, "-m", "ssl_pretrain.monitoring.wandb.client", str(handed.fileno())],
            environment,
        )


def first_message() -> dict[str, Any]:
    """The run's settings: from the process before this one, else the first line, of which no byte too many is read."""
    if sys.argv[1:]:
        with open(int(sys.argv[1]), "rb") as handed:
            return json.loads(handed.read())
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(sys.stdin.fileno(), 1)):
        line += byte
    return json.loads(line)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # client.log
    with suppress(OSError, ValueError):  # nobody may be listening any more
        print(line, flush=True)


def lines(patience: float) -> Iterator[dict[str, Any] | None]:
    """The messages; None whenever none came for `patience` seconds."""
    waiting: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(line)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = waiting.get(timeout=patience)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        with suppress(ValueError):  # cut short by a kill
            yield json.loads(line)


def main() -> None:
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR2,
        signal.SIGHUP,
    ):  # meant for the training, which says when it ends
        signal.signal(number, signal.SIG_IGN)
    temporary = use_own_temporary_folder()
    try:
        serve(first_message(), temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def serve(first: dict[str, Any], temporary: Path) -> None:
    """Passes the messages on until they end, and ends this process."""
    client = Client(first)
    closed, stalled = False, False
    for message in lines(first["stall_seconds"]):
        if message is None:
            if not stalled:
                client.alert(
                    "stalled", f"no step ended for {first['stall_seconds']:.0f} seconds", "stalled"
                )
            stalled = True
            continue
        stalled, kind = False, message.pop("kind")
        if kind == "close":
            closed = True
        else:
            getattr(client, kind)(**message)
    client.rest()
    threading.Timer(FINISH_SECONDS, lambda: leave(1, temporary)).start()
    client.run.finish(exit_code=0 if closed else 1)
    say("W&B: finished")
    leave(0, temporary)


def leave(status: int, temporary: Path) -> NoReturn:
    """End at once, without waiting for the library's threads."""
    shutil.rmtree(temporary, ignore_errors=True)
    os._exit(status)


if __name__ == "__main__":
    main()
