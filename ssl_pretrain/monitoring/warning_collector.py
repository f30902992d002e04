"""Warnings of all ranks, each shown once."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO


class WarningCollector:
    """Receiver of Python's warnings while it is installed.

    Rank 0 shows its own at once. The other ranks keep theirs until rank 0 gathers them.

    Args:
        show: Prints a warning. None on ranks that only collect.
    """

    def __init__(self, show: Callable[[str], None] | None):
        self.show = show
        self.pending: list[str] = []
        self._known: set[str] = set()
        self._previous: Any = None

    def install(self) -> None:
        """Receive all warnings from now on."""
        self._previous = warnings.showwarning
        warnings.showwarning = self._receive

    def remove(self) -> None:
        """Restore Python's handler, and print the remaining warnings to standard error."""
        if self._previous is not None and warnings.showwarning == self._receive:
            warnings.showwarning = self._previous
        self._previous = None
        for text in self.take():
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def take(self) -> list[str]:
        """Return the warnings that were not shown yet, and forget them."""
        pending, self.pending = self.pending, []
        return pending

    def show_others(self, by_rank: list[list[str]]) -> None:
        """Show the gathered warnings on rank 0, with the ranks that each came from."""
        if self.show is None:
            return
        for text in dict.fromkeys(text for texts in by_rank for text in texts):
            if text not in self._known:
                self._known.add(text)
                ranks = [str(rank) for rank, texts in enumerate(by_rank) if text in texts]
                self.show(f"{text} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}")

    def _receive(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = f"{message} ({os.path.basename(filename)}:{lineno})"
        if text not in self._known:
            self._known.add(text)
            (self.show or self.pending.append)(text)
