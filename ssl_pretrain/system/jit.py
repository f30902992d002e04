"""Machine code by numba, cached on disk where that is possible and compiled again where it is not.

numba refuses to start where no folder for its cache can be written to, and raises where a cached
file is empty, damaged or cannot be written. A cache only saves time, so none of these may end a
run: this module finds a place for the cache before numba is imported, and treats a file that
fails its checksum as absent. All modules of the project take ``njit`` from here.
"""

from __future__ import annotations

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

# Folders with cached functions. numba keeps the cache of each in its __pycache__.
CACHED = (PACKAGE, PACKAGE / "views", PACKAGE / "data" / "native", PACKAGE / "eval")
VARIABLE = "NUMBA_CACHE_DIR"


def place_cache() -> None:
    """Set NUMBA_CACHE_DIR to a private temporary folder where nothing else can be written to.

    The places that numba itself would take come first: NUMBA_CACHE_DIR, the ``__pycache__``
    folders beside the source, and the user's cache folder. Worker processes inherit the choice.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        usable = _is_writable(Path(chosen))
    else:
        beside = all(_is_writable(folder / "__pycache__") for folder in CACHED if folder.is_dir())
        usable = beside or _is_writable(_user_cache())
    if usable:
        return
    with suppress(OSError):  # without any folder everything is compiled in memory
        os.environ[VARIABLE] = str(private_folder())
        return
    os.environ.pop(VARIABLE, None)


def private_folder() -> Path:
    """Create or find a folder of the temporary directory that only this user can write to.

    Cached machine code is executed, so a folder that another user made under this name is not
    taken. Without a trustworthy one this process gets a fresh folder.
    """
    folder = Path(tempfile.gettempdir()) / f"ssl_pretrain-numba-{os.geteuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    with suppress(OSError):
        found = folder.lstat()
        private = stat.S_ISDIR(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
        if private and found.st_uid == os.geteuid() and _is_writable(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="ssl_pretrain-numba-"))


def _user_cache() -> Path:
    """The folder that numba would take in the user's home; a relative one never counts."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "numba" if os.path.isabs(base) else Path(os.devnull)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


place_cache()

import numba  # noqa: E402  # NUMBA_CACHE_DIR is read when numba is imported
from numba.core import caching  # noqa: E402

if VARIABLE in os.environ:
    # numba may have been imported before.
    numba.config.CACHE_DIR = os.environ[VARIABLE]  # type: ignore[attr-defined]


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function as ``numba.njit`` does, with a cache that never stops a start."""

    def compile_when_called(function: Callable[..., Any]) -> Any:
        if not cache:
            return numba.njit(**options)(function)
        try:
            dispatcher = numba.njit(cache=True, **options)(function)
        except (RuntimeError, OSError):  # no place for a cache
            return numba.njit(**options)(function)
        if hasattr(dispatcher, "_cache"):  # absent under NUMBA_DISABLE_JIT
            dispatcher._cache._cache_file.__class__ = CheckedCacheFile
        return dispatcher

    return compile_when_called


class CheckedCacheFile(caching.IndexDataCacheFile):
    """numba's two files of a cached function, each followed by the SHA-256 of its content.

    numba's own reader stops before the checksum, so both kinds of files can be read by both.
    """

    def load(self, key: Any) -> Any:
        try:
            return super().load(key)
        except Exception:  # a pickle that is damaged can raise anything
            return None

    def save(self, key: Any, data: Any) -> None:
        try:
            super().save(key, data)
        except OSError:  # a full disk: the code stays in memory
            return

    def _load_index(self) -> dict[Any, str]:
        try:
            content = _unsealed(Path(self._index_path))
            stream = io.BytesIO(content)
            if pickle.load(stream) != self._version:
                return {}
            stamp, overloads = pickle.load(stream)
            return overloads if stamp == self._source_stamp else {}
        except Exception:
            return {}

    def _load_data(self, name: str) -> Any:
        return pickle.loads(_unsealed(Path(self._data_path(name))))

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        with super()._open_for_write(filepath) as file:
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def _unsealed(path: Path) -> bytes:
    """Content of a file whose checksum is right.

    Raises:
        OSError: The file is absent, damaged, or not one of ours.
    """
    stored = path.read_bytes()
    content, checksum = stored[:-32], stored[-32:]
    if hashlib.sha256(content).digest() != checksum:
        raise OSError(f"{path} is damaged")
    return content
