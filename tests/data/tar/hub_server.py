"""A server with the four addresses of the Hugging Face Hub that reading a data set needs."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

REPOSITORY = "datasets/someone/photos"
GATED = "datasets/someone/gated"


class HubHandler(BaseHTTPRequestHandler):
    """Serve the objects of the server as the files of one data set.

    The server has the attributes `objects` (content by path) and `ranges`, to which each range that
    is read is added. No token gives access to the data set `GATED`.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith(f"api/{GATED}"):
            self.refuse(401, "GatedRepo", "Access is restricted")
        elif path.startswith(f"{REPOSITORY}/resolve/main/"):
            self.send_file(path.removeprefix(f"{REPOSITORY}/resolve/main/"))
        elif path.startswith(f"api/{REPOSITORY}/tree/main"):
            files = [self.entry(name) for name in sorted(self.server.objects)]
            self.send(200, json.dumps(files).encode())
        elif path in (f"api/{REPOSITORY}", f"api/{REPOSITORY}/revision/main"):
            facts = {"id": "someone/photos", "sha": "0" * 40, "siblings": []}
            self.send(200, json.dumps(facts).encode())
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        files = [self.entry(name) for name in request["paths"] if name in self.server.objects]
        self.send(200, json.dumps(files).encode())

    def entry(self, name: str) -> dict[str, object]:
        content = self.server.objects[name]
        digest = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": digest}

    def send_file(self, name: str) -> None:
        content = self.server.objects[name]
        requested = self.headers.get("Range")
        if not requested:
            self.send(200, content)
            return
        first, _, last = requested.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last), len(content) - 1) + 1
        self.server.ranges.append((name, start, end))
        self.send(206, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/*"})

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_arguments):
        pass
