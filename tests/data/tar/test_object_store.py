"""Shards in an S3 server give the local batches, through faults between the client and the server.

The server is moto's, in a process of its own, and the client is s3fs. A TCP proxy between them
resets connections, delays requests and truncates responses.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import time

import fork_server
import pytest
from servers import (
    CREDENTIALS,
    FaultyProxy,
    client_settings,
    environment,
    restart_server,
    s3_server,
)
from tars import (
    VIEWS,
    build_loader,
    digest,
    digests,
    make_tar,
    open_shards,
    write_folder_and_shards,
)

from ssl_pretrain.data.images import UnreachableSource
from ssl_pretrain.data.tar import remote_store
from ssl_pretrain.data.tar.index_files import index_beside
from ssl_pretrain.planning import inspect

MISSING = [name for name in ("moto", "s3fs", "flask") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)}, of the extras remote and dev"
    ),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]
NUM_STEPS = 12


@pytest.fixture(scope="module")
def store(s3_server):
    """Return the server and the proxy, to which the environment directs s3fs."""
    proxy = FaultyProxy(s3_server.port)
    settings = {**client_settings(proxy), "PYTHONPATH": os.pathsep.join(sys.path)}
    with environment(**settings):
        yield s3_server, proxy
    proxy.close()


@pytest.fixture(scope="module")
def shards(store, tmp_path_factory):
    """Return the local images and the URL of their shards."""
    images, folder = write_folder_and_shards(tmp_path_factory.mktemp("s3"), 120, 20)
    return images, store[0].put_folder(folder, "shards")


@pytest.fixture(scope="module")
def expected(shards) -> list[str]:
    return digests(build_loader(shards[0], VIEWS), 0, NUM_STEPS)


@pytest.fixture
def forkserver(store):
    """Start a fork server that has the settings of the store, for worker processes."""
    fork_server.stop()
    yield
    fork_server.stop()
    fork_server.start()


@pytest.mark.full
@pytest.mark.parametrize(("kind", "num_workers"), [("folder", 2), ("threads", 3)])
def test_faults_and_a_restart_of_the_server_change_no_batch(
    kind, num_workers, forkserver, store, shards, expected, tmp_path
):
    server, proxy = store
    source = open_shards(shards[1], cache_dir=str(tmp_path))
    restart = threading.Thread(target=restart_server, args=(server, proxy))
    results = []
    with build_loader(source, VIEWS, kind, num_workers=num_workers) as loader:
        for step, batch in zip(range(NUM_STEPS), loader.iterate_from(0)):
            results.append(digest(batch))
            if step == 2:
                restart.start()
    restart.join()
    assert results == expected
    faults = {name: count for name, count in proxy.counts.items() if name != "intact"}
    assert all(faults[name] for name in ("cut", "late", "truncated")), proxy.counts


def test_the_store_has_the_fingerprint_of_the_local_shards(store, tmp_path):
    _, folder = write_folder_and_shards(tmp_path, 30, 10)
    url = store[0].put_folder(folder, "copied")
    local, remote = open_shards(folder), open_shards(url, cache_dir=str(tmp_path / "cache"))
    assert remote.fingerprint == local.fingerprint
    assert remote.labels.tolist() == local.labels.tolist()
    pattern = open_shards(f"{url}/train-{{000000..000002}}.tar", cache_dir=str(tmp_path / "cache"))
    assert pattern.fingerprint == local.fingerprint
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".index"] * 3
    assert index_beside(folder / "train-000000.tar").exists()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the download did not end"
        time.sleep(0.05)


def test_cached_shards_are_read_without_the_store(store, tmp_path):
    images, folder = write_folder_and_shards(tmp_path, 30, 10)
    url = store[0].put_folder(folder, "cached")
    source = open_shards(url, cache_dir=str(tmp_path / "cache"), remote_cache_gb=1.0)
    for index in (0, 10, 20):
        assert source.read_bytes(index) == images.read_bytes(index)
    copies = tmp_path / "cache" / "shards"
    wait_for(lambda: len(list(copies.glob("*.tar"))) == 3)
    store[1].is_open = False
    try:
        copy = pickle.loads(pickle.dumps(source))
        for index in range(30):
            assert copy.read_bytes(index) == images.read_bytes(index)
    finally:
        store[1].is_open = True
    for path in copies.glob("*.tar"):
        path.unlink()  # as another run would to make space
    assert copy.read_bytes(3) == images.read_bytes(3)


def test_the_cache_obeys_its_limit_and_removes_what_was_not_used(store, tmp_path):
    images, folder = write_folder_and_shards(tmp_path, 30, 10)
    url = store[0].put_folder(folder, "limited")
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.tar"))]
    limit = sizes[0] + sizes[1]
    source = open_shards(url, cache_dir=str(tmp_path / "c"), remote_cache_gb=(limit + 1) / 1e9)
    copies = tmp_path / "c" / "shards"
    assert source.cache.download(source.shards[0])
    old = copies / "of_an_older_run.tar"
    old.write_bytes(bytes(sizes[1]))
    assert not source.cache.download(source.shards[1])  # there is no space
    assert source.read_bytes(10) == images.read_bytes(10)
    os.utime(old, (0, 0))
    assert source.cache.download(source.shards[1])
    assert not old.exists()
    assert not source.cache.download(source.shards[2])
    assert sum(path.stat().st_size for path in copies.iterdir()) <= limit
    assert [source.read_bytes(k) for k in range(30)] == [images.read_bytes(k) for k in range(30)]


def test_an_object_that_changes_ends_the_run(store, tmp_path):
    path = make_tar(tmp_path / "a.tar", [(f"{k}.jpg", bytes(900)) for k in range(20)])
    store[0].put("changed/a.tar", path.read_bytes())
    url = "s3://images/changed/a.tar"
    source = open_shards(url, cache_dir=str(tmp_path))
    store[0].put("changed/a.tar", path.read_bytes()[:5000])
    with pytest.raises(UnreachableSource) as error:
        source.read_bytes(15)
    assert str(error.value).startswith(
        f"data.root: {url} has changed since its index was made: it has"
    )
    changed = bytearray(path.read_bytes())
    changed[512:520] = b"otherimg"
    store[0].put("changed/a.tar", bytes(changed))
    with pytest.raises(UnreachableSource) as error:
        source.read(0)
    assert str(error.value) == (
        f"data.root: {url} has changed since its index was made: it has another version; restore "
        "the object, or start a new run, which makes the index again"
    )
    store[0].put("changed/a.tar", path.read_bytes()[:5000])
    with pytest.raises(ValueError) as truncated:
        open_shards(url, cache_dir=str(tmp_path))
    assert str(truncated.value) == (
        f"data.root: {url} is truncated, because it ends at offset 5,000 before its end mark; "
        "copy or write the shard again"
    )


def test_an_outage_ends_the_run_with_a_message(store, shards, tmp_path, monkeypatch):
    source = open_shards(shards[1], cache_dir=str(tmp_path))
    monkeypatch.setattr(remote_store, "_FIRST_DELAY_SECONDS", 0.001)
    store[1].is_open = False
    try:
        with (
            build_loader(source, VIEWS, "threads") as loader,
            pytest.raises(UnreachableSource) as error,
        ):
            next(iter(loader.iterate_from(0)))
    finally:
        store[1].is_open = True
    assert " could not be read in 10 attempts within " in str(error.value)
    assert str(error.value).endswith(
        "; check the network and the server, then repeat the command to continue"
    )


@pytest.mark.full
def test_missing_credentials_are_named_without_their_values(store, tmp_path):
    variables = {name: value for name, value in os.environ.items() if name not in CREDENTIALS}
    variables |= {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "ssl_pretrain.planning.inspect", "s3://images/none.tar"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (
        2,
        "error: data.root: s3://images/none.tar needs credentials, and none were found; set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE\n",
    )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "s3://images/none-{0..1}.tar",
            "s3://images/none-0.tar does not exist; check the name and the credentials, because "
            "some stores answer like this without permission",
        ),
        (
            "s3://no-such-bucket/train",
            "s3://no-such-bucket/train does not exist; check the name and the credentials, because "
            "some stores answer like this without permission",
        ),
        (
            "s3://images/photos.zip",
            "s3://images/photos.zip is not a .tar, and other files are not read from a store; "
            "download it and give its path",
        ),
        (
            "s3://images/texts",
            "s3://images/texts contains no .tar, and other files are not read from a store; give "
            "shards, which `ssl-pretrain shards write` makes",
        ),
    ],
)
def test_what_the_store_lacks_is_named(url, expected, store, capsys):
    store[0].put("texts/notes.md", b"none")
    assert inspect.main([url]) == 2
    assert capsys.readouterr().err == f"error: data.root: {expected}\n"


def test_a_key_without_permission_is_refused(store, capsys):
    """moto checks the access key after this request to it."""
    server, _ = store
    server.check_keys(after_requests=0)
    try:
        assert inspect.main(["s3://images/train.tar"]) == 2
    finally:
        server.check_keys(after_requests=float("inf"))
    assert capsys.readouterr().err == (
        "error: data.root: access to s3://images/train.tar is denied; check that the credentials "
        "may read it (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)\n"
    )


def test_an_invalid_name_of_a_bucket_is_refused(store, capsys):
    assert inspect.main(["s3://photos!/train.tar"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: data.root: s3://photos!/train.tar is not a valid address: Parameter validation "
        'failed: Invalid bucket name "photos!": '
    )
