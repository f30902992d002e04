"""Terminal output of a run: its progress, and the warnings of all ranks, each shown once."""

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import rich.console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

BAR_WIDTH = 24  # characters
SMOOTHING = 0.1  # weight of the latest step time in the ETA's moving average
MIN_SECONDS_BETWEEN_LINES = 1.0  # shortest time between two progress lines


class Console:
    """A progress bar on a terminal, and plain lines in a file or a SLURM log.

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
        self.last_step = last_step
        self.stream = stream or sys.stdout
        self._bar: Progress | None = None
        self._last_shown = 0.0
        self._seconds_per_step: float | None = None
        self._knn: float | None = None
        for record in past_records or []:
            self._update(record)

    def show_progress(self, record: dict[str, Any]) -> None:
        """Show a record, at most once per second. The last record is always shown."""
        self._update(record)
        now, is_last = time.monotonic(), record["step"] == self.last_step
        if now - self._last_shown < MIN_SECONDS_BETWEEN_LINES and not is_last:
            return
        self._last_shown = now
        if self.stream.isatty():
            self._show_bar(record)
        else:
            self.print_line(self.format_record(record))
        if is_last:
            self.close()

    def format_record(self, record: dict[str, Any]) -> str:
        """Format a record as one line."""
        seconds = int((self.last_step - record["step"]) * (self._seconds_per_step or 0.0))
        fields = [
            f"step {record['step']}/{self.last_step}",
            f"epoch {record['epoch']:.2f}",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.4g}",
            *([f"k-NN {100 * self._knn:.1f} %"] if self._knn is not None else []),
            f"{record['images_per_second']:,.0f} images/s",
            f"data wait {100 * record['data_wait']:.0f} %",
        ]
        if record.get("skipped_steps"):
            fields.append(f"{record['skipped_steps']:.0f} steps skipped")
        eta = f"ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        return "  ".join([*fields, eta])

    def print_line(self, text: str, style: str | None = None) -> None:
        """Print a line. If there is a bar, the line is styled and printed above it."""
        if self._bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self._bar.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.print_line(f"warning: {text}", "yellow")

    def close(self) -> None:
        """Stop the bar in its current state and release the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _update(self, record: dict[str, Any]) -> None:
        self._knn = record.get("knn", self._knn)
        if seconds := record.get("seconds_per_step"):
            average = seconds if self._seconds_per_step is None else self._seconds_per_step
            self._seconds_per_step = average + SMOOTHING * (seconds - average)

    def _show_bar(self, record: dict[str, Any]) -> None:
        if self._bar is None:
            self._bar = Progress(
                BarColumn(BAR_WIDTH),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                console=rich.console.Console(file=self.stream, force_terminal=True),
                auto_refresh=False,
            )
            self._bar.add_task("", total=self.last_step)
        self._bar.update(
            self._bar.task_ids[0], completed=record["step"], description=self.format_record(record)
        )
        self._bar.start()
        self._bar.refresh()


class WarningCollector:
    """Handler of Python's warnings that shows each one once.

    Rank 0 shows its own warnings at once. The other ranks keep theirs until rank 0 gathers them.

    Args:
        show: Prints a warning. None on ranks that only collect.
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
        """Show the gathered warnings on rank 0, each with the ranks that it came from."""
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
