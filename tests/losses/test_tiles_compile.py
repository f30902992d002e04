"""The loss kernels fit in the shared memory of every GPU generation that they are compiled for."""

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

import compiling
from compiling import KERNELS, SHARED_MEMORY, compile_kernel

from ssl_pretrain.losses.tiles_triton import Blocks, choose_blocks

# One dimension per shape class. 128 is SimCLR's, 256 MoCo v3's and NNCLR's.
QUICK = [(capability, dim) for capability in SHARED_MEMORY for dim in (64, 128, 256)]
QUICK_KERNELS = ("log_sum_exp", "weighted_sum, by both")
ALL = [
    (capability, dim, name, dtype)
    for dtype, dims in {
        "fp32": (8, 16, 33, 64, 100, 128, 129, 200, 256),
        "bf16": (16, 64, 128, 256),
        "fp16": (16, 64, 128, 256),
    }.items()
    for capability in SHARED_MEMORY
    for dim in dims
    for name in KERNELS
    if (capability, dim) not in QUICK or name not in QUICK_KERNELS or dtype == "fp16"
]


def assert_fits(name: str, dim: int, capability: int, dtype: str = "fp32") -> None:
    compiled = compile_kernel(name, dim, capability, dtype=dtype)
    message = f"{name} of {dim} {dtype} takes {compiled.shared_bytes} bytes on sm_{capability}"
    assert compiled.shared_bytes <= SHARED_MEMORY[capability], message
    # Where ptxas runs out of registers, it gives up and keeps almost everything on the stack.
    message = f"{name} of {dim} {dtype} spills {compiled.stack_bytes} bytes on sm_{capability}"
    assert compiled.stack_bytes < 2048, message


@pytest.mark.parametrize("name", QUICK_KERNELS)
@pytest.mark.parametrize("capability, dim", QUICK)
def test_a_kernel_fits_in_shared_memory_and_registers(name, capability, dim):
    for dtype in ("fp32", "bf16"):
        assert_fits(name, dim, capability, dtype)


@pytest.mark.parametrize("name", QUICK_KERNELS)
@pytest.mark.parametrize("capability, dim", QUICK)
def test_a_kernel_of_bfloat16_takes_little_more_than_half_the_shared_memory(capability, dim, name):
    compiled, float32 = (
        compile_kernel(name, dim, capability, dtype=dtype) for dtype in ("bf16", "fp32")
    )
    assert compiled.shared_bytes < 0.55 * float32.shared_bytes


@pytest.mark.full
@pytest.mark.parametrize("capability, dim, name, dtype", ALL)
def test_every_kernel_fits_in_shared_memory_and_registers(capability, dim, name, dtype):
    assert_fits(name, dim, capability, dtype)


def test_blocks_that_once_failed_to_launch_do_not_fit():
    """Three stages of 64 x 32 blocks, once used for dim 256, take 256 KiB. An H100 has 227 KiB."""
    compiled = compile_kernel("log_sum_exp", 256, 90, Blocks(64, 32, 4, 3))
    assert compiled.shared_bytes == 262_144 > SHARED_MEMORY[90]


def test_an_unknown_device_takes_blocks_of_the_next_smaller_limit():
    assert choose_blocks(128, 300_000) == choose_blocks(128, compiling.SHARED_MEMORY[90])
    assert choose_blocks(128, 150_000) == choose_blocks(128, compiling.SHARED_MEMORY[89])
    assert choose_blocks(256, 48_000) == choose_blocks(256, compiling.SHARED_MEMORY[89])
