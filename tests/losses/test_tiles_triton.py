"""The fused kernels without a GPU: Triton's interpreter runs them, in a process that asked for it before Triton was imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch

from ssl_pretrain.losses import tiles

pytest.importorskip("triton", reason="no Triton for this platform")
ROOT = Path(__file__).parents[2]


def test_the_kernels_compute_what_the_tiles_do():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "tests/losses/kernels.py", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = {line.split("  ", 1)[1].partition(":")[0]: float(line.split()[0]) for line in done.stdout.splitlines()}
    assert set(errors) == {name.partition(":")[0] for name in kernels.CASES}
    assert max(errors.values()) < 2e-5, done.stdout


def test_they_are_for_cuda_and_float32_alone():
    assert tiles._kernels(torch.zeros(4, 8)) is None  # on a CPU
    from ssl_pretrain.losses import tiles_triton

    assert tiles_triton.fits(torch.zeros(4, 8)) and tiles_triton.fits(torch.zeros(4, 256))
    assert not tiles_triton.fits(torch.zeros(4, 257)) and not tiles_triton.fits(torch.zeros(4, 8, dtype=torch.float64))
