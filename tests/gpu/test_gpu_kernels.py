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
