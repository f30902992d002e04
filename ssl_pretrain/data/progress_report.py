"""How far a long pass over a data set is, on stderr."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_EVERY_SECONDS = 2.0


def report(results: Iterable[T], total: int, verb: str, done: int = 0) -> Iterator[T]:
    """The same results; says every two seconds how many of `total` there are and how long the rest will take. `done`: before this pass."""
    began = reported = time.monotonic()
    for number, result in enumerate(results, start=1):
        yield result
        now = time.monotonic()
        if number == 1:  # starting is not part of the rate
            began = reported = now
        if now - reported > _EVERY_SECONDS and done + number < total:
            reported = now
            left = (total - done - number) * (now - began) / (number - 1)
            print(
                f"{verb} {done + number:,} of {total:,} images, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
