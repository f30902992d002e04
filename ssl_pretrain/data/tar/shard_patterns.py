"""Paths, URLs and brace patterns of shards, such as `train-{000000..000146}.tar`."""

import itertools
import os
import re
from urllib.parse import urlsplit

from ssl_pretrain.data.tar.remote_errors import printable_url
from ssl_pretrain.data.tar.remote_store import is_remote
from ssl_pretrain.data.tar.tar_members import compressed_error

_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_SHARDS = 1_000_000
_COMPRESSED_SUFFIXES = {
    ".tar.gz": ("gzip", "gunzip"),
    ".tgz": ("gzip", "gunzip"),
    ".tar.bz2": ("bzip2", "bunzip2"),
    ".tar.xz": ("xz", "unxz"),
    ".tar.zst": ("zstd", "unzstd"),
}


def is_pattern(path: str) -> bool:
    """Return True for the path, URL or brace pattern of tars, compressed ones included."""
    path = path_of(path)
    return path.lower().endswith((".tar", *_COMPRESSED_SUFFIXES))


def expand_braces(pattern: str) -> list[str]:
    """Return the paths that a pattern such as `{000..146}` or `{a,b}` stands for.

    Raises:
        ValueError: If a range is invalid.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    content = match[1]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", content)
    if bounds is not None:
        first, last = int(bounds[1]), int(bounds[2])
        if not first <= last < first + _MAX_SHARDS:
            raise ValueError(
                f"data.root: {printable_url(pattern)} has the invalid range {{{content}}}; give "
                "the lower number first, as in {000000..000146}"
            )
        values = [f"{number:0{len(bounds[1])}d}" for number in range(first, last + 1)]
    else:
        values = content.split(",")
    heads = [pattern[: match.start()] + value for value in values]
    tails = expand_braces(pattern[match.end() :])
    return [head + tail for head, tail in itertools.product(heads, tails)]


def join(folder: str, name: str) -> str:
    """Return the path or the URL of a name in a folder."""
    if is_remote(folder):
        return f"{folder.rstrip('/')}/{name}"
    return os.path.join(folder, name)


def path_of(path: str) -> str:
    """Return the path of a URL, without the server and the signature, or the given path."""
    return urlsplit(path).path if is_remote(path) else path


def folder_of(path: str) -> str:
    """Return the folder of a path or URL."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))


def refuse_compressed(pattern: str) -> None:
    """Raise ValueError if the suffix of a path or pattern is that of a compressed tar."""
    path = path_of(pattern).lower()
    for suffix, (name, command) in _COMPRESSED_SUFFIXES.items():
        if path.endswith(suffix):
            raise compressed_error(printable_url(pattern), name, command)
