"""Exit statuses of a run, including those after which torchrun must not restart the ranks.

torchrun restarts all ranks when one of them exits with a nonzero status. A lost rank needs such a
restart. After a user's mistake it is useless, because the restarted ranks would fail in the same
way. After a request to stop it is wrong. In the last two cases a rank therefore writes its status
to a file in the folder that torchrun made for this launch. Restarted ranks that find this file exit
immediately with the same status.
"""

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

from ssl_pretrain.system import durable_files

# Exit statuses. Those above 2 come from sysexits.h. docs/reliability.md explains them to users.
USER_ERROR = 2  # the same command would fail in the same way
PROCESS_LOST = 69  # EX_UNAVAILABLE: a rank did not join, ended early, or stopped responding
DISK_ERROR = 74  # EX_IOERR: a file could not be written
STOPPED = 75  # EX_TEMPFAIL: saved after a request to stop; the same command resumes the run
NO_LABELS = 77  # no image has a label, and the evaluation was told to skip unlabeled images


class LostProcessError(RuntimeError):
    """A rank or another process of the run has ended or does not respond."""


def record_failure(error: BaseException) -> int:
    """Return the exit status for an error, and record it if restarted ranks must repeat it."""
    if isinstance(error, LostProcessError):
        return PROCESS_LOST
    if isinstance(error, durable_files.SaveError) or durable_files.is_disk_failure(error):
        return DISK_ERROR
    return _record(USER_ERROR)


def record_stop() -> int:
    """Return the exit status for a stop request, and record it if restarted ranks must repeat it.

    With torchrun on several hosts and with restarts, the status is 0. After any other status, the
    agents would wait for each other to restart the ranks.
    """
    has_several_hosts = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return 0 if has_several_hosts and may_restart else _record(STOPPED)


def status_to_repeat() -> int | None:
    """Return the recorded status if torchrun has restarted the ranks, else None."""
    path = _status_path()
    if path is not None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        with suppress(OSError, ValueError):
            return int(path.read_text())
    return None


def print_error(text: str) -> None:
    """Print an error to stderr. Of torchrun's ranks on a machine, only the first prints it."""
    path = _status_path()
    if path is not None:
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            (path.parent / f"error_{restarts}_{digest}").touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # print the error, even if several ranks do
    print(text, file=sys.stderr, flush=True)


def _record(status: int) -> int:
    """Write a status to the file of this launch, if torchrun made one, and return the status."""
    path = _status_path()
    if path is not None:
        with suppress(OSError):
            path.write_text(str(status))
    return status


def _status_path() -> Path | None:
    """Return the file for the status of this launch on this machine, or None without torchrun.

    torchrun's error file is FOLDER/attempt_N/<rank>/error.json.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(error_file).parents[2] / "ended" if error_file.count("/") > 3 else None
