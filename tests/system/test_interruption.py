"""Ctrl-C while a command starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [["-m", "ssl_pretrain.train"], ["launch/pretrain.py"]])
def test_an_interrupted_start_ends_in_one_line_and_by_the_signal(tmp_path, command):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")  # Ctrl-C during this import
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, *command, "configs/simclr_digits.yaml"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stderr == "\nstopped before the command was done\n"
    assert result.stdout == "" and result.returncode == -signal.SIGINT
