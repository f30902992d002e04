"""Declare fields of configuration dataclasses, with help text, resume policy and range.

Command-line options get their types from the same ranges.
"""

import argparse
import dataclasses
import math
import re
import typing
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

MAX_INT = 2**31 - 1  # upper bound of integers whose setting does not declare one

T = TypeVar("T")
ResumePolicy = Literal["same", "free", "warn"]


@dataclass(frozen=True)
class Bounds:
    """Range of a number. Both ends are included unless they are open."""

    low: float = 0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def contains(self, value: float) -> bool:
        """Return True if the value is finite and in the range."""
        respects_low = value > self.low if self.open_low else value >= self.low
        respects_high = value < self.high if self.open_high else value <= self.high
        is_finite = abs(value) < math.inf  # math.isfinite cannot take huge integers
        return is_finite and respects_low and respects_high

    def __str__(self) -> str:
        low = f"{'>' if self.open_low else '>='} {self.low}"
        high = f"{'<' if self.open_high else '<='} {self.high}"
        return low if self.high == math.inf else f"{low} and {high}"


# Ranges of settings that do not declare one, by the name of the setting.
DEFAULT_BOUNDS: tuple[tuple[re.Pattern[str], Bounds], ...] = (
    (re.compile(r"(.*_)?temperature"), Bounds(open_low=True)),
    (re.compile(r"(.*_)?seconds|hours"), Bounds(high=1e9)),
    (re.compile(r"(.*_)?dims?"), Bounds(1, 2**20)),
    (re.compile(r"(.*_)?momentum"), Bounds(high=1)),
    (re.compile(r"(.*_)?(threads|workers)"), Bounds(high=1024)),
    (re.compile(r"port"), Bounds(high=65535)),
    (re.compile(r"k"), Bounds(1, MAX_INT)),
)

DIMENSIONLESS = "dimensionless"
# Units of numbers whose setting does not declare one, by the name of the setting.
DEFAULT_UNITS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(.*_)?epochs?"), "epochs"),
    (re.compile(r"(.*_)?steps"), "steps"),
    (re.compile(r"(.*_)?seconds"), "seconds"),
    (re.compile(r"(.*_)?dims?"), "channels"),
    (re.compile(r"(.*_)?threads"), "threads"),
    (re.compile(r"(.*_)?(momentum|temperature|weight|ratio|factor)"), DIMENSIONLESS),
)


def setting(
    default: T,
    help: str,
    *,
    on_resume: ResumePolicy = "same",
    unit: str = "",
    minimum: float | None = None,
    maximum: float = math.inf,
    above: float | None = None,
    below: float | None = None,
) -> T:
    """Declare a field of a configuration dataclass.

    A number without a declared range has the range of its name in `DEFAULT_BOUNDS`, or else must be
    finite and at least 0.

    Args:
        default: Default value. Each instance gets its own copy of a list, dict or section.
        help: Meaning and special values, in sentences. The unit has its own field.
        on_resume: Policy for a resumed run. "same": the value must not change. "free": it may
            change, because it does not affect what is computed. "warn": it may change, with a
            warning. A section's policy covers all its keys.
        unit: Unit of a number, or `DIMENSIONLESS`. It may be left out if the name of the setting
            has a unit in `DEFAULT_UNITS`.
        minimum: Smallest number allowed.
        maximum: Largest number allowed.
        above: Exclusive lower end, instead of `minimum`.
        below: Exclusive upper end, instead of `maximum`.
    """
    bounds = None
    if (minimum, maximum, above, below) != (None, math.inf, None, None):
        bounds = Bounds(
            low=above if above is not None else minimum or 0,
            high=below if below is not None else maximum,
            open_low=above is not None,
            open_high=below is not None,
        )
    metadata = {"help": help, "on_resume": on_resume, "bounds": bounds, "unit": unit}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def field_metadata(kind: type, name: str) -> Mapping[str, Any]:
    """Return the metadata of a field, inherited where a subclass only changes the default."""
    fields = (getattr(base, "__dataclass_fields__", {}).get(name) for base in kind.__mro__)
    return next((field.metadata for field in fields if field and field.metadata), {})


@cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass, by name."""
    return typing.get_type_hints(kind)


def field_bounds(field: dataclasses.Field[Any]) -> Bounds:
    """Return a field's declared range, else the default for its name, else all numbers from 0."""
    by_name = (bounds for pattern, bounds in DEFAULT_BOUNDS if pattern.fullmatch(field.name))
    return field.metadata.get("bounds") or next(by_name, Bounds())


def field_unit(field: dataclasses.Field[Any]) -> str:
    """Return a field's declared unit, else the unit of its name, else an empty text."""
    by_name = (unit for pattern, unit in DEFAULT_UNITS if pattern.fullmatch(field.name))
    return field.metadata.get("unit") or next(by_name, "")


def check(section: Any, key: str = "") -> None:
    """Check every number and every string in a dataclass and its sections.

    Raises:
        ValueError: If a number is out of range or a string contains a NUL character. The message
            names the key and the value.
    """
    for field in dataclasses.fields(section):
        full_key = f"{key}.{field.name}".lstrip(".")
        _check_value(getattr(section, field.name), full_key, field_bounds(field))


def _check_value(value: Any, key: str, bounds: Bounds) -> None:
    if dataclasses.is_dataclass(value):
        check(value, key)
    elif isinstance(value, str):
        if "\0" in value:
            raise ValueError(
                f"{key}: {value!r} contains a NUL character, which names and paths must not have; "
                "remove it"
            )
    elif isinstance(value, Mapping):  # its keys are the user's, so they have no declared range
        for name, element in value.items():
            _check_value(element, f"{key}.{name}", Bounds(-math.inf))
    elif isinstance(value, (list, tuple)):
        for index, element in enumerate(value):
            _check_value(element, f"{key}[{index}]", bounds)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        is_whole = isinstance(value, int)
        if is_whole and bounds.high == math.inf:
            bounds = dataclasses.replace(bounds, high=MAX_INT)
        if (is_whole and abs(value) >= 2**64) or not bounds.contains(value):
            number = "whole number" if is_whole else "finite number"
            raise ValueError(f"{key}: {value} is out of range; give a {number} {bounds}")


def number_type(kind: type[int] | type[float], bounds: Bounds) -> Callable[[str], float]:
    """Return an argparse type that converts text to a number and checks its range."""
    number = "whole number" if kind is int else "finite number"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {number}; give one {bounds}"
            ) from None
        if not bounds.contains(value):
            raise argparse.ArgumentTypeError(f"{text!r} is out of range; give a {number} {bounds}")
        return value

    return convert


# Types of command-line options.
POSITIVE_INT = number_type(int, Bounds(1, MAX_INT))
NON_NEGATIVE_INT = number_type(int, Bounds(0, MAX_INT))
POSITIVE_FLOAT = number_type(float, Bounds(open_low=True))
NON_NEGATIVE_FLOAT = number_type(float, Bounds())
FRACTION = number_type(float, Bounds(high=1, open_low=True))
FRACTION_BELOW_ONE = number_type(float, Bounds(high=1, open_high=True))
PERCENT = number_type(float, Bounds(high=100, open_low=True))
COSINE = number_type(float, Bounds(-1, 1))
NUM_THREADS = number_type(int, Bounds(1, 1024))
NUM_CHANNELS = number_type(int, Bounds(1, 32))
JPEG_QUALITY = number_type(int, Bounds(1, 100))
PORT = number_type(int, Bounds(0, 65535))
