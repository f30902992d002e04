"""Read objects of a store through fsspec, and repeat what fails for a passing reason."""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ssl_pretrain.data.tar.remote_errors import (
    changed_error,
    check_has_host,
    describe,
    missing_package_error,
    no_range_error,
    outage_error,
    permanent_error,
    printable_url,
    protocol_of,
    unknown_protocol_error,
    unset_option_error,
)
from ssl_pretrain.data.tar.shard_index import Shard

T = TypeVar("T")
NUM_ATTEMPTS = 10  # with the delays below, a server may be away for a minute
_NUM_OPENING_ATTEMPTS = 6  # six seconds, because a wrong address is likelier before a run
_FIRST_DELAY_SECONDS = 0.2
_MAX_DELAY_SECONDS = 20.0
_NUM_SILENT_ATTEMPTS = 3
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
# Keys of fsspec's file information that change with the content, in the order of preference.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "mtime", "LastModified")


class ShortRead(OSError):
    """Error for a response with fewer bytes than were requested."""


def is_remote(path: str) -> bool:
    """Return True for a URL such as `s3://bucket/train.tar`."""
    return "://" in path


def stat(url: str, num_attempts: int = _NUM_OPENING_ATTEMPTS) -> Shard:
    """Return the size and the version of an object.

    Args:
        url: Address of the object.
        num_attempts: Number of attempts.

    Raises:
        UnreachableSource: If the object is absent or cannot be read.
    """

    def read_information() -> Shard:
        file_system, path = _open(url)
        file_system.invalidate_cache()
        information = file_system.info(path)
        if information.get("type") == "directory":
            raise FileNotFoundError(path)
        versions = (information.get(key) for key in _VERSION_KEYS)
        version = next((str(value) for value in versions if value), "")
        if information.get("size") is None:
            raise changed_error(url, "the server does not state its size")
        return Shard(url, int(information["size"]), version)

    return retry(url, read_information, num_attempts)


def list_names(url: str) -> list[tuple[str, bool]]:
    """Return the names in a folder of a store, and whether each one is a folder. Sorted.

    Raises:
        UnreachableSource: If the folder is absent or cannot be read.
    """

    def read_list() -> list[tuple[str, bool]]:
        file_system, path = _open(url)
        file_system.invalidate_cache()
        entries = file_system.ls(path, detail=True)
        own_name = path.rstrip("/")
        return sorted(
            (os.path.basename(entry["name"].rstrip("/")), entry["type"] == "directory")
            for entry in entries
            if entry["name"].rstrip("/") != own_name  # a marker object of the folder itself
        )

    return retry(url, read_list, _NUM_OPENING_ATTEMPTS)


def read_object(url: str) -> bytes:
    """Return the whole content of a small object.

    Raises:
        UnreachableSource: If the object is absent or cannot be read.
    """

    def read() -> bytes:
        file_system, path = _open(url)
        return file_system.cat_file(path)

    return retry(url, read)


def read_range(shard: Shard, offset: int, num_bytes: int) -> bytes:
    """Return a range of a shard's bytes, all of them.

    Raises:
        UnreachableSource: If the shard is absent, cannot be read, or has changed.
    """
    if not num_bytes:
        return b""

    def read() -> bytes:
        file_system, path = _open(shard.path)
        content = file_system.cat_file(
            path, start=offset, end=offset + num_bytes, **_read_options(shard.path)
        )
        if len(content) > num_bytes:
            raise no_range_error(shard.path, len(content), num_bytes)
        if len(content) < num_bytes:
            check_unchanged(shard)
            raise ShortRead(f"{len(content):,} of {num_bytes:,} bytes arrived")
        return content

    return retry(shard.path, read)


def check_unchanged(shard: Shard) -> None:
    """Raise UnreachableSource if a shard is absent or has another size or version."""
    now = stat(shard.path, NUM_ATTEMPTS)
    if now.size != shard.size:
        raise changed_error(shard.path, f"it has {now.size:,} instead of {shard.size:,} bytes")
    if now.version != shard.version:
        raise changed_error(shard.path, "it has another version")


def retry(url: str, action: Callable[[], T], num_attempts: int = NUM_ATTEMPTS) -> T:
    """Return the result of an action, which is repeated after errors that may pass.

    Raises:
        UnreachableSource: If the error is permanent, or occurs in every attempt.
    """
    start, delay = time.monotonic(), _FIRST_DELAY_SECONDS
    for attempt in range(1, num_attempts + 1):
        try:
            return action()
        except Exception as error:  # every file system has its own exceptions
            permanent = permanent_error(url, error)
            if permanent is not None:
                raise permanent from None
            if attempt == num_attempts:
                seconds = time.monotonic() - start
                raise outage_error(url, error, num_attempts, seconds) from None
            if attempt > _NUM_SILENT_ATTEMPTS:
                print(
                    f"{printable_url(url)}: attempt {attempt} of {num_attempts} failed with "
                    f"{describe(error)}; trying again in {delay:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(delay)
        delay = min(2 * delay, _MAX_DELAY_SECONDS)
    raise AssertionError("the last attempt returns or raises")


def _read_options(url: str) -> dict[str, str]:
    # The file system of the Hub would read 5 MiB more than each image.
    return {"cache_type": "none"} if protocol_of(url) == "hf" else {}


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the object's path in it."""
    check_has_host(url)
    file_system = _file_system(protocol_of(url))
    return file_system, file_system._strip_protocol(url)


@functools.cache
def _file_system(protocol: str) -> Any:
    """Return the file system of a protocol. Every process opens its own."""
    url = f"{protocol}://"
    try:
        import fsspec
    except ImportError:
        raise missing_package_error(url, "fsspec") from None
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol == "s3":
        timeouts = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
        options["config_kwargs"] = timeouts | {"retries": {"max_attempts": 1}}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS
            )
            options["client_kwargs"] = {"timeout": timeout}
        return fsspec.filesystem(protocol, **options)
    except ImportError:
        raise missing_package_error(url) from None
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise unknown_protocol_error(protocol) from None
    except TypeError as error:  # such as a missing argument of the constructor
        raise unset_option_error(protocol, error) from None
