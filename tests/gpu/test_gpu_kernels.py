"""Fused loss kernels on a GPU equal the plain tiles, never block the host, and take less memory."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from on_cuda import NEEDS_CUDA, cuda, forbid_synchronization  # noqa: F401

from ssl_pretrain.losses.backend import BACKENDS, use_backend
from ssl_pretrain.losses.contrastive import nt_xent
from ssl_pretrain.parallel import memory

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
import kernels

pytestmark = NEEDS_CUDA

pytest.importorskip("triton", reason="no Triton for this platform")


@pytest.mark.parametrize("name", kernels.CASES)
def test_kernels_equal_the_tiles(name):
    # Each float32 product is computed as three TF32 products.
    assert max(kernels.measure_errors(name, "cuda").values()) < 1e-4


@pytest.mark.parametrize("dtype", kernels.HALF_DTYPES.values(), ids=str)
@pytest.mark.parametrize("name", kernels.HALF_CASES)
def test_kernels_compute_half_precision_as_exactly_as_float32(name, dtype):
    for dim in kernels.HALF_CASES[name]:
        assert max(kernels.measure_half_errors(name, dim, dtype, "cuda").values()) < 1e-4


@pytest.mark.parametrize("dtype", kernels.HALF_DTYPES.values(), ids=str)
@pytest.mark.parametrize("name", kernels.HALF_LOSSES)
def test_losses_round_only_the_gradients_to_half_precision(name, dtype):
    bound = 2**-7 if dtype == torch.bfloat16 else 2**-10  # one unit in the last place
    assert max(kernels.measure_loss_errors(name, dtype, "cuda").values()) < bound


def test_a_loss_uses_the_kernels_without_blocking_the_host(cuda, forbid_synchronization):
    z = [torch.randn(4096, 128, device=cuda, requires_grad=True) for _ in range(2)]

    def compute_gradient():
        torch.autograd.grad(nt_xent(*z, temperature=0.1), z)

    compute_gradient()
    with forbid_synchronization():
        compute_gradient()
    fused_peak_bytes = memory.measure_peak_bytes(compute_gradient, cuda)
    with use_backend(replace(BACKENDS["cuda"], fused=False)):
        compute_gradient()
        assert fused_peak_bytes < memory.measure_peak_bytes(compute_gradient, cuda) / 4
