"""An export is uploaded to the Hub whole and verified, and not at all without a token.

The client is huggingface_hub's own. The Hub is a small server of this test, which asks for every
file in the commit itself instead of in its large-file storage.
"""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file
from untrained_run import make_run

from ssl_pretrain.eval import export, hub, runs
from ssl_pretrain.system import durable_files

REPOSITORY = "someone/digits"
NAMES = [
    "README.md",
    "model.safetensors",
    "preprocessing.py",
    "reference.safetensors",
    "timm.json",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("runs") / "run")
    folder = export.export(runs.load_run(path, device="cpu"), path.parent / "exported", [])
    (folder / "notes.txt").write_text("not part of the export")
    return folder


class FakeHub(BaseHTTPRequestHandler):
    """The requests of create_repo and upload_folder. Records what it receives."""

    received: ClassVar[dict] = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received["token"] = self.headers["Authorization"]
        if self.path == "/api/repos/create":
            self.received["repository"] = json.loads(body)
            self.reply({"url": f"{self.server.address}/{REPOSITORY}"})
        elif self.path == "/api/validate-yaml":  # of the card
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self.reply({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.received["files"][value["path"]] = base64.b64decode(value["content"])
            oid = "0" * 40
            url = f"{self.server.address}/{REPOSITORY}/commit/{oid}"
            self.reply({"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})
        else:
            self.reply({}, status=404)

    def do_GET(self):
        self.reply({"sha": "0" * 40, "siblings": [], "id": REPOSITORY})

    def reply(self, values, status=200):
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def fake_hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    FakeHub.received = {"files": {}}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield FakeHub.received
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_token(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


def test_without_a_token_the_files_are_listed_and_nothing_is_sent(
    folder, fake_hub, no_token, capsys
):
    hub.main(["push", str(folder), REPOSITORY])
    lines = capsys.readouterr().out.splitlines()
    address = huggingface_hub.constants.ENDPOINT
    assert lines[0] == f"repository: {address}/{REPOSITORY} (a new one is private)"
    listed = [line.split() for line in lines[2 : 2 + len(NAMES)]]
    assert [name for _, _, name in listed] == NAMES
    sizes = [(folder / name).stat().st_size for name in NAMES]
    assert [int(size.replace(",", "")) for size, _, _ in listed] == sizes
    digests = json.loads((folder / "timm.json").read_text())["files"]
    assert {name: digest for _, digest, name in listed if name in digests} == digests
    assert "  # test_resnet by simclr" in lines
    assert lines[-1] == (
        "nothing was uploaded: there is no token; log in with `hf auth login` or set HF_TOKEN, and"
        " run the same command again"
    )
    assert fake_hub == {"files": {}}


def test_a_dry_run_sends_nothing_even_with_a_token(folder, fake_hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    hub.main(["push", str(folder), REPOSITORY, "--dry-run", "--public"])
    output = capsys.readouterr().out
    assert "(a new one is public)" in output
    assert output.endswith("nothing was uploaded: --dry-run was given\n")
    assert fake_hub == {"files": {}}


def test_with_a_token_exactly_the_files_of_the_export_are_uploaded(
    folder, fake_hub, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    hub.main(["push", str(folder), REPOSITORY])
    assert fake_hub["token"] == "Bearer hf_secret"
    repository = fake_hub["repository"]
    # Older versions of the client send the first of these entries.
    assert repository.get("private") is True or repository.get("visibility") == "private"
    assert fake_hub["files"] == {name: (folder / name).read_bytes() for name in NAMES}
    assert "uploaded: http://127.0.0.1" in capsys.readouterr().out.splitlines()[-1]


def test_a_changed_folder_is_refused(folder, fake_hub, no_token):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    try:
        weights = load_file(file)
        weights["conv1.0.weight" if "conv1.0.weight" in weights else next(iter(weights))] += 1
        save_file(weights, file)
        with pytest.raises(ValueError) as error:
            hub.main(["push", str(folder), REPOSITORY])
    finally:
        file.write_bytes(content)
    assert str(error.value) == (
        f"{folder}: model.safetensors changed after the export or is missing. Nothing was"
        " uploaded; export again"
    )


def test_an_unreachable_hub_and_an_error_without_text_are_explained(folder, monkeypatch, fake_hub):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    end = (
        "; check the token (`hf auth whoami`), the name and the network, and run the same command"
        " again"
    )
    with pytest.raises(ValueError) as error:
        hub.main(["push", str(folder), REPOSITORY])
    start = f"{REPOSITORY}: the Hub did not accept the upload: "
    assert str(error.value).startswith(start) and str(error.value).endswith(end)

    def fail(*arguments, **options):
        raise OSError

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(ValueError) as error:
        hub.main(["push", str(folder), REPOSITORY])
    assert str(error.value) == f"{start}OSError{end}"


def test_files_that_the_export_did_not_write_are_not_read(folder, no_token, monkeypatch):
    digest, paths = durable_files.sha256, []
    monkeypatch.setattr(
        durable_files, "sha256", lambda path: (paths.append(path.name), digest(path))[1]
    )
    hub.main(["push", str(folder), REPOSITORY])
    assert "model.safetensors" in paths and "notes.txt" not in paths


def test_an_export_without_checksums_is_refused(folder, tmp_path, no_token):
    old = shutil.copytree(folder, tmp_path / "old")
    arguments = json.loads((old / "timm.json").read_text())
    del arguments["files"]
    (old / "timm.json").write_text(json.dumps(arguments))
    with pytest.raises(ValueError) as error:
        hub.main(["push", str(old), REPOSITORY])
    assert str(error.value) == (
        f"{old}: was exported by an older version, which wrote no checksums; export again"
    )


def test_a_wrong_name_and_a_wrong_folder_are_named(folder, tmp_path, no_token):
    with pytest.raises(ValueError, match=r"^REPO: 'a/b/c' is not a name on the Hub: "):
        hub.main(["push", str(folder), "a/b/c"])
    with pytest.raises(ValueError) as error:
        hub.main(["push", str(tmp_path / "none"), REPOSITORY])
    assert str(error.value) == (
        f"{tmp_path / 'none'}: no such folder; give one that eval.export wrote"
    )
