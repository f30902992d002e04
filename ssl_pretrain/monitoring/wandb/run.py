"""The training's end of a Weights & Biases run: messages to a process of its own, sent by a thread, never waited for."""

from __future__ import annotations

import configparser
import hashlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.system import durable_files
from ssl_pretrain.system.import_path import child_environment

SENT = "wandb/evaluations_sent.json"
WAIT_SECONDS = 4.0  # at the end, for a client that talks to a server; it goes on alone after that
WAIT_OFFLINE = 60.0  # for one that only writes to the disk


class WandbRun:
    """One run at W&B, or offline. Nothing here blocks; `close` waits, for at most `WAIT_SECONDS` where a server is involved.

    Args:
        run: the run's folder; the client writes below `run/wandb/`.
        say: where the client's lines for people go.
        stall_seconds: without a message for so long, the client alerts.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(
        self, run: Path, *, mode: str, project: str, name: str, run_id: str, config: dict[str, Any], tags: list[str],
        say: Callable[[str], None] = print, stall_seconds: float = 600.0,
    ):  # fmt: skip
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "log.wandb: wandb is not installed; pip install wandb, or set log.wandb=off"
            )
        self.mode, self._say = mode, say
        environment = child_environment()
        environment.pop("WANDB_SERVICE", None)  # belongs to another client and ends with it
        (run / "wandb").mkdir(parents=True, exist_ok=True)
        with (run / "wandb" / "client.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ssl_pretrain.monitoring.wandb.client"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True, text=True,
            )  # fmt: skip
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()
        settings = {
            "dir": str(run),
            "project": project,
            "name": name,
            "id": run_id,
            "config": config,
            "tags": tags,
            "mode": mode,
        }
        self._waiting.put(settings | {"stall_seconds": stall_seconds})

    def send(self, kind: str, **message: Any) -> None:
        """`kind` is a method of `wandb_process.Client`, `message` its arguments."""
        self._waiting.put({"kind": kind, **message})

    def close(self, ended_well: bool = True) -> None:
        """Ends the run; unless it `ended_well`, or where nothing calls this as the training was killed, W&B marks it crashed."""
        if ended_well:
            self._waiting.put({"kind": "close"})
        self._waiting.put(None)
        end = time.monotonic() + (WAIT_OFFLINE if self.mode == "offline" else WAIT_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=end - time.monotonic())
        if self._process.poll() is None:
            self._say(
                "W&B: still sending; the client goes on alone, and `wandb sync` sends what it could not"
            )
        for thread in self._threads:
            thread.join(timeout=0.1)

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None, "started with a pipe"
        with suppress(OSError, ValueError), pipe:
            while (message := self._waiting.get()) is not None:
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None, "started with a pipe"
        for line in self._process.stdout:
            self._say(line.rstrip())
        if self._process.wait() not in (0, None):
            self._say(
                "W&B: the client ended early, the run goes on without it; wandb/client.log in its folder says why"
            )


def unsent(run: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(key, hash, result) of those in RUN/eval/ that `note_sent` was not told of."""
    sent = _sent(run)
    for found in sorted([*run.glob("eval/*.json"), *run.glob("eval/step_*/*.json")]):
        with suppress(
            OSError, ValueError, KeyError, TypeError
        ):  # written by someone else, perhaps at this moment
            written = json.loads(found.read_text())
            key = f"{written['name']} of step {written['step']}"
            content = hashlib.sha256(json.dumps(written["rows"]).encode()).hexdigest()[
                :16
            ]  # the newest is in two places
            if sent.get(key) != content:
                sent[key] = content
                yield key, content, written


def note_sent(run: Path, key: str, content: str) -> None:
    with suppress(OSError):  # it would be sent twice, to the same step
        durable_files.replace(run / SENT, json.dumps(_sent(run) | {key: content}))


def _sent(run: Path) -> dict[str, str]:
    return json.loads((run / SENT).read_text()) if (run / SENT).exists() else {}


def new_id() -> str:
    return os.urandom(5).hex()[:8]


def mode_of(asked: str) -> tuple[str, str]:
    """(mode, a line for people or nothing) of a run whose `log.wandb` is `asked`: never more than W&B itself was told.

    `auto` is online where there is a key, else off. WANDB_MODE, WANDB_DISABLED and W&B's settings files (`wandb offline`)
    lower it, and an explicit `online` or `offline` as well, which is said.
    """
    told, by = _told()
    if asked == "auto":
        if not has_key():
            hint = f"W&B: off, as there is no key here; {by} asks for offline: log.wandb=offline does that without a key"
            return "off", hint if told == "offline" else ""
        return told or "online", ""
    order = ["off", "offline", "online"]
    if told and order.index(told) < order.index(asked):
        return told, f"W&B: {told}, as {by} says, although log.wandb is {asked}; nothing is sent"
    return asked, ""


def _told() -> tuple[str, str]:
    """(off, offline, online or nothing, who says so): the environment first, then the settings files, the nearest first."""
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "t", "yes", "y", "on"):
        return "off", f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}"
    modes = {
        "online": "online",
        "run": "online",
        "shared": "online",
        "offline": "offline",
        "dryrun": "offline",
    }
    if mode := os.environ.get("WANDB_MODE", "").strip():
        return modes.get(mode.lower(), "off"), f"WANDB_MODE={mode}"
    near = Path(os.environ.get("WANDB_DIR") or ".")
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb"))
    for path in (near / ".wandb" / "settings", near / "wandb" / "settings", home / "settings"):
        settings = configparser.ConfigParser(interpolation=None)
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            settings.read(path)
            if settings.get("default", "disabled", fallback="false").lower() == "true":
                return "off", f"disabled in {path}"
            if mode := settings.get("default", "mode", fallback=""):
                return modes.get(mode.lower(), "off"), f"mode = {mode} in {path}"
    return "", ""


def has_key() -> bool:
    """Whether W&B's key is known here: in the environment or in the netrc."""
    import netrc
    from urllib.parse import urlparse

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
