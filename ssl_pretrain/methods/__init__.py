"""Methods, each found by the name of its file.

`method.name: simclr` is methods/simclr.py. There is no list to edit. A name with a dot, such as
`my_package.my_method`, or of a file in the current folder is a module of the user's.
"""

import dataclasses
import importlib
import pkgutil
from types import ModuleType

from ssl_pretrain.schema.method_name import is_user_module, unknown_method_error
from ssl_pretrain.system.user_objects import import_user_module

_SHARED = ("base", "image_text_pairs")  # modules that methods share


def names() -> list[str]:
    """Return the sorted names of the methods in this package."""
    modules = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(modules - set(_SHARED))


def image_methods() -> list[str]:
    """Return the sorted names of the methods that learn from images alone, without texts."""
    from ssl_pretrain.methods.base import SentenceMethodConfig, TextMethodConfig

    takes_texts = (TextMethodConfig, SentenceMethodConfig)
    return [name for name in names() if not issubclass(find(name).Config, takes_texts)]


def find(name: str) -> ModuleType:
    """Return the module of a method, whose `Config` builds it.

    Raises:
        ValueError: If there is no such method, or the user's module has no proper `Config`.
    """
    if is_user_module(name, names()):
        module = import_user_module(name, "method.name")
        _check_config(module)
        return module
    if name not in names():
        raise unknown_method_error(name, names())
    return importlib.import_module(f"{__name__}.{name}")


def _check_config(module: ModuleType) -> None:
    """Raise ValueError unless the module has a `Config` that builds a method."""
    from ssl_pretrain.methods.base import MethodConfig, SentenceMethodConfig, TextMethodConfig

    config = getattr(module, "Config", None)
    remedy = "see CONTRIBUTING.md, `Add a method`"
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise ValueError(
            f"method.name: {module.__name__} has no class Config that extends "
            f"ssl_pretrain.methods.base.MethodConfig; {remedy}"
        )
    if "__dataclass_fields__" not in vars(config) or not dataclasses.is_dataclass(config):
        raise ValueError(
            f"method.name: {module.__name__}.Config is not a dataclass; put @dataclass above it"
        )
    signatures: dict[type[MethodConfig], tuple[str, str]] = {
        TextMethodConfig: ("build_with_texts", "backbone, text_encoder"),
        SentenceMethodConfig: ("build_for_sentences", "text_encoder"),
        MethodConfig: ("build", "backbone"),
    }
    base = next(base for base in signatures if issubclass(config, base))
    name, arguments = signatures[base]
    if getattr(config, name) is getattr(base, name):
        raise ValueError(
            f"method.name: {module.__name__}.Config has no method {name}({arguments}) that returns "
            f"the method; {remedy}"
        )
