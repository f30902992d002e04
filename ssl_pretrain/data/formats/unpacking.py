"""Unpack compressed data once into the cache folder, because single images are read from it.

The name of the copy contains a digest of the path, size and date of its origin, so a changed origin
gets another copy. Old copies are kept, because a run on another machine may still read them.
"""

import gzip
import hashlib
import os
import pickle
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ssl_pretrain.data.listing import change_stamp, open_atomically

_BLOCK_BYTES = 1 << 20
_DAMAGE = (
    *(gzip.BadGzipFile, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError),
    *(pickle.UnpicklingError, KeyError, NotImplementedError, RuntimeError),
)


def unpack_once(
    origin: Path, part: str, suffix: str, cache_dir: Path, write: Callable[[IO[bytes]], None]
) -> Path:
    """Return the unpacked copy of a file or of a part of it, which is written if it is absent.

    Args:
        origin: The compressed file, or a folder of files.
        part: Name of the part, such as an array.
        suffix: Suffix of the copy.
        cache_dir: Folder of the copy.
        write: Function that writes the unpacked content to a file.

    Raises:
        ValueError: If the origin is damaged or the cache cannot be written.
    """
    identity = os.fsencode(os.path.abspath(origin)) + b"\0" + part.encode(errors="surrogateescape")
    stamp = repr(change_stamp(os.stat(origin))).encode()
    digest = hashlib.sha256(identity + b"\0" + stamp).hexdigest()[:24]
    path = cache_dir / f"unpacked-{digest}{suffix}"
    if path.exists():
        return path
    print(f"unpacking {origin} to {path} (once)", file=sys.stderr, flush=True)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open_atomically(path) as file:
            write(file)
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"data.root: {origin} is damaged ({reason}); copy it again") from error
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: {origin} has to be unpacked once, and {cache_dir} cannot be written "
            f"({error.strerror or error}); set data.cache_dir to a folder with free space"
        ) from error
    return path


def copy_exactly(source: IO[bytes], target: IO[bytes], num_bytes: int, name: str) -> None:
    """Copy this many bytes. Raise ValueError if the source has fewer."""
    num_left = num_bytes
    while num_left and (block := source.read(min(num_left, _BLOCK_BYTES))):
        target.write(block)
        num_left -= len(block)
    if num_left:
        raise ValueError(
            f"data.root: {name} is truncated; it has {num_bytes - num_left:,} bytes of values, and "
            f"its header promises {num_bytes:,}; copy it again"
        )
