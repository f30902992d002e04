"""A note in a run's folder that says why its training failed, for the pages about runs."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

FILE_NAME = "failure.json"
MAX_CHARACTERS = 400  # longer texts of errors are cut off


def write(run: Path, error: BaseException) -> None:
    """Write the note. A disk that refuses it is ignored, because another error is on its way."""
    text = " ".join(str(error).split())[:MAX_CHARACTERS] or "no message"
    note = {"kind": type(error).__name__, "text": text, "time": time.time()}
    with suppress(OSError):
        (run / FILE_NAME).write_text(json.dumps(note) + "\n", encoding="utf-8")


def remove(run: Path) -> None:
    """Remove the note of an earlier process, because the run goes on."""
    with suppress(OSError):
        (run / FILE_NAME).unlink()


def read(run: Path) -> str:
    """Return the error of the run's last process, or "" if it did not fail."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads((run / FILE_NAME).read_text(encoding="utf-8"))
        return f"{note['kind']}: {note['text']}"
    return ""
