"""Shards behind a web server: ranges, short answers, and the refusals that need no S3 client."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from tars import JPEG, open_shards
from web_server import server, url

from ssl_pretrain.data.images import UnreachableSource
from ssl_pretrain.data.tar import remote_errors
from ssl_pretrain.data.tar.remote_errors import printable_url
from ssl_pretrain.system.optional_packages import install_hint

MISSING = [name for name in ("fsspec", "aiohttp") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}, of the extra remote"
)


def open_url(url: str, tmp_path: Path):
    return open_shards(url, cache_dir=str(tmp_path / "cache"))


def test_short_answers_are_requested_again(server, url, tmp_path):
    server.num_short_answers = 1
    source = open_url(url, tmp_path)
    server.num_short_answers = 2
    assert [source.read_bytes(k) for k in range(5)] == [JPEG + b"%d" % k for k in range(5)]


def test_a_server_without_ranges_is_refused(server, url, tmp_path):
    source = open_url(url, tmp_path)
    server.supports_ranges = False
    with pytest.raises(UnreachableSource) as error:
        source.read_bytes(0)
    assert str(error.value) == (
        f"data.root: the server of {url} sent {len(server.objects['/a.tar']):,} bytes for a range "
        f"of {len(JPEG) + 1:,}, so it does not support ranges; use another server, or download the "
        "shards"
    )


def test_a_server_that_never_supports_ranges_is_refused(server, url, tmp_path):
    server.supports_ranges = False
    server.objects["/a.tar"] += bytes(9 << 20)  # more than a request for the index
    with pytest.raises(UnreachableSource) as error:
        open_url(url, tmp_path)
    assert str(error.value) == (
        f"data.root: the server of {url} sent 9,447,424 bytes for a range of 8,388,608, so it does "
        "not support ranges; use another server, or download the shards"
    )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "xyz://b/a.tar",
            "xyz:// is unknown; give a path, or a URL that begins with s3://, gs://, hf:// or "
            "https://",
        ),
        (
            "https:///a.tar",
            "https:///a.tar names no bucket or server; give one, as in https://NAME/train.tar",
        ),
        ("hf://", "hf:// names no bucket or server; give one, as in hf://NAME/train.tar"),
        pytest.param(
            "ftp://host/a.tar",
            "ftp:// needs options (FTPFileSystem.__init__() missing 1 required positional "
            "argument: 'host'); set them for fsspec, as in FSSPEC_FTP_HOST, or give a URL that "
            "begins with s3://, gs://, hf:// or https://",
            marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
        ),
    ],
)
def test_addresses_that_no_package_reads_are_refused(address, message, tmp_path):
    with pytest.raises(UnreachableSource) as error:
        open_url(address, tmp_path)
    assert str(error.value) == f"data.root: {message}"


@pytest.mark.parametrize("status", [401, 403])
def test_a_denied_object_is_named_without_its_signature(status, server, url, tmp_path):
    server.status = status
    with pytest.raises(UnreachableSource) as error:
        open_url(f"{url}?X-Signature=secret", tmp_path)
    assert str(error.value) == (
        f"data.root: access to {url} is denied; check that the credentials may read it (give a URL "
        "that needs no login)"
    )


def test_a_missing_object_is_named(url, tmp_path):
    missing = url.replace("a.tar", "b.tar")
    with pytest.raises(UnreachableSource) as error:
        open_url(missing, tmp_path)
    assert str(error.value) == (
        f"data.root: {missing} does not exist; check the name and the credentials, because some "
        "stores answer like this without permission"
    )


def test_a_signed_url_is_read_and_its_signature_never_shown(url, tmp_path):
    source = open_url(f"{url}?X-Signature=secret", tmp_path)
    assert source.read_bytes(3) == JPEG + b"3"
    assert "secret" not in source.name(3) + source.full_path + " ".join(source.notes)
    assert printable_url("s3://user:word@host/x.tar") == "s3://host/x.tar"


@pytest.mark.full
def test_a_missing_package_is_named_with_its_extra():
    packages = [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp"), ("s3", "fsspec")]
    program = (
        "import sys; from ssl_pretrain.data.tar import remote_store\n"
        f"for protocol, package in {packages}:\n"
        " sys.modules[package] = None\n"
        " try: remote_store.stat(f'{protocol}://b/a.tar')\n"
        " except ValueError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(path or "." for path in sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [
        f"data.root: {protocol}:// is read by the package {package}, which is not installed; "
        f"{install_hint('gcs' if protocol == 'gs' else 'remote')}"
        for protocol, package in packages
    ]


def test_errors_of_stores_are_told_apart():
    class NoCredentialsError(Exception):
        pass

    class HTTPError(OSError):
        def __init__(self, status: int):
            super().__init__("failed")
            self.status = status

    def message(error: Exception) -> str:
        permanent = remote_errors.permanent_error("gs://b/a.tar", error)
        return str(permanent) if permanent is not None else "try again"

    assert message(NoCredentialsError()) == (
        "data.root: gs://b/a.tar needs credentials, and none were found; set "
        "GOOGLE_APPLICATION_CREDENTIALS"
    )
    assert message(HTTPError(416)) == (
        "data.root: gs://b/a.tar has changed since its index was made: it has become shorter; "
        "restore the object, or start a new run, which makes the index again"
    )
    for passing in (HTTPError(503), HTTPError(429), ConnectionResetError(), TimeoutError()):
        assert message(passing) == "try again"
