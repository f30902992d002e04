"""Send a training run to Weights & Biases through a client in a child process.

Messages pass through a queue, so training never waits for the client. The mode of a run is online,
offline or off.
"""

import configparser
import json
import netrc
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ssl_pretrain.system import durable_files, optional_packages
from ssl_pretrain.system.import_path import child_environment

CLOSE_SECONDS = 4.0  # longest wait at the end of the run, if the client sends to a server
OFFLINE_CLOSE_SECONDS = 60.0  # longest wait if the client only writes to the disk

MIN_STEPS_BETWEEN_CURVES = 500  # plots.jsonl has all curves

WANDB_MODES = {  # mode name in W&B: mode name in this package
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
}
TRUE_WORDS = ("1", "true", "t", "yes", "y", "on")


class WandbRun:
    """A W&B run, online or offline. Only `close` blocks, for a limited time.

    Args:
        run: The run's folder. The client writes below `run/wandb/`.
        mode: `online` or `offline`.
        project: W&B project of the run.
        name: Display name of the run. Default: the name of its folder.
        run_id: W&B ID of the run, the same after a resume.
        config: Configuration to show in W&B.
        tags: W&B tags of the run.
        group: W&B group of the run, or "" for none.
        print_line: Prints the client's messages.
        stall_seconds: Time without a message after which the client raises an alert.

    Raises:
        ValueError: If wandb is not installed.
        OSError: If the client's folder or log file cannot be written.
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
        group: str = "",
        print_line: Callable[[str], None] = print,
        stall_seconds: float = 600.0,
    ):
        _require_client(mode)
        self.mode, self.run_id, self._print_line = mode, run_id, print_line
        self._curves_step = -MIN_STEPS_BETWEEN_CURVES
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
                "group": group,
                "stall_seconds": stall_seconds,
            }
        )

    def log_record(
        self, record: dict[str, Any], curves: dict[str, list[float]] | None = None
    ) -> None:
        """Send a record. Curves are sent at most every `MIN_STEPS_BETWEEN_CURVES` steps."""
        if curves and record["step"] - self._curves_step >= MIN_STEPS_BETWEEN_CURVES:
            self._curves_step = record["step"]
        else:
            curves = None
        self._send("log_record", record=record, curves=curves)

    def log_picture(self, key: str, path: str, caption: str, step: int) -> None:
        """Send a picture."""
        self._send("log_picture", key=key, path=path, caption=caption, step=step)

    def raise_alert(self, title: str, text: str, tag: str) -> None:
        """Send an alert, and tag the run."""
        self._send("raise_alert", title=title, text=text, tag=tag)

    def _send(self, method: str, **arguments: Any) -> None:
        """Call a method of the client process's `Client` with arguments that are JSON values."""
        self._queue.put({"method": method, **arguments})

    def close(self, succeeded: bool = True) -> None:
        """End the run. W&B marks it as crashed unless it succeeded.

        W&B also marks it as crashed if the training process is killed before it calls `close`.
        """
        if succeeded:
            self._queue.put({"method": "close"})
        self._queue.put(None)
        timeout = OFFLINE_CLOSE_SECONDS if self.mode == "offline" else CLOSE_SECONDS
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        if self._process.poll() is None:
            self._print_line(
                "W&B: still sending. The client continues in the background; "
                "`wandb sync` uploads whatever it fails to send"
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
            self._print_line(line.rstrip())
        if self._process.wait() != 0:
            self._print_line(
                "W&B: the client ended early and the run continues without it; "
                "see wandb/client.log in the run's folder"
            )


def start(
    configured_mode: str,
    run: Path,
    *,
    run_id: str | None,
    print_line: Callable[[str], None],
    **arguments: Any,
) -> WandbRun | None:
    """Start a W&B run, or return None if W&B is off or the run's files cannot be written.

    Overridden settings and failures are printed.

    Args:
        configured_mode: The value of `log.wandb`.
        run: The run's folder.
        run_id: ID of an existing W&B run to continue, or None for a new run.
        print_line: Prints messages.
        arguments: Further arguments of `WandbRun`.
    """
    mode, message = resolve_mode(configured_mode)
    if message:
        print_line(message)
    if mode == "off":
        return None
    run_id = run_id or os.urandom(4).hex()
    try:
        return WandbRun(run, mode=mode, run_id=run_id, print_line=print_line, **arguments)
    except OSError as error:
        reason = durable_files.describe_error(error)
        print_line(
            f"W&B: {run / 'wandb'} could not be written: {reason}. The run continues without it"
        )
        return None


def check(configured_mode: str) -> None:
    """Check that wandb is installed if `log.wandb` requests it.

    Raises:
        ValueError: If it is not. The message says how to install it.
    """
    mode, _ = resolve_mode(configured_mode)
    if mode != "off":
        _require_client(configured_mode)


def _require_client(mode: str) -> None:
    optional_packages.require(f"log.wandb={mode}", "wandb", "wandb", "set log.wandb=off")


def resolve_mode(configured_mode: str) -> tuple[str, str]:
    """Return the mode of a run and a message for the user, which is usually empty.

    `auto` is online if there is a key and wandb is installed, else off. `WANDB_MODE`,
    `WANDB_DISABLED` and W&B's own settings files (`wandb offline`) can only restrict the mode. If
    they restrict an explicit `online` or `offline`, the message says so.

    Args:
        configured_mode: The value of `log.wandb`.
    """
    limit, source = _wandb_mode()
    if configured_mode == "auto":
        if has_api_key():
            if limit == "off" or optional_packages.is_installed("wandb"):
                return limit or "online", ""
            hint = optional_packages.install_hint("wandb")
            return "off", f"W&B: off, because wandb is not installed; {hint}"
        hint = (
            f"W&B: off, because no API key was found. {source} requests offline mode; "
            "log.wandb=offline does that without a key"
        )
        return "off", hint if limit == "offline" else ""
    order = ["off", "offline", "online"]
    if limit and order.index(limit) < order.index(configured_mode):
        return limit, f"W&B: {limit}, because {source} overrides log.wandb={configured_mode}"
    return configured_mode, ""


def has_api_key() -> bool:
    """Return True if the environment or the netrc file has a W&B key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def _wandb_mode() -> tuple[str, str]:
    """Return W&B's own mode and the setting that it comes from, or two empty strings.

    The environment takes precedence over the settings files.
    """
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in TRUE_WORDS:
        return "off", f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}"
    if mode := os.environ.get("WANDB_MODE", "").strip():
        return WANDB_MODES.get(mode.lower(), "off"), f"WANDB_MODE={mode}"
    folder = Path(os.environ.get("WANDB_DIR") or ".")
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb"))
    for path in (folder / ".wandb" / "settings", folder / "wandb" / "settings", home / "settings"):
        settings = configparser.ConfigParser(interpolation=None)
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            settings.read(path)
            if settings.get("default", "disabled", fallback="false").lower() == "true":
                return "off", f"disabled in {path}"
            if mode := settings.get("default", "mode", fallback=""):
                return WANDB_MODES.get(mode.lower(), "off"), f"mode = {mode} in {path}"
    return "", ""
