"""Format text for messages, and report the progress of long passes over a data set."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")
_REPORT_SECONDS = 2.0  # time between two progress lines if stderr is not a terminal


def abbreviate(names: Sequence[str], num_shown: int = 5) -> str:
    """Join the first few names with commas, and add their total number if there are more."""
    suffix = f", ... ({len(names)} in all)" if len(names) > num_shown else ""
    return ", ".join(names[:num_shown]) + suffix


def printable(text: str) -> str:
    r"""Escape control characters, as in \x1b, and bytes of file names that cannot be decoded."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def report_progress(results: Iterable[T], total: int, verb: str, num_done: int = 0) -> Iterator[T]:
    """Yield the results unchanged, and show their number and the time left on stderr.

    Args:
        results: One result per image.
        total: Total number of images, including those done before.
        verb: Verb in the past tense for the messages, such as "read".
        num_done: Number of images done before this call.
    """
    if sys.stderr.isatty():
        console = Console(stderr=True)
        return iter(track(results, f"{verb} images", total, num_done, console=console))
    return _report_lines(results, total, verb, num_done)


def _report_lines(results: Iterable[T], total: int, verb: str, num_done: int) -> Iterator[T]:
    start = last_report = time.monotonic()
    for number, result in enumerate(results, start=1):
        yield result
        now = time.monotonic()
        if number == 1:  # the time to the first result includes the start of the workers
            start = last_report = now
        if now - last_report > _REPORT_SECONDS and num_done + number < total:
            last_report = now
            seconds = (total - num_done - number) * (now - start) / (number - 1)
            print(
                f"{verb} {num_done + number:,} of {total:,} images, about {seconds:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
