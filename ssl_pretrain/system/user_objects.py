"""Find the methods, data sets and backbones that users write in Python.

A configuration names them as `package.module` or `package.module:function`. An object that a
program passes to `ssl_pretrain.pretrain` has the name `object:NAME` while it is provided.
"""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

OBJECT_PREFIX = "object:"

_objects: dict[str, Any] = {}  # provided objects by name


@contextmanager
def provide(objects: Mapping[str, Any]) -> Iterator[None]:
    """Let configurations refer to objects of this program as `object:NAME`.

    Args:
        objects: The objects by name, without the prefix.
    """
    previous_objects = dict(_objects)
    _objects.update(objects)
    try:
        yield
    finally:
        _objects.clear()
        _objects.update(previous_objects)


def find_object(reference: str, key: str) -> Any:
    """Return the object that `package.module:name` or `object:NAME` refers to.

    Args:
        reference: The value of the key.
        key: Name of the key, for messages.

    Raises:
        ValueError: If there is no such object.
    """
    module_name, _, name = reference.partition(":")
    if reference.startswith(OBJECT_PREFIX):
        if name not in _objects:
            raise ValueError(
                f"{key}: {reference!r} was an object of the program that started this run; call "
                "ssl_pretrain there, or put it into a module and give its function as "
                "package.module:function"
            )
        return _objects[name]
    module = import_user_module(module_name, key)
    if not hasattr(module, name):
        raise ValueError(
            f"{key}: {reference!r}: {module.__file__} has no {name!r}; give the name of a function "
            "or class in it, as package.module:function"
        )
    return getattr(module, name)


def import_user_module(name: str, key: str) -> ModuleType:
    """Import a module of the user's from the Python path or the current folder.

    Raises:
        ValueError: If the module does not exist or its import fails.
    """
    if os.getcwd() not in sys.path:  # a console script's path lacks the current folder
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{key}: there is no module {error.name!r} in {os.getcwd()} or the Python path; "
                "start in the folder that contains it, or add that folder to PYTHONPATH"
            ) from None
        raise ValueError(f"{key}: the import of {name} fails: {error}") from error
    except Exception as error:  # a user's module can raise anything
        raise ValueError(
            f"{key}: the import of {name} fails: {type(error).__name__}: {error}"
        ) from error
