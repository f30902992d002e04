"""Compute with instructions that every x86-64 CPU since 2013 has, for tests that compare bits.

Compilers and libraries choose instructions by the CPU. Wider vectors add numbers in another order,
so that two kinds of CPUs differ in the last bits. These variables limit them to AVX2.
"""

import os
import subprocess
import sys

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "NUMBA_CPU_NAME": "x86-64-v3",
    "NUMBA_CPU_FEATURES": "+avx2",
}


def train_with_avx2(*arguments: object) -> str:
    """Run `python -m ssl_pretrain.train` with these arguments and return its output."""
    command = [sys.executable, "-m", "ssl_pretrain.train", *map(str, arguments)]
    environment = {**os.environ, **AVX2}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
