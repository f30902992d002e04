"""State of a run, from the files in its folder alone: running, stopped, failed or finished."""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ssl_pretrain import schema
from ssl_pretrain.checkpoint.folder import is_finished, list_checkpoints
from ssl_pretrain.checkpoint.manifest import read_manifest
from ssl_pretrain.config import NO_METHOD
from ssl_pretrain.data.config import short_name
from ssl_pretrain.eval import results, saved_settings
from ssl_pretrain.eval.appended_lines import AppendedLines
from ssl_pretrain.fault_tolerance import failure_note
from ssl_pretrain.fault_tolerance.run_lock import EMPTY_LOCK_SECONDS, find_holder
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.monitoring.progress import ProgressText

State = Literal["waiting", "running", "stopped", "failed", "finished", "evaluated"]
STATES: dict[State, str] = {  # in the order of a list of runs
    "running": "a process trains in the folder now",
    "waiting": "training has not begun",
    "failed": "training ended with an error, or its process was killed",
    "stopped": "training ended before its last step; the same command resumes it",
    "finished": "all steps are done",
    "evaluated": "published weights that were only evaluated",
}
SILENT_SECONDS = 300.0  # a training without a record for longer is called silent
SILENT_INTERVALS = 10  # but only after this many of its usual intervals between records
NUM_TIMED_RECORDS = 100  # the newest records; older ones have no weight in the time left
SETTLED_SECONDS = 2.0  # a folder changed more recently may have changed again unnoticed
# Ends of the names of results that repeat another
HIDDEN_RESULTS = (results.GRID_SUFFIX, "_test_selected")


@dataclass(frozen=True)
class RunState:
    """State, progress and best numbers of a run. Times are seconds since 1970."""

    state: State
    reason: str = ""  # a sentence without its period
    step: int = 0
    num_steps: int | None = None
    epoch: float = 0.0
    num_epochs: float | None = None
    ends_at: float | None = None  # when a running training will end
    images_per_second: float | None = None
    loss: float | None = None
    best_knn: float | None = None  # online k-NN, percent
    evaluations: dict[str, float] = field(default_factory=dict)  # percent, by name of the result
    num_alerts: int = 0
    method: str = ""
    backbone: str = ""
    data: str = ""
    seed: int | None = None
    started_at: float | None = None
    updated_at: float | None = None  # time of the newest record
    has_report: bool = False

    @property
    def fraction(self) -> float:
        """Share of the steps that are done."""
        return min(1.0, self.step / self.num_steps) if self.num_steps else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Return the training time left, or None if the run does not train or it is unknown."""
        return None if self.ends_at is None else max(0.0, self.ends_at - now)


class RunStateReader:
    """Reader of a run's state, which parses only what has changed since it was last called.

    Args:
        run: Folder of the run, which need not exist yet.
    """

    def __init__(self, run: Path):
        self.run = run
        self._metrics = AppendedLines(run / "metrics.jsonl")
        self._records = _RecordSummary()
        self._settings: Mapping[str, Any] = {}
        self._evaluations: dict[str, float] = {}
        self._last_step: int | None = None
        self._is_finished = False
        self._file_times: dict[str, int] = {}
        self._state = RunState("waiting", f"{run} does not exist yet")
        self._signature: tuple[int, ...] = ()

    def read(self) -> RunState:
        """Return the present state."""
        signature = self._sign()
        is_settled = max(signature) < time.time_ns() - SETTLED_SECONDS * 1e9
        is_quiet = self._state.state != "running" and signature == self._signature
        if not (is_quiet and is_settled):
            self._signature = signature
            self._state = self._read_changes()
        return self._state

    def _sign(self) -> tuple[int, ...]:
        """Return the times of the two folders that change with a run that does not train.

        A training creates and removes its lock, and an evaluation writes to the folder `eval`.
        """
        return tuple(_modification_time(self.run / name) for name in ("", "eval"))

    def _read_changes(self) -> RunState:
        if self._has_changed("config.yaml"):
            self._settings = saved_settings.read_if_intact(self.run)
        if self._has_changed("eval"):
            self._evaluations = _read_evaluations(self.run)
        if self._has_changed("checkpoints"):
            self._last_step, self._is_finished = _read_last_step(self.run), is_finished(self.run)
        lines, is_new = self._metrics.read()
        if is_new:
            self._records = _RecordSummary()
        self._records.add(lines)
        state, reason = self._decide()
        return self._describe(state, reason)

    def _has_changed(self, name: str) -> bool:
        modified = _modification_time(self.run / name)
        was_modified, self._file_times[name] = self._file_times.get(name), modified
        return modified != was_modified or modified > time.time_ns() - SETTLED_SECONDS * 1e9

    def _decide(self) -> tuple[State, str]:
        """Return the state and its reason."""
        lock = self.run / "lock.json"
        holder = find_holder(self.run) if lock.exists() else None
        if holder is not None:
            job = f", SLURM job {holder.job}" if holder.job else ""
            return "running", f"{holder}{job}{self._describe_silence()}"
        if _is_being_written(lock):
            return "running", "starting"
        if self._is_finished:
            return "finished", ""
        if error := failure_note.read(self.run):
            return "failed", error
        if lock.exists():  # its process did not live to remove it
            return "failed", "the process was killed, or its machine went down"
        if self._records.step or self._last_step is not None:
            return "stopped", "the same command resumes the run"
        if self._evaluations:
            return "evaluated", "weights that were not trained in this folder"
        if self.run.is_dir():
            return "waiting", "no record yet"
        return "waiting", f"{self.run} does not exist yet"

    def _describe_silence(self) -> str:
        """Return a warning if a training has written no record for long, else an empty string."""
        last, interval = self._records.last_time, self._records.seconds_per_record
        if last is None:
            return ""
        seconds = time.time() - last
        if seconds < max(SILENT_SECONDS, SILENT_INTERVALS * interval):
            return ""
        return f", without a new record for {seconds / 60:,.0f} min"

    def _describe(self, state: State, reason: str) -> RunState:
        records, settings = self._records, self._settings
        num_epochs = schema.value_at(settings, "epochs")
        if not isinstance(num_epochs, int | float):
            num_epochs = None
        num_steps = self._last_step or records.estimate_num_steps(num_epochs)
        seconds_left = records.seconds_left(num_steps) if state == "running" else None
        ends_at = None
        if seconds_left is not None and records.last_time is not None:
            ends_at = records.last_time + seconds_left
        return RunState(
            state=state,
            reason=reason,
            step=records.step,
            num_steps=num_steps,
            epoch=records.epoch,
            num_epochs=num_epochs,
            ends_at=ends_at,
            images_per_second=records.last.get("images_per_second"),
            loss=records.last.get("loss"),
            best_knn=max(records.knn.values(), default=None),
            evaluations=self._evaluations,
            num_alerts=_count_alerts(self.run),
            method=str(schema.value_at(settings, "method.name") or ""),
            backbone=_network_name(settings),
            data=short_name(
                str(schema.value_at(settings, "data.source") or ""),
                str(schema.value_at(settings, "data.root") or ""),
            ),
            seed=schema.value_at(settings, "seed"),
            started_at=records.started_at,
            updated_at=records.last_time,
            has_report=(self.run / "report.html").is_file(),
        )


def _network_name(settings: Mapping[str, Any]) -> str:
    """Return the name of the backbone, or of the text encoder of a method of sentences."""
    is_trained = schema.value_at(settings, "method.name") != NO_METHOD
    has_no_views = schema.value_at(settings, "views.crops") == {}
    section = "text_encoder" if is_trained and has_no_views else "backbone"
    return str(schema.value_at(settings, f"{section}.name") or "")


class _RecordSummary:
    """The numbers of a run's records that its state needs."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self.knn: dict[int, float] = {}  # percent, by step
        self.started_at: float | None = None
        self.seconds_per_record = 0.0
        self._progress = ProgressText(0)

    @property
    def step(self) -> int:
        return int(self.last.get("step", 0))

    @property
    def epoch(self) -> float:
        return float(self.last.get("epoch", 0.0))

    @property
    def last_time(self) -> float | None:
        return self.last.get("time")

    def add(self, lines: list[bytes]) -> None:
        """Add new lines. Of many, only those that count are parsed."""
        is_first = self.started_at is None
        newest = len(lines) - NUM_TIMED_RECORDS
        for index, line in enumerate(lines):
            if index >= newest or (is_first and index == 0) or b'"knn"' in line:
                with suppress(ValueError, KeyError, TypeError):
                    self._add(json.loads(line), is_timed=index >= newest)

    def _add(self, record: dict[str, Any], is_timed: bool) -> None:
        step, seconds = int(record["step"]), record.get("seconds_per_step")
        knn = record.get("knn")
        if isinstance(knn, int | float) and math.isfinite(knn):
            self.knn[step] = 100 * knn
        if self.started_at is None and "time" in record:
            self.started_at = record["time"] - (seconds or 0.0) * step
        if is_timed:
            if seconds and step > self.step:
                self.seconds_per_record = seconds * (step - self.step)
            self._progress.update(record)
            self.last = record

    def estimate_num_steps(self, num_epochs: float | None) -> int | None:
        """Return the steps of the whole run, as the trainer computes them."""
        if not num_epochs or not self.epoch:
            return None
        return round(num_epochs * round(self.step / self.epoch))

    def seconds_left(self, num_steps: int | None) -> float | None:
        """Return the time from the last record to the end, as the console computes it."""
        if num_steps is None:
            return None
        self._progress.last_step = num_steps
        return self._progress.seconds_left(self.step)


def _is_being_written(lock: Path) -> bool:
    """Return True if a training has just created its lock and not yet written its content."""
    with suppress(OSError):
        status = lock.stat()
        return status.st_size == 0 and time.time() - status.st_mtime < EMPTY_LOCK_SECONDS
    return False


def _modification_time(path: Path) -> int:
    """Return a path's modification time in nanoseconds, or 0 if there is nothing."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read_last_step(run: Path) -> int | None:
    """Return the number of steps of the whole run, from its newest readable manifest."""
    for path in reversed(list_checkpoints(run)):
        with suppress(ValueError, KeyError, OSError):
            return int(read_manifest(path)["last_step"])
    return None


def _read_evaluations(run: Path) -> dict[str, float]:
    """Return the first number of the pretrained features in each result that is a percentage."""
    values: dict[str, float] = {}
    for path in sorted((run / "eval").glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            result = json.loads(path.read_text(encoding="utf-8"))
            name, measure = result["name"], result.get("measure", results.ACCURACY)
            if name.endswith(HIDDEN_RESULTS) or not measure.endswith("%"):
                continue
            for row in result["rows"]:
                if row["features"] == "pretrained" and row["metrics"]:
                    value = float(next(iter(row["metrics"].values())))
                    if math.isfinite(value):
                        values[name] = value
    return values


def _count_alerts(run: Path) -> int:
    paths = metric_names.existing_paths(run, "alerts.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in paths)
