"""Types for argparse: numbers with a range."""

import argparse
import contextlib
import math
from collections.abc import Callable

from ssl_pretrain.schema.settings import MAX_INT, Bounds
from ssl_pretrain.schema.typed_values import build
from ssl_pretrain.schema.yaml_tree import Scalar


def number_type(kind: type[int] | type[float], bounds: Bounds) -> Callable[[str], float]:
    """Return an argparse type that converts text to a number and checks its range."""

    def convert(text: str) -> float:
        value = math.nan  # which is in no range
        with contextlib.suppress(ValueError):
            value = build(kind, Scalar(text), key="option")
        if not bounds.contain(value):
            number = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"{text!r} is out of range; give {number} {bounds}")
        return value

    return convert


COUNT = number_type(int, Bounds(1, MAX_INT))
FROM_ZERO = number_type(int, Bounds(0, MAX_INT))
POSITIVE = number_type(float, Bounds(open_low=True))
NOT_NEGATIVE = number_type(float, Bounds())
SHARE = number_type(float, Bounds(high=1, open_low=True))
BELOW_ONE = number_type(float, Bounds(high=1, open_high=True))
PERCENT = number_type(float, Bounds(high=100, open_low=True))
COSINE = number_type(float, Bounds(-1, 1))
THREADS = number_type(int, Bounds(1, 1024))
QUALITY = number_type(int, Bounds(1, 100))
PORT = number_type(int, Bounds(0, 65535))
