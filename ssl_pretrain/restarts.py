"""torchrun starts all ranks again when one ended badly: right for a lost rank, useless for a mistake, which would only come again.

So the first rank that ends with a mistake leaves a note in the folder that torchrun made for this start, and ranks started again end at
once where there is one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def note_mistake() -> None:
    """To be called before ending with a mistake of the user's or of the run itself, such as a diverged loss."""
    if (note := _note()) is not None:
        with suppress(OSError):
            note.touch()


def after_a_mistake() -> bool:
    """Whether these ranks were started again by torchrun after a mistake."""
    note = _note()
    return note is not None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and note.exists()


def _note() -> Path | None:
    """The note of this torchrun, on this machine; None without torchrun. The error file is FOLDER/attempt_N/<rank>/error.json."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(file).parents[2] / "mistake" if file.count("/") > 3 else None
