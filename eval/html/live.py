"""Serve a live page about a training run, on this machine only.

The page asks for changes every few seconds and updates only what changed.
"""

import hashlib
import time
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from ssl_pretrain.eval import results, run_table
from ssl_pretrain.eval.html import local_server, page, run_files, sections
from ssl_pretrain.eval.html.local_server import Answer, Request
from ssl_pretrain.eval.run_state import RunState, RunStateReader

REFRESH_SECONDS = 3
PAGE, CHANGES = "", "main"  # the page, and the content of its <main>
PATTERNS = ("*.jsonl", "*.json", "*.png", "config.yaml", "neigh*/*", "eval/**/*.json")


class LivePage:
    """The live page of a run, whose folder need not exist yet.

    Args:
        run_path: Folder of the run.
        name: Name of the run on the page. Default: that of the folder.
        home: Address of the list of runs, or "" if there is none.
        report: Address of the run's report, or "" if it is not served.
    """

    def __init__(self, run_path: Path, name: str = "", home: str = "", report: str = ""):
        self.run_path, self.name = run_path, name or run_path.resolve().name
        self._home, self._report = home, report
        self._reader, self._lock = RunStateReader(run_path), Lock()

    def answer(self, name: str, etag: str = "") -> Answer | None:
        """Return the page or its changes, or None if there is nothing of this name.

        Args:
            name: `PAGE` or `CHANGES`.
            etag: ETag of the changes that the browser has.
        """
        if name == PAGE:
            state = self._read_state()
            variables = self._variables(state)
            return Answer(
                page.render("live.html.jinja", **variables, refresh_seconds=REFRESH_SECONDS)
            )
        if name == CHANGES:
            state = self._read_state()
            new_etag = self._etag(state)
            if new_etag == etag:
                return Answer("", etag=new_etag)
            body = page.render("run.html.jinja", **self._variables(state))
            return Answer(body, etag=new_etag)
        return None

    def _read_state(self) -> RunState:
        with self._lock:
            return self._reader.read()

    def _etag(self, state: RunState) -> str:
        """Return an ETag that changes whenever the state or a file shown on the page changes."""
        paths = sorted({path for pattern in PATTERNS for path in self.run_path.glob(pattern)})
        files = []
        for path in paths:
            with suppress(FileNotFoundError):  # removed since it was listed
                status = path.stat()
                files.append((str(path), status.st_size, status.st_mtime_ns))
        return f'"{hashlib.sha256(repr((state, files)).encode()).hexdigest()[:16]}"'

    def _variables(self, state: RunState) -> dict[str, Any]:
        """Return the variables of the page's templates, computed from the run's files alone."""
        variables = header_variables(state, self.name) | {
            "home": self._home,
            "report": self._report if state.has_report else "",
            "has_files": self.run_path.is_dir(),
        }
        return variables | _file_variables(self.run_path) if variables["has_files"] else variables


def header_variables(state: RunState, name: str) -> dict[str, Any]:
    """Return the variables of the top of the page: state, progress and the newest numbers."""
    percent = run_table.describe_percent(state)
    words = [percent if state.state == "running" else state.state, name]
    return {
        "title": " · ".join(word for word in words if word != run_table.NONE),
        "name": name,
        "state": state,
        "percent": percent,
        "progress": run_table.describe_progress(state),
        "width": f"{100 * state.fraction:.1f}",
        "time_left": run_table.describe_time_left(state, time.time()),
        "facts": _facts(state),
    }


def _facts(state: RunState) -> list[tuple[str, str]]:
    facts = {
        "method": state.method,
        "backbone": state.backbone,
        "data": state.data,
        "seed": "" if state.seed is None else str(state.seed),
        "epoch": f"{state.epoch:.2f} of {run_table.format_epochs(state)}" if state.epoch else "",
        "loss": f"{state.loss:.4f}" if isinstance(state.loss, float) else "",
        "best online k-NN": f"{state.best_knn:.1f} %" if state.best_knn is not None else "",
        "images per second": f"{state.images_per_second:,.0f}" if state.images_per_second else "",
        "started": run_table.format_time(state.started_at) if state.started_at else "",
        "last record": run_table.format_time(state.updated_at) if state.updated_at else "",
        "alerts": str(state.num_alerts) if state.num_alerts else "",
    }
    return [(name, value) for name, value in facts.items() if value]


def _file_variables(run_path: Path) -> dict[str, Any]:
    metrics = run_files.read_metrics(run_path)
    newest_results = [steps[max(steps)] for steps in results.load_by_step(run_path).values()]
    return {
        **sections.run_variables(run_path, metrics),
        "evaluations": sections.evaluation_variables(newest_results),
    }


def build_server(run_path: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the run's page, bound to the loopback address.

    Args:
        run_path: Folder of the run.
        port: TCP port. 0 chooses a free port, which is the `server_port` of the result.

    Raises:
        ValueError: If the port is taken.
    """
    live_page = LivePage(run_path, report="report.html")

    def respond(request: Request) -> Answer:
        if request.path == "/report.html" and (run_path / "report.html").is_file():
            return Answer((run_path / "report.html").read_bytes())
        answer = live_page.answer(request.path.removeprefix("/"), request.etag)
        return answer or local_server.not_found()

    return local_server.build(respond, port)


def serve(run_path: Path, port: int = 0) -> None:
    """Serve the page of a run until the process is interrupted.

    Raises:
        ValueError: If the path is a file, or the port is taken.
    """
    if run_path.exists() and not run_path.is_dir():
        raise ValueError(
            f"{run_path}: is a file; give the folder of a run, the `output` of its config"
        )
    server = build_server(run_path, port)
    waiting = "" if run_path.is_dir() else ", which does not exist yet"
    local_server.serve(server, f"live report of {run_path}{waiting}")
