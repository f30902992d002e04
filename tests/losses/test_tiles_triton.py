"""The fused kernels without a GPU, run by Triton's interpreter in a separate process."""

from dataclasses import replace

import kernels
import numpy as np
import pytest
import torch
import triton_interpreter

from ssl_pretrain.losses import tiles
from ssl_pretrain.losses.backend import BACKENDS, backend_for

pytestmark = pytest.mark.promise

triton = pytest.importorskip("triton", reason="no Triton for this platform")


def _parse_release(module):
    return tuple(int(number) for number in module.__version__.split(".")[:2])


@pytest.mark.skipif(
    _parse_release(triton) < (3, 7) and _parse_release(np) >= (2, 5),
    reason=f"the interpreter of Triton {triton.__version__} does not work with numpy 2.5",
)
def test_the_kernels_equal_the_tiles():
    lines = triton_interpreter.run_script("tests/losses/kernels.py", "cpu")
    errors = {name.partition(":")[0]: error for error, name in lines}
    num_half_cases = sum(map(len, kernels.HALF_CASES.values())) + len(kernels.HALF_LOSSES)
    assert len(errors) == len(kernels.CASES) + 2 * num_half_cases
    for name, error in errors.items():
        assert error < kernels.largest_allowed_error(name), lines


def test_the_kernels_only_support_cuda_and_up_to_32_bits():
    from ssl_pretrain.losses import tiles_triton

    cpu_rows = torch.zeros(4, 8)
    assert backend_for(cpu_rows).run_fused(cpu_rows, lambda kernels: kernels) is None
    assert tiles_triton.supports(torch.zeros(4, 8))
    assert tiles_triton.supports(torch.zeros(4, 256))
    assert not tiles_triton.supports(torch.zeros(4, 257))
    assert tiles_triton.supports(torch.zeros(4, 8, dtype=torch.bfloat16))
    assert tiles_triton.supports(torch.zeros(4, 8, dtype=torch.float16))
    assert not tiles_triton.supports(torch.zeros(4, 8, dtype=torch.float64))


def test_a_launch_that_does_not_fit_falls_back_to_the_tiles_and_warns_once(monkeypatch):
    from ssl_pretrain.losses import tiles_triton

    monkeypatch.setattr(tiles_triton, "_disabled_devices", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of a test")

    def raise_out_of_resources(*arguments, **keywords):
        raise tiles_triton.OutOfResources(262_144, 232_448, "shared memory")

    monkeypatch.setattr(tiles_triton, "log_sum_exp", raise_out_of_resources)
    monkeypatch.setattr(tiles_triton, "weighted_sum", raise_out_of_resources)
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    z = torch.nn.functional.normalize(rows, dim=1).requires_grad_()

    def loss_and_gradient(fused=True):
        backend = replace(BACKENDS["cpu"], fused=fused)
        lse, _ = tiles.symmetric_log_sum_exp(z, scale=5.0, backend=backend)
        return lse.detach(), torch.autograd.grad(lse.sum(), z)[0]

    with pytest.warns(UserWarning) as warnings:
        fallback_result = loss_and_gradient()
        loss_and_gradient()
    assert [str(warning.message) for warning in warnings] == [
        "the fused loss kernels do not fit GPU of a test (out of resource: shared memory, "
        "Required: 262144, Hardware limit: 232448. Reducing block sizes or `num_stages` may help.)"
        "; the loss is computed by plain tiles, with the same result but slower"
    ]
    torch.testing.assert_close(fallback_result, loss_and_gradient(fused=False), rtol=0, atol=0)
