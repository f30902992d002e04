"""Checks of single values that the sections of a configuration share."""

from typing import Any, Literal, cast, get_args, get_origin

from ssl_pretrain.schema.settings import field_types


def check_choices(section: Any, key: str) -> None:
    """Raise ValueError unless every field with listed choices has one of them.

    Values from a YAML file have been checked before. This is for values set in Python.

    Args:
        section: A configuration dataclass. Its nested sections are not checked.
        key: Dotted key of the section, for messages.
    """
    for name, kind in field_types(cast(type, type(section))).items():
        value = getattr(section, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(
                f"{key}.{name}: {value!r} is not known; choose one of: {', '.join(get_args(kind))}"
            )


def check_range(key: str, values: list[float], highest: float = float("inf")) -> None:
    """Raise ValueError unless the values are [low, high] with 0 < low <= high <= highest."""
    if len(values) != 2 or not 0 < values[0] <= values[1] <= highest:
        bound = f" <= {highest:g}" if highest < float("inf") else ""
        raise ValueError(
            f"{key}: {values} is not a range; give [low, high] with 0 < low <= high{bound}"
        )
