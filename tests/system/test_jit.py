"""An intact file in numba's cache on disk is used, and a damaged one is written again."""

import importlib.util
import os

import numba
import pytest

MODULE = """
from ssl_pretrain.system.jit import njit

@njit(cache=True, nogil=True)
def triple(x):
    return 3 * x
"""


@pytest.fixture
def cached_module(tmp_path, monkeypatch):
    """Return a function that loads a module as a new process would, and the module's cache files.

    The module has one cached function. Loading returns the number of cache hits.
    """
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "triple.py"
    path.write_text(MODULE)

    def load():
        spec = importlib.util.spec_from_file_location("triple", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.triple(14) == 42
        return sum(module.triple.stats.cache_hits.values())

    assert load() == 0
    return load, sorted((tmp_path / "cache").rglob("*.nb?"))


def flip_bit(content: bytes, fraction: float) -> bytes:
    position = int(fraction * (len(content) - 1))
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "first bit": lambda content: flip_bit(content, 0.0),
    "middle bit": lambda content: flip_bit(content, 0.5),
    "last bit": lambda content: flip_bit(content, 1.0),
    "of another program": lambda content: b"not a pickle\n" * 9,
}


def test_an_intact_cache_is_used(cached_module):
    load, files = cached_module
    assert [path.suffix for path in files] == [".nbc", ".nbi"]
    assert load() == 1


@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_written_again(cached_module, kind, damage):
    load, files = cached_module
    (path,) = (path for path in files if path.suffix == kind)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert load() == 0
    assert load() == 1


def test_a_folder_in_place_of_a_file_only_costs_time(cached_module):
    load, files = cached_module
    for path in files:
        path.unlink()
        path.mkdir()
    assert load() == 0


def test_without_a_folder_for_the_cache_functions_are_compiled_in_memory(tmp_path, monkeypatch):
    from numba.core import caching

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", refuse)
    path = tmp_path / "triple.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("triple", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.triple(14) == 42


def refuse(locator) -> None:
    raise PermissionError(os.strerror(13))
