"""Write the type, default, unit and range of a key as text."""

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from ssl_pretrain.schema.key_entries import CHOICE
from ssl_pretrain.schema.settings import DIMENSIONLESS, MAX_INT

ON_RESUME = {
    "same": "A resumed run must keep this value.",
    "free": "A resumed run may change this value.",
    "warn": "A resumed run may change this value, with a warning.",
}
_MAX_NAME_WIDTH = 34  # characters; a longer name gets a line of its own


def describe_type(entry: Mapping[str, Any]) -> str:
    """Return the type of a key, or its allowed values."""
    choices = " | ".join(choice or repr(choice) for choice in entry.get("choices", ()))
    return str(entry["type"]).replace(CHOICE, choices)


def format_default(entry: Mapping[str, Any]) -> str:
    """Return the default of a key in YAML's spelling, or `none` for a key that must be set."""
    value = entry["default"]
    words: dict[Any, str] = {None: "null", True: "true", False: "false", "": "empty", "???": "none"}
    if isinstance(value, (str, bool, type(None))):
        return words.get(value, str(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_range(entry: Mapping[str, Any]) -> str:
    """Return the unit and the range of a number in two sentences, or an empty text."""
    if "bounds" not in entry:
        return ""
    bounds = entry["bounds"]
    allowed = f"{'>' if bounds['open_low'] else '>='} {_format_number(bounds['low'])}"
    if bounds["high"] not in (None, MAX_INT):
        allowed += f" and {'<' if bounds['open_high'] else '<='} {_format_number(bounds['high'])}"
    unit = entry["unit"]
    name = "Dimensionless" if unit == DIMENSIONLESS else f"Unit: {unit}"
    return f"{name}. Allowed: {allowed}."


def _format_number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def text_width() -> int:
    """Return the width of help texts in characters: the terminal's, but from 60 to 100."""
    return min(max(shutil.get_terminal_size().columns, 60), 100)


def format_rows(rows: Mapping[str, str]) -> str:
    """Return names and texts in two columns that fit the terminal."""
    column = min(max(map(len, rows), default=0), _MAX_NAME_WIDTH) + 2
    lines = []
    for name, text in rows.items():
        wrapped = textwrap.wrap(text, text_width() - column, break_on_hyphens=False)
        if len(name) + 2 > column:
            lines.append(name)
        else:
            lines.append(f"{name:{column}}{wrapped.pop(0) if wrapped else ''}".rstrip())
        lines += [" " * column + line for line in wrapped]
    return "\n".join(lines)
