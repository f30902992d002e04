"""Serve a live page about a training run, on this machine only. The page refreshes itself."""

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain import config, schema
from ssl_pretrain.eval import results
from ssl_pretrain.eval.html import page, sections
from ssl_pretrain.views import recipe

REFRESH_SECONDS = 5


def template_variables(run_path: Path) -> dict[str, Any]:
    """Return the variables of the page's templates, computed from the run's files alone."""
    metrics, path = sections.read_metrics(run_path), run_path / "config.yaml"
    settings = (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}
    last_record: dict[str, Any] = metrics[-1] if metrics else {}
    facts = [
        ("method", str(schema.value_at(settings, "method.name") or "-")),
        ("step", f"{last_record.get('step', 0):,}"),
    ]
    if "epoch" in last_record:
        facts.append(("epoch", f"{last_record['epoch']:.2f} of {settings.get('epochs', '?')}"))
    if isinstance(last_record.get("loss"), float):
        facts.append(("loss", f"{last_record['loss']:.4f}"))
    if "images_per_second" in last_record:
        facts.append(("images per second", f"{last_record['images_per_second']:,.0f}"))
    view_size: int | list[int] = 0
    if schema.value_at(settings, "views.crops") is not None:
        view_size = recipe.enclosing_size(config.from_dict(settings).views)
    newest_results = [steps[max(steps)] for steps in results.load_by_step(run_path).values()]
    return {
        **sections.run_variables(run_path, metrics, view_size),
        "title": run_path.resolve().name,
        "facts": facts,
        "evaluations": [sections.evaluation_variables(result) for result in newest_results],
        "refresh_milliseconds": 1000 * REFRESH_SECONDS,
    }


def _etag(run_path: Path) -> str:
    """Return an ETag that changes whenever a file shown on the page changes."""
    patterns = ("*.jsonl", "*.json", "*.png", "config.yaml", "neigh*/*", "eval/**/*.json")
    paths = sorted({path for pattern in patterns for path in run_path.glob(pattern)})
    file_states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return f'"{hashlib.sha256(repr(file_states).encode()).hexdigest()[:16]}"'


def is_own_host(host: str) -> bool:
    """Return True if a Host header names this machine.

    Any port is accepted, because tunnels change it. Another site may point its own name to this
    machine (DNS rebinding). Requests from its pages carry that name and are refused.
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name.lower() in ("127.0.0.1", "localhost", "[::1]")


def build_server(run_path: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the run's page, bound to the loopback address.

    Args:
        run_path: Folder of the run.
        port: TCP port. 0 chooses a free port, which is the `server_port` of the result.

    Raises:
        OSError: If the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                self._route()
            except ValueError as error:  # config.yaml cannot be read
                self._answer(500, page.render("error.html.jinja", message=str(error)))

        def _route(self) -> None:
            if not is_own_host(self.headers.get("Host", "")):
                self._answer(
                    403, "This page is served at http://127.0.0.1 and http://localhost only"
                )
            elif self.path == "/":
                self._answer(200, page.render("live.html.jinja", **template_variables(run_path)))
            elif self.path == "/main":
                etag = _etag(run_path)
                if self.headers.get("If-None-Match") == etag:
                    self._answer(304, "", etag)
                else:
                    self._answer(
                        200, page.render("run.html.jinja", **template_variables(run_path)), etag
                    )
            elif self.path == "/favicon.ico":
                self._answer(204, "")
            else:
                self._answer(404, "The page is at /")

        def _answer(self, status: int, body: str, etag: str = "") -> None:
            headers = {
                "ETag": etag,
                "Content-Type": "text/html; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": "frame-ancestors 'none'",
                "Content-Length": "" if status in (204, 304) else str(len(body.encode())),
            }
            self.send_response(status)
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            """Do not print a line per request."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def serve(run_path: Path, port: int = 0) -> None:
    """Serve the page of a run until the process is interrupted.

    Raises:
        ValueError: If the folder does not exist.
    """
    if not run_path.is_dir():
        raise ValueError(
            f"{run_path}: there is no such run folder; give the `output` of a run's config"
        )
    with build_server(run_path, port) as page_server:
        address = f"http://127.0.0.1:{page_server.server_port}/"
        print(
            f"live report of {run_path}: {address}   (this machine only; Ctrl-C to stop)",
            flush=True,
        )
        page_server.serve_forever()
