"""Run a test script in Triton's interpreter.

TRITON_INTERPRET=1 has to be set before Triton is imported, so the script has a process of its own.
"""

import subprocess
import sys
from pathlib import Path

from ssl_pretrain.system.import_path import child_environment

ROOT = Path(__file__).resolve().parents[1]


def run_script(*command: str) -> list[tuple[float, str]]:
    """Run a script, given by its path in the repository and its arguments.

    Returns:
        The number and the text of each line of its output, which two spaces separate.
    """
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=child_environment() | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = (line.split("  ", 1) for line in result.stdout.splitlines())
    return [(float(number), text) for number, text in lines]
