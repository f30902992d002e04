"""Serve the page of all runs, the live page of each, and comparisons, on this machine only."""

import json
import os
import tempfile
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

from ssl_pretrain.eval import compare, run_table
from ssl_pretrain.eval.html import local_server, run_list_page
from ssl_pretrain.eval.html.live import LivePage
from ssl_pretrain.eval.html.local_server import Answer, Request
from ssl_pretrain.eval.run_folders import RunFolders
from ssl_pretrain.eval.run_state import RunState

REFRESH_SECONDS = 3
MIN_SCAN_SECONDS = 1.0  # so that several open pages do not multiply the reading
JSON = "application/json"


class RunListServer:
    """Answers to the requests of the pages.

    Each change of a run gets a number, its version. A page asks for the rows that are newer than
    the version that it shows. Versions begin with the time of the start, so that the page of an
    earlier server gets all rows.
    """

    def __init__(self, folders: RunFolders):
        self.folders = folders
        self._lock, self._scanned_at = Lock(), 0.0
        self._states: dict[str, RunState] = {}
        self._versions: dict[str, int] = {}
        self._version = self._names_version = time.time_ns() // 1_000_000
        self._rows: dict[str, tuple[int, list[str], str]] = {}  # version, columns, HTML
        self._pages: dict[str, LivePage] = {}

    def start_reading(self) -> None:
        """Begin to read the runs, so that the first page seldom has to wait for it."""
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self._lock:
            self._scan()

    def respond(self, request: Request) -> Answer:
        """Answer a request."""
        if request.path.startswith("/run/"):
            return self._run_page(request)
        with self._lock:
            self._scan()
            if request.path == "/":
                return Answer(
                    run_list_page.render(
                        self._states,
                        self.folders.folder,
                        self._row,
                        version=self._version,
                        refresh_seconds=REFRESH_SECONDS,
                    )
                )
            if request.path == "/changes":
                return Answer(self._changes(request), content_type=JSON)
            if request.path == "/runs.json":
                rows = run_list_page.rows(self._states, self.folders.folder)
                return Answer(json.dumps(rows), content_type=JSON)
        if request.path == "/compare":
            return self._compare(request.query.get("run", []))
        return local_server.not_found("There is no such page. The list of runs is at /")

    def _scan(self) -> None:
        """Read the runs unless they were just read, and number the changes."""
        if time.monotonic() - self._scanned_at < MIN_SCAN_SECONDS:
            return
        states = self.folders.read()
        changed = [name for name, state in states.items() if state != self._states.get(name)]
        if changed or len(states) != len(self._states):
            self._version += 1
            self._versions |= dict.fromkeys(changed, self._version)
        if states.keys() != self._states.keys():
            self._names_version = self._version
        self._states, self._scanned_at = states, time.monotonic()

    def _changes(self, request: Request) -> str:
        """Return the rows that are newer than the version `since` of the request, as JSON."""
        text = request.query.get("since", ["0"])[0]
        is_number = text.isdecimal() and len(text) <= len(str(self._version))
        since = int(text) if is_number and int(text) <= self._version else 0
        evaluations = run_table.evaluation_names(self._states, run_list_page.MAX_EVALUATIONS)
        changed = {
            name: self._row(name, evaluations)
            for name in self._states
            if self._versions[name] > since
        }
        changes = {
            "version": self._version,
            "counts": run_table.describe_counts(self._states),
            "evaluations": evaluations,
            "rows": changed,
            "names": list(self._states) if self._names_version > since else None,
        }
        return json.dumps(changes, ensure_ascii=True)

    def _row(self, name: str, evaluations: list[str]) -> str:
        """Return the row of a run, which is rendered again only if the run or the columns change.

        Its time left may be old. The page counts it down by itself.
        """
        version, columns, row = self._rows.get(name, (0, [], ""))
        if (version, columns) != (self._versions[name], evaluations):
            state = self._states[name]
            links = run_list_page.served_links(name, state)
            row = run_list_page.render_row(name, state, links, evaluations)
            self._rows[name] = self._versions[name], evaluations, row
        return row

    def _run_page(self, request: Request) -> Answer:
        """Answer with a page of one run, /run/NAME/, /run/NAME/main or /run/NAME/report.html."""
        name, _, file_name = request.path.removeprefix("/run/").rpartition("/")
        with self._lock:
            self._scan()
            run, state = self.folders.path(name), self._states.get(name)
            if run is None or state is None:
                whole_name = request.path.removeprefix("/run/")
                if self.folders.path(whole_name):  # relative addresses need the last slash
                    location = f"/run/{run_list_page.url_path(whole_name)}/"
                    return Answer("", 308, location=location)
                return local_server.not_found("There is no such run. The list of runs is at /")
            links = run_list_page.served_links(name, state)
            if name not in self._pages:
                report = f"{links.page}report.html"
                self._pages[name] = LivePage(run, name, home="/", report=report)
        if file_name == "report.html" and state.has_report:
            return Answer((run / "report.html").read_bytes())
        return self._pages[name].answer(file_name, request.etag) or local_server.not_found(
            f"There is no such page. The run's page is at {links.page}"
        )

    def _compare(self, names: list[str]) -> Answer:
        """Answer with the comparison of runs, which is not written to their folders."""
        runs = [self.folders.path(name) for name in names]
        unknown = [name for name, run in zip(names, runs) if run is None]
        if unknown or len(runs) < 2:
            problem = f"no such run: {', '.join(unknown)}" if unknown else "give two or more runs"
            return local_server.not_found(f"compare: {problem}. The list of runs is at /")
        with tempfile.TemporaryDirectory() as folder:
            path = compare.write([run for run in runs if run], Path(folder) / "compare.html")
            return Answer(path.read_bytes())


def build_server(folders: RunFolders, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the runs below a folder, which already reads them.

    It is bound to the loopback address.

    Args:
        folders: The runs.
        port: TCP port. 0 chooses a free port.

    Raises:
        ValueError: If the port is taken.
    """
    pages = RunListServer(folders)
    server = local_server.build(pages.respond, port)
    pages.start_reading()
    return server


def serve(folders: RunFolders, port: int = 0) -> None:
    """Serve the runs below a folder until the process is interrupted.

    Raises:
        ValueError: If the port is taken.
    """
    local_server.serve(build_server(folders, port), f"runs in {os.fspath(folders.folder)}")
