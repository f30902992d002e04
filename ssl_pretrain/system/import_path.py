"""Let child processes import this copy of the package."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
IMPORT_ROOT = PACKAGE.parent  # the root of a clone, or site-packages


def child_environment() -> dict[str, str]:
    """Return the environment variables of this process, with `IMPORT_ROOT` first in PYTHONPATH."""
    folders = filter(None, [str(IMPORT_ROOT), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
