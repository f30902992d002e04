"""Compile functions with numba, and cache them on disk if possible.

numba raises an error if it has no writable folder for its cache, or if a cache file is empty,
damaged or not writable. A cache only saves time, so none of these errors may end a run. This
module chooses a folder for the cache before numba is imported, and treats a file with a wrong
checksum as absent. All modules of the project import `njit` from this module.
"""

import hashlib
import io
import os
import pickle
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.system.import_path import PACKAGE

# Folders of the modules with cached functions. numba keeps each cache in their `__pycache__`.
FOLDERS_WITH_CACHED_FUNCTIONS = (
    PACKAGE,
    PACKAGE / "views",
    PACKAGE / "data" / "native",
    PACKAGE / "eval",
)
CACHE_VARIABLE = "NUMBA_CACHE_DIR"
CHECKSUM_BYTES = hashlib.sha256().digest_size


def choose_cache_folder() -> None:
    """Set NUMBA_CACHE_DIR to a private temporary folder if no other folder can be written to.

    numba's own choices come first: NUMBA_CACHE_DIR, the `__pycache__` folders of the source, and
    the user's cache folder. Worker processes inherit the choice.
    """
    if os.environ.get(CACHE_VARIABLE):
        has_folder = _is_writable(Path(os.environ[CACHE_VARIABLE]))
    else:
        folders = [folder for folder in FOLDERS_WITH_CACHED_FUNCTIONS if folder.is_dir()]
        is_source_writable = all(_is_writable(folder / "__pycache__") for folder in folders)
        has_folder = is_source_writable or _is_writable(_user_cache())
    if not has_folder:
        try:
            os.environ[CACHE_VARIABLE] = str(make_private_folder())
        except OSError:  # without any folder, functions are compiled in memory
            os.environ.pop(CACHE_VARIABLE, None)


def make_private_folder() -> Path:
    """Create or reuse a temporary folder that only this user can write to.

    Cached machine code is executed, so it must not come from another user. If the usual folder is
    not private, this process creates a new one.
    """
    if not hasattr(os, "geteuid"):  # Windows, whose temporary folder belongs to the user
        return Path(tempfile.mkdtemp(prefix="ssl_pretrain-numba-"))
    folder = Path(tempfile.gettempdir()) / f"ssl_pretrain-numba-{os.geteuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    with suppress(OSError):
        status = folder.lstat()
        is_private = stat.S_ISDIR(status.st_mode) and not stat.S_IMODE(status.st_mode) & 0o077
        if is_private and status.st_uid == os.geteuid() and _is_writable(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="ssl_pretrain-numba-"))


def _user_cache() -> Path:
    """Return the folder in the user's home that numba would use."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "numba" if os.path.isabs(base) else Path(os.devnull)  # never writable


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


choose_cache_folder()

import numba  # noqa: E402  # NUMBA_CACHE_DIR is read when numba is imported
from numba.core import caching  # noqa: E402

if CACHE_VARIABLE in os.environ:
    # The environment variable has no effect if numba was imported before this module.
    numba.config.CACHE_DIR = os.environ[CACHE_VARIABLE]  # type: ignore[attr-defined]


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function as `numba.njit` does, with a cache whose errors never end the process."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            dispatcher = numba.njit(cache=cache, **options)(function)
        except (RuntimeError, OSError):  # there is no folder for a cache
            return numba.njit(**options)(function)
        if cache and hasattr(dispatcher, "_cache"):  # else NUMBA_DISABLE_JIT is set
            dispatcher._cache._cache_file.__class__ = CheckedCacheFile
        return dispatcher

    return decorate


class CheckedCacheFile(caching.IndexDataCacheFile):
    """The two files that numba caches for a function, each followed by its SHA-256.

    numba's own reader stops before the checksum, so numba and this class can read each other's
    files.
    """

    def load(self, key: Any) -> Any:
        """Return the cached code, or None if it is absent or damaged."""
        try:
            return super().load(key)
        except Exception:  # a damaged pickle can raise anything
            return None

    def save(self, key: Any, data: Any) -> None:
        """Write the code to the cache. If the disk is full, the code is only in memory."""
        with suppress(OSError):
            super().save(key, data)

    def _load_index(self) -> dict[Any, str]:
        try:
            stream = io.BytesIO(_read_verified(Path(self._index_path)))
            if pickle.load(stream) != self._version:
                return {}
            stamp, overloads = pickle.load(stream)
            return overloads if stamp == self._source_stamp else {}
        except Exception:
            return {}

    def _load_data(self, name: str) -> Any:
        return pickle.loads(_read_verified(Path(self._data_path(name))))

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        buffer = io.BytesIO()
        with super()._open_for_write(filepath) as file:
            yield buffer
            content = buffer.getvalue()
            file.write(content + hashlib.sha256(content).digest())


def _read_verified(path: Path) -> bytes:
    """Return the content of a file without its checksum.

    Raises:
        OSError: If the file is absent, damaged, or was not written by this module.
    """
    data = path.read_bytes()
    content, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        raise OSError(f"{path} is damaged")
    return content
