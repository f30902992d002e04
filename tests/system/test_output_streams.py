"""Standard output and error that are lost while a program runs."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
from ssl_pretrain.system import output_streams
with output_streams.tolerate_lost_output():
    time.sleep(0.5)
    for number in range(3000):
        print('step', number, flush=True)
        print('warning', number, file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text('the end')
"""


@pytest.mark.parametrize(
    ("shell", "message"),
    [
        (
            "{command} 2>{err} | true",
            "warning: stdout is closed (Broken pipe); continuing without it",
        ),
        pytest.param("{command} >/dev/full 2>{err}", "", marks=pytest.mark.full),
        pytest.param("{command} 2>/dev/full", "", marks=pytest.mark.full),
        ("{command} >&- 2>&-", ""),
    ],
)
def test_a_program_survives_the_loss_of_its_output(tmp_path, shell, message):
    """`tee` was killed, the log's disk is full, or a daemon has closed the streams."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    end, err = tmp_path / "end", tmp_path / "err"
    command = shell.format(command=f"{sys.executable} {program} {end}", err=err)
    process = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], check=False)
    assert process.returncode == 0 and end.read_text() == "the end"
    if message:
        lines = err.read_text().splitlines()
        assert lines.count(message) == 1 and lines[-1] == "warning 2999"
