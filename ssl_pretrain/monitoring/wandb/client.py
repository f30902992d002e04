"""Weights & Biases client in a separate process, so that training never waits for the server.

It reads one JSON message per line from standard input and prints lines for the user. If the server
cannot be reached or refuses the run, the run is kept offline under the same id, for `wandb sync`.
The end of the input ends the run.
"""

import io
import json
import os
import select
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
from ssl_pretrain.monitoring.wandb import evaluations
from ssl_pretrain.system import durable_files
from ssl_pretrain.system.platform_support import available_signals

START_SECONDS = 20  # longest wait for the server before the run is kept offline
FINISH_SECONDS = 300  # longest wait for the server at the end of the run
# Environment variable that passes the temporary folder to a restarted client.
TEMPORARY_FOLDER_VARIABLE = "SSL_PRETRAIN_WANDB_TMPDIR"
CAN_WAIT_FOR_INPUT = os.name == "posix"  # elsewhere select only works with sockets
IGNORED_SIGNALS = available_signals("SIGINT", "SIGTERM", "SIGUSR2", "SIGHUP")


class Client:
    """Client of one W&B run, which logs the records of one training run in step order.

    A message names one of the public methods and has its arguments as further fields.
    """

    def __init__(self, settings: dict[str, Any]):
        import wandb

        self.wandb: Any = wandb
        self.folder = Path(settings["dir"])
        self.run_id = settings["id"]
        self.is_online = settings["mode"] == "online"
        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        try:
            self.run = self._init(settings)
        except Exception as error:  # the library raises errors of many types
            if not self.is_online:
                raise
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            command = shlex.join(["wandb", "sync", str(self.folder / "wandb")])
            print_line(
                f"W&B: the server cannot be used ({reason}). The run is kept offline; "
                f"run `{command}` to send it later"
            )
            restart_client(settings | {"mode": "offline"})
        if self.is_online:
            print_line(f"W&B: {self.run.url}")
        # The server ignores steps that it already has. Offline, this process has to ignore them.
        self.first_new_step = 0 if self.is_online else read_last_step(self.folder, self.run_id) + 1
        self.last_step = max(self.first_new_step, self.run.step) - 1

    def _init(self, settings: dict[str, Any]) -> Any:
        names = ("project", "name", "id", "dir", "config", "tags")
        run = self.wandb.init(
            **{name: settings[name] for name in names},
            group=settings["group"] or None,
            mode=settings["mode"],
            resume="allow" if self.is_online else None,
            settings=self.wandb.Settings(
                init_timeout=START_SECONDS,
                login_timeout=START_SECONDS,
                console="off",
                silent=True,
                x_disable_stats=True,
            ),
        )
        for axis in metric_names.AXES:
            run.define_metric(axis)
        run.define_metric("*", step_metric="step")
        run.define_metric(f"{metric_names.EVALUATION}/*", step_metric="evaluated_step")
        run.define_metric(metric_names.tracker_name("loss"), step_metric="step", summary="min")
        run.define_metric(metric_names.tracker_name("knn"), step_metric="step", summary="max")
        return run

    def log_record(
        self, record: dict[str, Any], curves: dict[str, list[float]] | None = None
    ) -> None:
        """Log a record of metrics.jsonl, together with a new evaluation if there is one."""
        step = record["step"]
        if step < self.first_new_step:
            return
        row: dict[str, Any] = {
            metric_names.tracker_name(key): value for key, value in record.items() if key != "time"
        }
        if curves:
            deviations, variances = curves["deviations"], curves["spectrum"]
            row[metric_names.SPREAD_CHART] = self.wandb.Histogram(deviations, num_bins=32)
            row[metric_names.SPECTRUM_CHART] = self.wandb.plot.line_series(
                xs=curves["spectrum_index"],
                ys=[variances],
                keys=[f"step {step}"],
                title="Covariance spectrum",
                xname="eigenvalue",
            )
        self._log(row | next(self._take_unsent_evaluations(), {}), step)

    def log_picture(self, key: str, path: str, caption: str, step: int) -> None:
        """Log a picture."""
        if step >= self.first_new_step:
            self._log({key: self.wandb.Image(path, caption=caption)}, step)

    def raise_alert(self, title: str, text: str, tag: str) -> None:
        """Raise an alert and tag the run."""
        self.run.alert(title=title, text=text, level=self.wandb.AlertLevel.ERROR)
        if tag not in (self.run.tags or ()):
            self.run.tags = (*(self.run.tags or ()), tag)
        self.run.summary["health"] = f"{title}: {text}"

    def finish_run(self, exit_code: int) -> None:
        """Log the evaluations that were not logged with a record, and end the run."""
        last_step = self.last_step
        for row in self._take_unsent_evaluations():
            self._log({"step": max(last_step, row["evaluated_step"])} | row, self.last_step + 1)
        threading.Timer(FINISH_SECONDS, exit_process, [1]).start()
        self.run.finish(exit_code=exit_code)
        write_last_step(self.folder, self.run_id, self.last_step)

    def _log(self, row: dict[str, Any], step: int) -> None:
        if step > self.last_step:  # the library now writes the row of the previous step
            write_last_step(self.folder, self.run_id, self.last_step)
            self.last_step = step
        self.run.log(row, step=step)

    def _take_unsent_evaluations(self) -> Iterator[dict[str, Any]]:
        """Yield the results in RUN/eval/ that W&B does not have, and mark them as sent."""
        for result in evaluations.unsent_results(self.folder):
            evaluations.mark_sent(self.folder, result)
            yield {"evaluated_step": result["step"], **metric_names.evaluation_metrics(result)}


def read_last_step(folder: Path, run_id: str) -> int:
    """Return the last step that any client of this run has logged, or -1."""
    with suppress(OSError, ValueError):
        return int((folder / "wandb" / f"last_step_{run_id}").read_text())
    return -1


def write_last_step(folder: Path, run_id: str, step: int) -> None:
    """Save the last logged step, so that a resumed offline run does not log it again."""
    with suppress(OSError):
        durable_files.replace(folder / "wandb" / f"last_step_{run_id}", f"{step}\n")


def use_temporary_folder() -> None:
    """Make W&B's library keep its temporary files in one folder, which `exit_process` removes.

    The library itself has no time to remove them, because `exit_process` ends the process at once.
    """
    folder = os.environ.get(TEMPORARY_FOLDER_VARIABLE)
    folder = folder or tempfile.mkdtemp(prefix="ssl_pretrain-wandb-")
    os.environ[TEMPORARY_FOLDER_VARIABLE] = os.environ["TMPDIR"] = tempfile.tempdir = folder


def restart_client(settings: dict[str, Any]) -> NoReturn:
    """Replace this process with a new one that has other settings and reads the remaining messages.

    A failed attempt leaves threads and a service of W&B's library behind. They may occupy the run's
    id until their requests end, and must not interfere with the next attempt.
    """
    path = Path(os.environ[TEMPORARY_FOLDER_VARIABLE]) / "settings.json"
    path.write_text(json.dumps(settings))
    os.environ.pop("WANDB_SERVICE", None)
    module = "ssl_pretrain.monitoring.wandb.client"
    os.execv(sys.executable, [sys.executable, "-m", module, str(path)])


def print_line(line: str) -> None:
    """Print a line to client.log and, if it is still running, to the training process."""
    print(line, file=sys.stderr, flush=True)
    with suppress(OSError, ValueError):
        print(line, flush=True)


def read_messages(source: io.FileIO, timeout_seconds: float) -> Iterator[dict[str, Any] | None]:
    """Yield the messages, and None whenever `timeout_seconds` pass without one."""
    while True:
        if CAN_WAIT_FOR_INPUT and not select.select([source], [], [], timeout_seconds)[0]:
            yield None
        elif line := source.readline():
            with suppress(ValueError):  # incomplete line of a training process that was killed
                yield json.loads(line)
        else:
            return


def handle_messages(settings: dict[str, Any], source: io.FileIO) -> NoReturn:
    """Handle messages until the input ends, then end this process."""
    client = Client(settings)
    has_succeeded, is_stalled = False, False
    for message in read_messages(source, settings["stall_seconds"]):
        if message is None:
            if not is_stalled:
                text = f"no step finished for {settings['stall_seconds']:.0f} seconds"
                client.raise_alert("stalled", text, "stalled")
            is_stalled = True
            continue
        is_stalled, method = False, message.pop("method")
        if method == "close":
            has_succeeded = True
        else:
            getattr(client, method)(**message)
    client.finish_run(exit_code=0 if has_succeeded else 1)
    print_line("W&B: finished")
    exit_process(0)


def exit_process(status: int) -> NoReturn:
    """End this process at once, without waiting for the library's threads."""
    shutil.rmtree(os.environ[TEMPORARY_FOLDER_VARIABLE], ignore_errors=True)
    os._exit(status)


def main() -> None:
    """Handle the messages on standard input until it ends, then exit.

    The settings are JSON, either in the file named on the command line or in the first line of the
    input.
    """
    # These signals are meant for the training process, which closes the input when it ends.
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    use_temporary_folder()
    # Reading without a buffer leaves the remaining messages to the process after a restart.
    source = io.FileIO(sys.stdin.fileno())
    try:
        settings = Path(sys.argv[1]).read_bytes() if sys.argv[1:] else source.readline()
        handle_messages(json.loads(settings), source)
    finally:  # only reached after an error
        shutil.rmtree(os.environ[TEMPORARY_FOLDER_VARIABLE], ignore_errors=True)


if __name__ == "__main__":
    main()
