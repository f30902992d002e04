"""Write a run's metrics, pictures and alerts to `tensorboard/` in its folder."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.system import durable_files

FOLDER_NAME = "tensorboard"  # in the run's folder
MAX_QUEUE = 1_000_000  # events that wait in memory for a slow disk; a full queue delays a step
FLUSH_SECONDS = 30  # longest time until an event is in the file


class TensorBoardTracker:
    """Event files of a run, one per process that trained it.

    Each file names its first step, and TensorBoard discards the events of earlier files from that
    step on. So the steps that a resumed run repeats are shown once.

    Args:
        run: The run's folder.
        num_steps_done: Number of steps that the run has already done.
        config_text: Configuration, shown as text.
        print_line: Function that prints a message if the files cannot be written.
    """

    def __init__(
        self, run: Path, num_steps_done: int, config_text: str, print_line: Callable[[str], None]
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self._print_line = run / FOLDER_NAME, print_line
        self._last_step = num_steps_done
        self._writer: Any = None
        open_writer = partial(
            SummaryWriter,
            str(self.folder),
            purge_step=num_steps_done + 1,
            max_queue=MAX_QUEUE,
            flush_secs=FLUSH_SECONDS,
        )
        self._writer = self._try(open_writer)
        self._call("add_text", "config", f"```\n{config_text}\n```", num_steps_done)

    def log_record(
        self, record: dict[str, Any], curves: dict[str, list[float]] | None = None
    ) -> None:
        """Log a record of metrics, and a histogram of the embeddings' standard deviations."""
        self._last_step, time = record["step"], record.get("time")
        for key, value in record.items():
            if key not in ("step", "time") and value is not None:
                name = metric_names.tracker_name(key)
                self._call("add_scalar", name, value, self._last_step, time)
        if curves:
            values = np.asarray(curves["deviations"])
            self._call("add_histogram", metric_names.SPREAD_CHART, values, self._last_step)

    def log_picture(self, key: str, path: str, caption: str, step: int) -> None:
        """Log a picture. TensorBoard shows no caption."""
        with suppress(OSError), Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
            self._call("add_image", key, pixels, step, dataformats="HWC")

    def raise_alert(self, title: str, text: str, tag: str) -> None:
        """Log an alert as text."""
        self._call("add_text", f"alerts/{tag}", f"{title}: {text}", self._last_step)

    def close(self, succeeded: bool = True) -> None:
        """Write the pending events."""
        self._call("close")

    def _call(self, method: str, *arguments: Any, **keywords: Any) -> None:
        """Call a method of the writer, unless an earlier call failed."""
        if self._writer is not None:
            self._try(partial(getattr(self._writer, method), *arguments, **keywords))

    def _try(self, action: Callable[[], Any]) -> Any:
        """Return `action()`, or None after printing the disk's error, which ends the logging."""
        try:
            return action()
        except OSError as error:
            self._writer = None
            reason = durable_files.describe_error(error)
            self._print_line(
                f"TensorBoard: {self.folder} could not be written: {reason}. The run continues "
                "without it"
            )
            return None
