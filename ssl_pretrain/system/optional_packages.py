"""Messages about optional packages that are not installed.

Each optional package belongs to an extra of pyproject.toml. No package index has ssl_pretrain, so a
message names the line that works in a clone and the line that works with the wheel.
"""

from importlib.util import find_spec

import ssl_pretrain


def is_installed(module: str) -> bool:
    """Return True if the top-level module can be found. It is not imported.

    A folder of the same name is not the module. W&B writes a folder `wandb` beside the user's data.
    """
    spec = find_spec(module)
    return spec is not None and spec.origin is not None  # None for a folder without __init__.py


def install_hint(extra: str) -> str:
    """Return how to install the packages of an extra, as an imperative without a full stop."""
    wheel = f"ssl_pretrain-{ssl_pretrain.__version__}-py3-none-any.whl"
    return (
        f"install it with `pip install '.[{extra}]'` in a clone, or with "
        f"`pip install '{wheel}[{extra}]'` where the wheel is"
    )


def missing_message(setting: str, package: str, extra: str, alternative: str = "") -> str:
    """Return the message for a setting that needs a package which is not installed.

    Args:
        setting: Configuration key or option that needs the package.
        package: Name of the package.
        extra: Extra of pyproject.toml that has the package.
        alternative: Another remedy, as an imperative, such as "set log.wandb=off".
    """
    remedy = f", or {alternative}" if alternative else ""
    return f"{setting}: {package} is not installed; {install_hint(extra)}{remedy}"


def require(setting: str, package: str, extra: str, alternative: str = "") -> None:
    """Raise ValueError if a package is not installed.

    Args:
        setting: Configuration key or option that needs the package.
        package: Name of the package. Its module has the same name, with "_" instead of "-".
        extra: Extra of pyproject.toml that has the package.
        alternative: Another remedy, as an imperative.

    Raises:
        ValueError: With the message of `missing_message`.
    """
    if not is_installed(package.replace("-", "_")):
        raise ValueError(missing_message(setting, package, extra, alternative))
