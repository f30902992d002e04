"""Without a GPU, the color kernels are interpreted, and compiled for each architecture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton_interpreter

pytest.importorskip("triton", reason="no Triton for this platform")
import interpreted
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssl_pretrain.views import color_triton
from ssl_pretrain.views.color_parameters import draw_colors
from ssl_pretrain.views.recipe import Crop

SWITCHES = [False, True]
# The kernel, its constants with the authors' functions switched on or off, and its number of warps.
KERNELS = {
    "means": (
        color_triton._compute_means,
        lambda on: {"ADDS": on, "HSV": on, "CHANNEL_MEAN": on, "PIXELS": 2048},
        8,
    ),
    "colors": (color_triton._apply_colors, lambda on: {"ADDS": on, "HSV": on, "PIXELS": 1024}, 4),
    "blur_rows": (
        color_triton._blur_rows,
        lambda on: {"TAPS": 23, "ZERO_BORDER": on, "PIXELS": 1024},
        4,
    ),
    "blur_columns": (
        color_triton._blur_columns,
        lambda on: {"TAPS": 23, "ZERO_BORDER": on, "PIXELS": 1024},
        4,
    ),
}
TYPES = {
    "pixels": "*u8",
    "views": "*bf16",
    "table": "*fp32",
    "means": "*fp32",
    "buffer": "*fp32",
    "source_buffer": "*fp32",
    "target_buffer": "*fp32",
}


def test_the_kernels_compute_the_same_colors_as_a_cpu():
    lines = triton_interpreter.run_script("tests/views/interpreted.py")
    differences = {name: difference for difference, name in lines}
    assert set(differences) == set(interpreted.CASES)
    # One gray level is 1 / 255 / 0.2 = 0.02 of a normalized view. The kernels sum in a different
    # order, which changes the last digits.
    assert max(differences.values()) < 2e-5, differences


@pytest.mark.parametrize("use_authors_functions", SWITCHES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_a_kernel_compiles_and_uses_little_shared_memory(capability, name, use_authors_functions):
    kernel, constants, num_warps = KERNELS[name]
    constants = constants(use_authors_functions)
    integers = ("area", "height", "width")
    signature = {
        argument: "constexpr"
        if argument in constants
        else TYPES.get(argument, "i32" if argument in integers else "fp32")
        for argument in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps}
    )
    # In bytes. Registers, and not shared memory, then limit the number of concurrent programs.
    assert compiled.metadata.shared < 1024


def test_the_table_assigns_each_blurred_image_a_slot_of_the_blur_buffers():
    is_blurred = np.array([False, True, False, True, True])
    parameters = replace(draw_colors(Crop(), 0, 0, np.arange(5), 0), is_blurred=is_blurred)
    table = color_triton.pack_parameters(parameters, Crop())
    assert table[:, 11].tolist() == [-1, 0, -1, 1, 2]
    assert table[:3, 12].tolist() == [1, 3, 4]
    assert torch.from_numpy(table).dtype == torch.float32
