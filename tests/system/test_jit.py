"""numba's cache on disk: used while it is whole, written anew where it is not."""

from __future__ import annotations

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
def compiled(tmp_path, monkeypatch):
    """Load a module with one cached function anew, as a new process would."""
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


def flipped(content: bytes, place: float) -> bytes:
    at = int(place * (len(content) - 1))
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES = {
    "no bytes": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "its first bit": lambda content: flipped(content, 0.0),
    "a bit in the middle": lambda content: flipped(content, 0.5),
    "its last bit": lambda content: flipped(content, 1.0),
    "another program's": lambda content: b"not a pickle\n" * 9,
}


def test_a_whole_cache_is_used(compiled):
    load, files = compiled
    assert [path.suffix for path in files] == [".nbc", ".nbi"]
    assert load() == 1


@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_written_anew(compiled, kind, damage):
    load, files = compiled
    (path,) = (path for path in files if path.suffix == kind)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert load() == 0
    assert load() == 1


def test_a_folder_in_the_place_of_a_file_costs_time_only(compiled):
    load, files = compiled
    for path in files:
        path.unlink()
        path.mkdir()
    assert load() == 0


def test_without_any_place_for_a_cache_functions_are_compiled_in_memory(tmp_path, monkeypatch):
    from numba.core import caching

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", _refuse)
    path = tmp_path / "triple.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("triple", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.triple(14) == 42


def _refuse(locator) -> None:
    raise PermissionError(os.strerror(13))
