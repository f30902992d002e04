"""The fused loss kernels on a GPU equal the plain tiles, make no host wait, and take less memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from on_cuda import NEEDS_CUDA, cuda, never_waited_for  # noqa: F401

from ssl_pretrain.losses import tiles
from ssl_pretrain.losses.contrastive import nt_xent
from ssl_pretrain.parallel import memory

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
import kernels

pytestmark = NEEDS_CUDA

pytest.importorskip("triton", reason="no Triton for this platform")


@pytest.mark.parametrize("name", kernels.CASES)
def test_they_compute_what_the_tiles_do(name):
    assert max(kernels.check(name, "cuda").values()) < 1e-4  # a product is three of TF32


def test_a_loss_takes_them_and_nobody_waits(cuda, never_waited_for, monkeypatch):
    z = [torch.randn(4096, 128, device=cuda, requires_grad=True) for _ in range(2)]

    def both():
        torch.autograd.grad(nt_xent(*z, temperature=0.1), z)

    both()
    with never_waited_for():
        both()
    fused = memory.peak(both, cuda)
    monkeypatch.setattr(tiles, "FUSED_ON", ())
    both()
    assert fused < memory.peak(both, cuda) / 4
