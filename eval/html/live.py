"""The page of a run that goes on, served on this machine alone; it refreshes itself."""

from __future__ import annotations

import hashlib
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain import config, schema
from ssl_pretrain.eval import results
from ssl_pretrain.eval.html import page, sections
from ssl_pretrain.views import recipe

REFRESH_SECONDS = 3
SCRIPT = """
let tag = "";
async function refresh() {
  try {
    const answer = await fetch("/main", {headers: tag ? {"If-None-Match": tag} : {}});
    if (answer.status === 200) {
      tag = answer.headers.get("ETag");
      document.querySelector("main").innerHTML = await answer.text();
    }
    document.body.dataset.state = "live";
  } catch (error) { document.body.dataset.state = "stopped"; }
  setTimeout(refresh, MILLISECONDS);
}
refresh();
""".replace("MILLISECONDS", str(1000 * REFRESH_SECONDS))


def content(run: Path) -> str:
    """The page's sections as the run's files are now: what the report has, without what needs the network's weights."""
    records = sections.read_metrics(run)
    path = run / "config.yaml"
    settings = (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}
    last: dict[str, Any] = records[-1] if records else {}
    pairs = [
        ("method", str(schema.at(settings, "method.name") or "-")),
        ("step", f"{last.get('step', 0):,}"),
    ]
    pairs += (
        [("epoch", f"{last['epoch']:.2f} of {settings.get('epochs', '?')}")]
        if "epoch" in last
        else []
    )
    pairs += [("loss", f"{last['loss']:.4f}")] if isinstance(last.get("loss"), float) else []
    pairs += (
        [("images per second", f"{last['images_per_second']:,.0f}")]
        if "images_per_second" in last
        else []
    )
    found = [page.result(steps[max(steps)]) for steps in results.by_step(run).values()]
    parts = [
        f"<header><h1>{escape(run.resolve().name)}</h1>{page.facts(pairs)}</header>",
        sections.alerts(run),
        page.section("Evaluation", sections.evaluations_over_steps(run), *found) if found else "",
        sections.training(run, records),
        sections.views(run, _view_size(settings)),
        sections.neighbours_over_steps(run),
    ]
    return "\n".join(filter(None, parts))


def _view_size(settings: dict[str, Any]) -> int:
    if schema.at(settings, "views.crops") is None:
        return 0
    return recipe.expand_counts(config.from_dict(settings).views)[0].size


def is_own_host(host: str) -> bool:
    """Return True for a Host header that names this machine, with any port, as a tunnel may have another.

    A page of another site can have its own name point here (DNS rebinding). Its requests then come with that name.
    """
    name = (
        host.rpartition(":")[0]
        if host.rpartition(":")[2].isdecimal() and not host.endswith("]")
        else host
    )
    return name.lower() in ("127.0.0.1", "localhost", "[::1]")


def server(run: Path, port: int = 0) -> ThreadingHTTPServer:
    """Serves the run's page on the loopback address, to requests for it alone; port 0: a free one, which `server_port` says.

    Raises:
        OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                self._route()
            except ValueError as error:  # a config.yaml that is not to be read
                self._answer(500, escape(str(error)))

        def _route(self) -> None:
            if not is_own_host(self.headers.get("Host", "")):
                self._answer(
                    403, "this page answers at http://127.0.0.1 and http://localhost alone"
                )
            elif self.path == "/":
                self._answer(200, page.page(run.resolve().name, [content(run)], SCRIPT))
            elif self.path == "/main":
                body = content(run)
                tag = f'"{hashlib.sha256(body.encode()).hexdigest()[:16]}"'
                if self.headers.get("If-None-Match") == tag:
                    self._answer(304, "", tag)
                else:
                    self._answer(200, body, tag)
            elif self.path == "/favicon.ico":
                self._answer(204, "")
            else:
                self._answer(404, "only / is here")

        def _answer(self, status: int, body: str, tag: str = "") -> None:
            self.send_response(status)
            if tag:
                self.send_header("ETag", tag)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
            if status not in (204, 304):
                self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing: the address was said."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def follow(run: Path, port: int = 0) -> None:
    """Serves until it is interrupted.

    Raises:
        ValueError: there is no such run folder.
    """
    if not run.is_dir():
        raise ValueError(f"{run}: there is no such run folder; give the `output` of a run's config")
    with server(run, port) as serving:
        print(
            f"live report of {run}: http://127.0.0.1:{serving.server_port}/   (only on this machine; Ctrl-C ends it)",
            flush=True,
        )
        serving.serve_forever()
