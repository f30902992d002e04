"""Methods, found by their file's name: `method.name: simclr` is methods/simclr.py. There is no list to edit."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def find(name: str) -> ModuleType:
    """The module of method `name`, whose `Config` builds it.

    Raises:
        ValueError: no such method; lists those there are.
    """
    if name not in names():
        raise ValueError(
            f"method.name: {name!r} is not a method; choose one of: {', '.join(names())}"
        )
    return importlib.import_module(f"{__name__}.{name}")
