"""How a run ends, and what torchrun must not start again.

torchrun starts all ranks again when one of them ends with another status than 0. That is right after
a lost rank. It is useless after a mistake, which would only come again, or for a run that was asked
to stop. The first rank that ends in one of these two ways leaves a note in the folder that torchrun
made for this start. Ranks that are started again end at once if they find it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

# Exit statuses, those above 2 from sysexits.h. docs/reliability.md tells users about them.
MISTAKE = 2  # would come again
LOST = 69  # EX_UNAVAILABLE: the ranks did not meet, one was lost, or a process was silent for too long
DISK_REFUSED = 74  # EX_IOERR
STOPPED = 75  # EX_TEMPFAIL: asked to stop, saved; the same command goes on


def note_end(status: int) -> None:
    """Note the exit status that ranks which torchrun starts again have to repeat."""
    if (note := _note()) is not None:
        with suppress(OSError):
            note.write_text(str(status))


def status_to_repeat() -> int | None:
    """Return the noted status if torchrun started these ranks again after it, else None."""
    note = _note()
    if note is None or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    with suppress(OSError, ValueError):
        return int(note.read_text())
    return None


def stopped_status() -> int:
    """Return the exit status of a rank that was asked to stop.

    Agents on several hosts would wait for each other to start the ranks again after anything but 0.
    """
    agents = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return 0 if agents > 1 and restarts > 0 else STOPPED


def _note() -> Path | None:
    """Path of the note of this torchrun on this machine, None without torchrun.

    torchrun's error file is FOLDER/attempt_N/<rank>/error.json.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(file).parents[2] / "ended" if file.count("/") > 3 else None
