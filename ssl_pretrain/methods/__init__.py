"""Methods, each found by the name of its file.

`method.name: simclr` is methods/simclr.py. There is no list to edit.
"""

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """Return the sorted names of all methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def find(name: str) -> ModuleType:
    """Return the module of a method, whose `Config` builds it.

    Raises:
        ValueError: There is no such method. The message lists all.
    """
    if name not in names():
        raise ValueError(
            f"method.name: {name!r} is not a method; choose one of: {', '.join(names())}"
        )
    return importlib.import_module(f"{__name__}.{name}")
