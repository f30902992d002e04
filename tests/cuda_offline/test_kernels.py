"""Every Triton kernel compiles for each GPU generation as the shipped steps launch it.

The launches of a step on a pretended GPU are compiled with their real arguments and block sizes.
tests/losses/test_tiles_compile.py compiles the loss kernels at other dimensions, too.
"""

import importlib
import re
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import fake_step
import pytest
from fake_cuda import pretend_cuda
from shared_memory import SHARED_MEMORY

pytest.importorskip("triton", reason="no Triton for this platform")

from triton.runtime import JITFunction

import ssl_pretrain
from ssl_pretrain.losses import tiles_triton

PACKAGE = Path(ssl_pretrain.__file__).parent
TESTS = Path(__file__).parents[1]
# Where Triton's interpreter compares the values of a module's kernels with those of plain code.
INTERPRETED = {
    "ssl_pretrain.losses.tile_kernels_triton": "losses/test_tiles_triton.py",
    "ssl_pretrain.optim.scaling_triton": "optim/test_scaling.py",
    "ssl_pretrain.views.color_triton": "views/test_color_triton.py",
}
# Embeddings of 128 and 256 numbers, symmetric and one-sided sums.
STEPS = ["simclr_cifar10", "moco_v3_cifar10"]
# torchvision's colors, SimCLR's and BYOL's.
COLORS = ["dino_imagenet", "simclr_imagenet", "byol_imagenet"]


def find_functions() -> dict[str, JITFunction]:
    """Return every Triton function of the package, by module and name."""
    functions = {}
    for path in PACKAGE.rglob("*.py"):
        if re.search(r"^\s*(@|import |from )triton", path.read_text("utf-8"), re.MULTILINE):
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            for value in vars(importlib.import_module(name)).values():
                if isinstance(value, JITFunction) and value.fn.__module__ == name:
                    functions[f"{name}.{value.fn.__name__}"] = value
    return functions


def find_kernels() -> set[str]:
    """Return the Triton functions that no other one calls."""
    functions = find_functions()
    return {
        name
        for name, function in functions.items()
        if not any(
            re.search(rf"\b{function.fn.__name__}\(", other.src.partition(":\n")[2])
            for other in functions.values()
        )
    }


@contextmanager
def compile_launches(capability: int):
    """Pretend to have a GPU, compile what is launched on it, and yield the shared memory by name.

    The largest number of bytes of each kernel is kept.
    """
    shared, compile_kernel = {}, JITFunction.run

    def run(kernel, *arguments, **options):
        compiled = compile_kernel(kernel, *arguments, **{**options, "warmup": True})
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        shared[name] = max(shared.get(name, 0), compiled.metadata.shared)

    with pretend_cuda(capability), mock.patch.object(JITFunction, "run", run):
        tiles_triton._shared_memory.cache_clear()
        try:
            yield shared
        finally:
            tiles_triton._shared_memory.cache_clear()


def check_limit(shared: dict[str, int], capability: int) -> None:
    for name, num_bytes in shared.items():
        limit = SHARED_MEMORY[capability]
        assert num_bytes <= limit, f"{name} takes {num_bytes} of {limit} bytes on sm_{capability}"


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_and_fits_in_shared_memory(capability):
    with compile_launches(capability) as shared:
        for stem in COLORS:
            fake_step.apply_colors(fake_step.load(stem))
        for stem in STEPS:
            fake_step.take_step(*fake_step.build(fake_step.load(stem)))
    assert set(shared) == find_kernels(), "a step that launches the kernel belongs in STEPS"
    check_limit(shared, capability)


def test_the_interpreter_computes_the_values_of_every_module_with_kernels():
    assert {name.rpartition(".")[0] for name in find_kernels()} == INTERPRETED.keys()
    assert all((TESTS / path).exists() for path in INTERPRETED.values())


def test_blocks_that_do_not_fit_are_found(monkeypatch):
    """Blocks of three stages were once used for dim 256, and take more than a GPU has."""
    blocks = tiles_triton.Blocks(64, 64, 4, 3)
    monkeypatch.setattr(tiles_triton, "choose_blocks", lambda *_: blocks)
    with compile_launches(90) as shared:
        fake_step.take_step(
            *fake_step.build(fake_step.load("moco_v3_cifar10", "parallel.precision=float32"))
        )
    with pytest.raises(
        AssertionError, match=r"log_sum_exp_kernel takes .* of 232448 bytes on sm_90"
    ):
        check_limit(shared, 90)
