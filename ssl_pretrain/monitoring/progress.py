"""Format the progress of a run as a line that fits the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SMOOTHING = 0.1  # weight of the latest step time in the ETA's moving average
MIN_BAR, MAX_BAR = 10, 24  # length of the bar in characters
GAP = "  "  # separator of two fields
# Fields of the line on a terminal. In a narrow one, the last of these are left out first.
BY_IMPORTANCE = (
    *("percent", "loss", "eta", "knn", "step"),
    *("skipped", "epoch", "lr", "data_wait", "images_per_second"),
)


class ProgressText:
    """Newest values of a run's records, and lines of text that show them.

    Args:
        last_step: Step at which the run ends.
        past_records: Records of a resumed run. Their step times count toward the ETA.
    """

    def __init__(self, last_step: int, past_records: list[dict[str, Any]] | None = None):
        self.last_step, self.step = last_step, 0
        self.loss: float | None = None
        self.knn: float | None = None
        self.training_seconds = 0.0
        self._seconds_per_step: float | None = None
        for record in past_records or []:
            self.update(record)

    def update(self, record: Mapping[str, Any]) -> None:
        """Update the values and the average step time from the next record."""
        if record.get("knn") is not None:
            self.knn = record["knn"]
        self.loss = record.get("loss")
        if seconds := record.get("seconds_per_step"):
            self.training_seconds += seconds * (record["step"] - self.step)
            average = seconds if self._seconds_per_step is None else self._seconds_per_step
            self._seconds_per_step = average + SMOOTHING * (seconds - average)
        self.step = record["step"]

    def fields(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Return the text of each field of a record by name, in the order of the line."""
        fields = {
            "step": f"step {record['step']}/{self.last_step}",
            "epoch": f"epoch {record['epoch']:.2f}",
            "loss": f"loss {record['loss']:.4f}",
            "lr": f"lr {record['lr']:.4g}",
        }
        if self.knn is not None:
            fields["knn"] = f"k-NN {100 * self.knn:.1f} %"
        fields["images_per_second"] = f"{record['images_per_second']:,.0f} images/s"
        fields["data_wait"] = f"data wait {100 * record['data_wait']:.0f} %"
        if record.get("skipped_steps"):
            fields["skipped"] = f"skipped {record['skipped_steps']:.0f}"
        fields["eta"] = f"ETA {format_eta(self.seconds_left(record['step']) or 0.0)}"
        return fields

    def seconds_left(self, step: int) -> float | None:
        """Return the training time left after a step, or None if no step was timed yet."""
        if self._seconds_per_step is None:
            return None
        return (self.last_step - step) * self._seconds_per_step

    def plain_line(self, record: Mapping[str, Any]) -> str:
        """Return a record as one line for a file."""
        return GAP.join(self.fields(record).values())

    def line(self, record: Mapping[str, Any], width: int, bar_characters: str = "━─") -> str:
        """Return a record as one line of at most `width` characters.

        Whole fields are left out until the others fit, the least important first. A bar fills what
        remains if there is room for a useful one.

        Args:
            record: Newest record of the run.
            width: Characters available.
            bar_characters: Two characters, for the steps that are done and for the others.
        """
        fraction = record["step"] / max(1, self.last_step)
        fields = {"percent": f"{int(100 * fraction):3d} %", **self.fields(record)}
        names = [name for name in BY_IMPORTANCE if name in fields]
        text = _join_fields(fields, names)
        while len(text) > width and names:
            names.pop()
            text = _join_fields(fields, names)
        length = min(MAX_BAR, width - len(text) - len(GAP))
        if len(names) < len(fields) or length < MIN_BAR:
            return text
        num_done = int(fraction * length)
        bar = num_done * bar_characters[0] + (length - num_done) * bar_characters[1]
        return f"{bar}{GAP}{text}"

    def result(self) -> str:
        """Return the latest loss and k-NN accuracy, and the training time, as text."""
        loss = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        knn = [] if self.knn is None else [f"k-NN {100 * self.knn:.1f} %"]
        duration = f"{format_duration(self.training_seconds)} of training"
        return ", ".join([*loss, *knn, duration])


def _join_fields(fields: Mapping[str, str], names: list[str]) -> str:
    """Join the fields that have these names, in the order of `fields`."""
    return GAP.join(text for name, text in fields.items() if name in names)


def format_eta(seconds: float) -> str:
    """Format a time left as h:mm:ss, or as days and hours from 100 hours on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest:02d}"


def format_duration(seconds: float) -> str:
    """Format a duration with its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
