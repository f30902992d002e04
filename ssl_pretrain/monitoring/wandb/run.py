"""The training's side of a Weights & Biases run, which sends messages and never waits."""

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.monitoring.wandb import mode as wandb_mode
from ssl_pretrain.system import durable_files
from ssl_pretrain.system.import_path import child_environment

CLOSE_SECONDS = 4.0  # longest wait at the end of the run, if the client sends to a server
OFFLINE_CLOSE_SECONDS = 60.0  # longest wait if the client only writes to the disk


class WandbRun:
    """One run at W&B, online or offline. Nothing blocks except `close`, for a limited time.

    Args:
        run: The run's folder. The client writes below `run/wandb/`.
        mode: `online` or `offline`.
        project: Project at W&B.
        name: Name of the run at W&B.
        run_id: Identity of the run at W&B, the same after a resume.
        config: Configuration to show at W&B.
        tags: Tags of the run at W&B.
        say: Prints the client's messages.
        stall_seconds: The client raises an alert after this time without a message.

    Raises:
        ValueError: If wandb is not installed.
        OSError: If the disk refuses the client's folder.
    """

    def __init__(
        self,
        run: Path,
        *,
        mode: str,
        project: str,
        name: str,
        run_id: str,
        config: dict[str, Any],
        tags: list[str],
        say: Callable[[str], None] = print,
        stall_seconds: float = 600.0,
    ):
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "log.wandb: wandb is not installed; pip install wandb, or set log.wandb=off"
            )
        self.mode, self.run_id, self._say = mode, run_id, say
        environment = child_environment()
        environment.pop("WANDB_SERVICE", None)  # belongs to another client and ends with it
        (run / "wandb").mkdir(parents=True, exist_ok=True)
        with (run / "wandb" / "client.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ssl_pretrain.monitoring.wandb.client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
                text=True,
            )
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()
        self._queue.put(
            {
                "dir": str(run),
                "mode": mode,
                "project": project,
                "name": name or run.resolve().name,
                "id": run_id,
                "config": config,
                "tags": tags,
                "stall_seconds": stall_seconds,
            }
        )

    def send(self, kind: str, **message: Any) -> None:
        """Call a method of the client process's `Client`.

        Args:
            kind: Name of the method.
            message: Arguments of the method, which must be JSON values.
        """
        self._queue.put({"kind": kind, **message})

    def close(self, succeeded: bool = True) -> None:
        """End the run. W&B marks it as crashed unless it succeeded.

        W&B also marks it as crashed if the training is killed and never calls this.
        """
        if succeeded:
            self._queue.put({"kind": "close"})
        self._queue.put(None)
        timeout = OFFLINE_CLOSE_SECONDS if self.mode == "offline" else CLOSE_SECONDS
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        if self._process.poll() is None:
            self._say(
                "W&B: still sending. The client continues in the background; "
                "`wandb sync` sends what it does not manage to"
            )
        for thread in self._threads:
            thread.join(timeout=0.1)

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None, "started with a pipe"
        with suppress(OSError, ValueError), pipe:
            while (message := self._queue.get()) is not None:
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None, "started with a pipe"
        for line in self._process.stdout:
            self._say(line.rstrip())
        if self._process.wait() != 0:
            self._say(
                "W&B: the client ended early and the run continues without it; "
                "see wandb/client.log in the run's folder"
            )


def start(
    setting: str, run: Path, *, run_id: str | None, say: Callable[[str], None], **arguments: Any
) -> WandbRun | None:
    """Start a client unless W&B is off or the disk refuses its files, and print the reason.

    Args:
        setting: The value of `log.wandb`.
        run: The run's folder.
        run_id: Identity of a run that W&B knows already, or None.
        say: Prints messages.
        arguments: Further arguments of `WandbRun`.
    """
    mode, message = wandb_mode.resolve(setting)
    if message:
        say(message)
    if mode == "off":
        return None
    run_id = run_id or os.urandom(4).hex()
    try:
        return WandbRun(run, mode=mode, run_id=run_id, say=say, **arguments)
    except OSError as error:
        reason = durable_files.reason(error)
        say(f"W&B: {run / 'wandb'} could not be written: {reason}. The run continues without it")
        return None
