"""Read the settings that a run saved in its config.yaml, without checking or completing them."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

FILE_NAME = "config.yaml"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is ten times faster


def read(run: Path) -> dict[str, Any]:
    """Return the nested settings of a run, or none if it has no config.yaml.

    Raises:
        ValueError: If the file cannot be read, or is not YAML.
    """
    path = run / FILE_NAME
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _damaged(path, f"cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict | None):
        raise _damaged(path, f"has a {type(settings).__name__} instead of keys and values")
    return settings or {}


def read_if_intact(run: Path) -> dict[str, Any]:
    """Return the nested settings of a run, or none if its config.yaml is missing or damaged."""
    with suppress(ValueError):
        return read(run)
    return {}


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"{path}: {problem}; restore it from a copy, or from a run with the same settings"
    )
