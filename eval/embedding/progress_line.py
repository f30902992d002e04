"""Show how many images are done, how fast, and how long the rest takes."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from ssl_pretrain.monitoring.progress import GAP, SMOOTHING, format_eta
from ssl_pretrain.system import live_line
from ssl_pretrain.system.live_line import LiveLine

SECONDS_ON_A_TERMINAL, SECONDS_IN_A_FILE = 0.2, 10.0  # between two lines


class ProgressLine:
    """A line that is updated on a terminal, or now and then a new line in a file.

    Args:
        total: Number of images.
        num_done: Number of images that an earlier command has done.
        stream: Where the line is written, by default standard error.
    """

    def __init__(self, total: int, num_done: int = 0, stream: TextIO | None = None):
        self.total, self.num_done = total, num_done
        self.stream = stream or sys.stderr
        self._line = LiveLine(self.stream)
        self._seconds_per_image: float | None = None
        self._last_update = self._last_shown = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._line.close()

    def add(self, num_images: int) -> None:
        """Count images that are done now, and show the line unless one was shown just before."""
        now = time.monotonic()
        seconds, self._last_update = (now - self._last_update) / num_images, now
        average = seconds if self._seconds_per_image is None else self._seconds_per_image
        self._seconds_per_image = average + SMOOTHING * (seconds - average)
        self.num_done += num_images
        is_terminal = live_line.is_terminal(self.stream)
        pause = SECONDS_ON_A_TERMINAL if is_terminal else SECONDS_IN_A_FILE
        if now - self._last_shown < pause:
            return
        self._last_shown = now
        if is_terminal:
            self._line.show(lambda width: self.text()[:width])
        else:
            print(self.text(), file=self.stream, flush=True)

    def text(self) -> str:
        """Return the line."""
        seconds = self._seconds_per_image or 0.0
        fields = [f"{self.num_done:,} of {self.total:,} images"]
        if seconds > 0:
            speed = 1 / seconds
            fields.append(f"{speed:,.0f} images/s" if speed >= 100 else f"{speed:.3g} images/s")
            fields.append(f"ETA {format_eta((self.total - self.num_done) * seconds)}")
        return GAP.join(fields)
