"""Compile the loss kernels for GPUs that are absent, with the tools of Triton's wheel.

    PYTHONPATH=.:tests .venv/bin/python tests/losses/compiling.py

prints the resources of the backward kernel, which docs/results/loss.md lists.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from shared_memory import SHARED_MEMORY
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssl_pretrain.losses import tiles_triton
from ssl_pretrain.losses.tile_kernels_triton import log_sum_exp_kernel, weighted_sum_kernel

KERNELS = {
    "log_sum_exp": (log_sum_exp_kernel, {}),
    "weighted_sum, by row": (
        weighted_sum_kernel,
        {"HAS_ROW_TERMS": True, "HAS_COLUMN_TERMS": False},
    ),
    "weighted_sum, by column": (
        weighted_sum_kernel,
        {"HAS_ROW_TERMS": False, "HAS_COLUMN_TERMS": True},
    ),
    "weighted_sum, by both": (
        weighted_sum_kernel,
        {"HAS_ROW_TERMS": True, "HAS_COLUMN_TERMS": True},
    ),
}
_FLOAT32_POINTERS = (
    "anchor_factors",
    "candidate_factors",
    "results",
    "row_lse",
    "row_gradient",
    "column_lse",
    "column_gradient",
)


@dataclass(frozen=True)
class CompiledKernel:
    """Resources that a compiled kernel takes."""

    shared_bytes: int
    stack_bytes: int  # per thread, mostly of spilled registers


def compile_kernel(
    name: str,
    dim: int,
    capability: int,
    blocks: tiles_triton.Blocks | None = None,
    dtype: str = "fp32",
) -> CompiledKernel:
    """Compile one kernel with the given blocks, or else with those that the package chooses.

    Args:
        name: Name in `KERNELS`.
        dim: Dimension of the embeddings.
        capability: Compute capability, such as 90 for an H100.
        blocks: Block sizes.
        dtype: Triton's name of the embeddings' data type: fp32, bf16 or fp16.
    """
    padded_dim = max(16, triton.next_power_of_2(dim))
    blocks = blocks or tiles_triton.choose_blocks(padded_dim, SHARED_MEMORY[capability])
    kernel, flags = KERNELS[name]
    constants = {
        "SWAPPED": False,
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "PRECISION": "tf32x3",
        "HAS_FACTORS": dtype != "fp32",
        **flags,
    }
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= {name: "*fp32" for name in _FLOAT32_POINTERS if name in signature}
    signature |= {"anchors": f"*{dtype}", "candidates": f"*{dtype}"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return CompiledKernel(compiled.metadata.shared, _stack_bytes(compiled.asm["cubin"]))


def _stack_bytes(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", output)
    return int(stack)


def main() -> None:
    """Print the shared memory and the stack of the backward kernel, by dimension and GPU."""
    for gpu, capability, dim in (
        ("H100", 90, 128),
        ("H100", 90, 256),
        ("A100", 80, 128),
        ("RTX 4090", 89, 128),
    ):
        for dtype in ("fp32", "bf16"):
            compiled = compile_kernel("weighted_sum, by both", dim, capability, dtype=dtype)
            print(
                f"{dim} dimensions, {gpu}, {dtype}: {compiled.shared_bytes:,} bytes of shared "
                f"memory, {compiled.stack_bytes:,} bytes of stack per thread"
            )


if __name__ == "__main__":
    main()
