"""Shards of a data set on the Hugging Face Hub, whose addresses a server of the tests serves.

HF_ENDPOINT directs huggingface_hub to the server.
"""

import importlib.util
import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer

import pytest
from hub_server import GATED, REPOSITORY, HubHandler
from tars import JPEG, make_tar

MISSING = [name for name in ("fsspec", "huggingface_hub") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# A process of its own, because huggingface_hub reads the endpoint when it is imported.
PROGRAM = """
import sys
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.tar.remote_store import check_unchanged
for root in sys.argv[2:]:
    try:
        source = open_source(DataConfig(root=root, cache_dir=sys.argv[1]), "train")
        print("opened", flush=True)
        input()
        print([source.read_bytes(index)[-1:] for index in range(len(source))])
        check_unchanged(source.shards[0])
    except ValueError as error:
        print(error)
"""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.objects, server.ranges = {}, []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.full
def test_shards_of_the_hub_are_read_by_ranges_and_refusals_are_named(hub, tmp_path):
    members = [(f"{number}.jpg", JPEG + b"%d" % number) for number in range(4)]
    content = make_tar(tmp_path / "a.tar", members).read_bytes()
    hub.objects["train-000000.tar"] = content
    roots = [REPOSITORY, "datasets/someone/none", GATED, "someone"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hidden-token",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), *(f"hf://{r}" for r in roots)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "opened\n"
    hub.ranges.clear()
    hub.objects["train-000000.tar"] = content[:-1] + b"1"
    output, errors = process.communicate("\n", timeout=120)
    assert output.splitlines() == [
        "[b'0', b'1', b'2', b'3']",
        f"data.root: hf://{REPOSITORY}/train-000000.tar has changed since its index was made: it "
        "has another version; restore the object, or start a new run, which makes the index again",
        "data.root: hf://datasets/someone/none does not exist; check the name and the credentials, "
        "because some stores answer like this without permission",
        f"data.root: access to hf://{GATED} is denied; check that the credentials may read it (set "
        "HF_TOKEN)",
        "data.root: hf://someone is not a valid address: Repository id must be 'namespace/name', "
        "got 'someone'. Single-segment ids (e.g. 'gpt2') are no longer supported; correct it",
    ]
    assert "hidden-token" not in errors
    assert [end - first for _, first, end in hub.ranges] == [len(JPEG) + 1] * 4
