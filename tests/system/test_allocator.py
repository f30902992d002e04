"""A process that keeps freed memory reuses its pages. Page faults are counted in own processes."""

import subprocess
import sys

import pytest

from ssl_pretrain.system import allocator

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not allocator.keep_freed_memory(), reason="needs glibc"
)
MIB = 2**20
SIZES_MIB = (40, 10, 60, 25)  # tensors of a step; by default glibc returns their memory
PROGRAM = f"""
import resource, sys
import torch
from ssl_pretrain.system import allocator
if "keep" in sys.argv:
    assert allocator.keep_freed_memory()
def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size * {MIB} // 4) for size in {SIZES_MIB}]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident_bytes()
faults = [count_faults() for _ in range(10)]
if "release" in sys.argv:
    assert allocator.release_freed_memory()
print(faults[-1], resident_bytes() - before)
"""


def _measure(*arguments):
    """Return the page faults of the last step, and the bytes that are resident after it."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(number) for number in result.stdout.split()]


@pytest.mark.full
def test_a_step_reuses_the_memory_that_the_steps_before_have_freed():
    faults_by_default, _ = _measure()
    faults, resident = _measure("keep")
    assert faults < 0.01 * faults_by_default
    assert resident > sum(SIZES_MIB) * MIB


def test_freed_memory_goes_back_to_the_system_after_a_release():
    _, resident = _measure("keep", "release")
    assert resident < 0.2 * sum(SIZES_MIB) * MIB
