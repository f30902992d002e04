"""Savings of launches, memory and compilation on a GPU do not change results."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from on_cuda import NEEDS_CUDA, cuda, forbid_synchronization  # noqa: F401

from ssl_pretrain.optim import scaling
from ssl_pretrain.parallel import drop_path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "optim"))

pytestmark = NEEDS_CUDA


@pytest.mark.parametrize("offset", [0, 1])
def test_the_scaling_kernel_equals_torchs_operations(offset):
    pytest.importorskip("triton", reason="no Triton for this platform")
    import interpreted_scaling

    for shapes in interpreted_scaling.SHAPES.values():
        # A sum of products is rounded once by the kernel and twice by torch's operations.
        assert interpreted_scaling.measure_difference(shapes, offset, "cuda") < 1e-5


def test_scaling_does_not_block_the_host(cuda, forbid_synchronization):
    tensors = [torch.ones(n, device=cuda) for n in (1, 5000, 100_000)]
    factors = torch.tensor([1.0, 2.0, 3.0], device=cuda)
    scaling.scale(tensors, factors)
    with forbid_synchronization():
        scaling.scale(tensors, factors)
        scaling.add_and_scale(tensors, tensors, factors, factors)
    assert [tensor.mean().item() for tensor in tensors] == [2.0, 24.0, 108.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_has_timms_values_and_does_not_block_the_host(
    cuda, forbid_synchronization, dtype
):
    x = torch.ones(20_000, 3, device=cuda, dtype=dtype)
    module = torch.compile(drop_path.DropPath(0.3, True, cuda), backend="eager", fullgraph=True)
    module(x)
    with forbid_synchronization():
        y = module(x)
    expected = timm.layers.drop_path(x, 0.3, training=True)
    assert torch.equal(y.unique(), expected.unique())
    assert (y > 0).float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert torch.equal(drop_path.DropPath(0.0, True, cuda)(x), x)


def test_the_allocator_uses_expandable_segments():
    code = (
        "import torch; from ssl_pretrain.distributed import process_group\n"
        "x = torch.ones(10**7, device=process_group.start())\n"
        "print({segment['is_expandable'] for segment in torch.cuda.memory_snapshot()})"
    )
    run = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=ROOT)
    result = run([sys.executable, "-c", code])
    assert (result.stdout, result.stderr) == ("{True}\n", "")
