"""Terminal output of a run: its progress, and the warnings of all ranks, each shown once."""

import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

from ssl_pretrain.monitoring.progress import ProgressText
from ssl_pretrain.system import live_line
from ssl_pretrain.system.live_line import LiveLine

MIN_SECONDS_BETWEEN_LINES = 1.0
YELLOW, DEFAULT_COLOR = "\x1b[33m", "\x1b[0m"


class Console:
    """A live progress line on a terminal, and plain lines in a file or a SLURM log.

    Args:
        last_step: Step at which the run ends.
        past_records: Records of a resumed run. Their step times count toward the ETA.
        stream: Destination. Standard output by default.
    """

    def __init__(
        self,
        last_step: int,
        past_records: list[dict[str, Any]] | None = None,
        stream: TextIO | None = None,
    ):
        self.progress = ProgressText(last_step, past_records)
        self.stream = stream or sys.stdout
        self._live_line = LiveLine(self.stream)
        self._last_shown = 0.0

    def show_progress(self, record: dict[str, Any]) -> None:
        """Show a record unless another was shown within a second. The last one is always shown."""
        self.progress.update(record)
        now, is_last = time.monotonic(), record["step"] == self.progress.last_step
        if now - self._last_shown < MIN_SECONDS_BETWEEN_LINES and not is_last:
            return
        self._last_shown = now
        if live_line.is_terminal(self.stream):
            render = partial(self.progress.line, record, bar_characters=self._bar_characters())
            self._live_line.show(render)
        else:
            self.print_line(self.progress.plain_line(record))

    def print_line(self, text: str) -> None:
        """Print a line, above the progress line on a terminal."""
        self._live_line.write_above(self.stream, f"{text}\n")
        self.stream.flush()

    def warn(self, text: str) -> None:
        """Print a warning, in yellow on a terminal unless NO_COLOR is set."""
        is_colored = live_line.is_terminal(self.stream) and not os.environ.get("NO_COLOR")
        text = f"warning: {text}"
        self.print_line(f"{YELLOW}{text}{DEFAULT_COLOR}" if is_colored else text)

    def close(self) -> None:
        """Erase the progress line and release the terminal."""
        self._live_line.close()

    def _bar_characters(self) -> str:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return "━─" if encoding.lower().startswith("utf") else "#-"


class WarningCollector:
    """Handler of Python's warnings that shows each one once.

    Rank 0 shows its own warnings at once. The other ranks keep theirs until rank 0 gathers them.

    Args:
        show: Function that prints a warning, or None on a rank that keeps its warnings.

    Attributes:
        pending: Warnings that this rank keeps.
    """

    def __init__(self, show: Callable[[str], None] | None):
        self.show = show
        self.pending: list[str] = []
        self._known: set[str] = set()
        self._previous: Any = None

    def install(self) -> None:
        """Replace Python's handler of warnings."""
        self._previous = warnings.showwarning
        warnings.showwarning = self._receive

    def uninstall(self) -> None:
        """Restore Python's handler, and print the remaining warnings to standard error."""
        if self._previous is not None and warnings.showwarning == self._receive:
            warnings.showwarning = self._previous
        self._previous = None
        for text in self.take_pending():
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def take_pending(self) -> list[str]:
        """Return the warnings not yet shown, and remove them from the collector."""
        pending, self.pending = self.pending, []
        return pending

    def show_from_ranks(self, by_rank: list[list[str]]) -> None:
        """Show the warnings of all ranks on rank 0, each with the ranks that it came from.

        Args:
            by_rank: Result of `take_pending` on each rank.
        """
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
        """Show or keep a warning. The parameters are those of `warnings.showwarning`."""
        text = f"{message} ({os.path.basename(filename)}:{lineno})"
        if text in self._known:
            return
        self._known.add(text)
        if self.show is None:
            self.pending.append(text)
        else:
            self.show(text)
