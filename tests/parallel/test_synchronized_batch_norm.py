"""Batch norm over ranks with CUDA's kernels, checked without a GPU.

On the CPU, plain tensor algebra stands in for the kernels. On fake CUDA tensors, the operations are
recorded.
"""

import batch_norm_kernels
import pytest
import torch
from conftest import run_ranks
from timm.layers import BatchNormAct2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pretrain.distributed import process_group
from ssl_pretrain.parallel import batch_norm
from ssl_pretrain.parallel.synchronized_batch_norm import CUDASynchronizedNorm

pytestmark = pytest.mark.promise

CHANNELS = 3
ROWS = [4, 1, 3]  # rows per rank; different numbers show that each count meets its own mean
WAITS = {"nonzero", "_local_scalar_dense", "index", "index_put_", "masked_select", "is_nonzero"}


def build_norm(affine=True, dtype=torch.float64):
    layer = nn.BatchNorm2d(CHANNELS, affine=affine, dtype=dtype)
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return layer


def draw_rows(world_size, dtype=torch.float64):
    """Return the rows of all ranks and the gradients of a loss at the outputs, channels_last."""
    generator = torch.Generator().manual_seed(0)
    shape = sum(ROWS[:world_size]), CHANNELS, 2, 2
    x, grad = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    x = x + torch.arange(len(x), dtype=x.dtype).view(-1, 1, 1, 1)  # means differ between ranks
    return (values.to(dtype, memory_format=torch.channels_last) for values in (x, grad))


def normalize_rank(affine, dtype):
    """Normalize this rank's rows with the kernels, and return value, gradients and buffers."""
    rank, world_size = process_group.rank(), process_group.world_size()
    source = build_norm(affine, torch.promote_types(dtype, torch.float32))
    layer = batch_norm.GroupBatchNorm(source, 4, 4 * world_size, None)
    x, grad = (values.split(ROWS[:world_size])[rank] for values in draw_rows(world_size, dtype))
    x = x.clone().requires_grad_()
    with batch_norm_kernels.registered("CPU"):
        y = layer._normalize_with_cuda_kernels(x)
        y.backward(grad)
    parameter_grads = [parameter.grad for parameter in layer.parameters()]
    return y.detach(), x.grad, parameter_grads, [*layer.buffers()]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize(("world_size", "affine"), [(2, True), (3, True), (2, False)])
def test_ranks_agree_with_torchs_norm_of_all_rows(world_size, affine, dtype, tolerance):
    y, x_grad, parameter_grads, buffers = zip(
        *run_ranks(normalize_rank, affine, dtype, world_size=world_size)
    )
    norm = build_norm(affine)
    x, grad = (values.double() for values in draw_rows(world_size, dtype))
    expected = norm(x.requires_grad_())
    expected.backward(grad)

    def assert_close(values, reference):
        reference = reference.to(values.dtype)
        torch.testing.assert_close(values, reference, rtol=tolerance, atol=tolerance)

    assert_close(torch.cat(y), expected.detach())
    assert_close(torch.cat(x_grad), x.grad)
    for rank_grads, parameter in zip(zip(*parameter_grads), norm.parameters(), strict=True):
        assert_close(sum(rank_grads), parameter.grad)
    for rank_buffers in buffers:  # the same on every rank
        for values, reference in zip(rank_buffers, norm.buffers(), strict=True):
            assert_close(values, reference)


class Recorder(TorchDispatchMode):
    """Record the names of all operations, and the elements that each collective sends."""

    def __init__(self):
        super().__init__()
        self.names, self.sent = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names.append(name)
        if name in ("_allgather_base_", "allreduce_"):
            tensor = args[1] if name == "_allgather_base_" else args[0][0]
            self.sent.append((name, tensor.numel(), tensor.dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_64_ranks_on_cuda_never_wait_for_the_host(kind, dtype):
    with (
        process_group.fake_process_group(64),
        batch_norm_kernels.registered("Meta"),
        FakeTensorMode(),
        Recorder() as recorder,
    ):
        network = nn.Sequential(kind(CHANNELS, device="cuda"))
        norm = batch_norm.convert(network, 8, 64 * 8)[0]
        assert batch_norm.spans_ranks(norm)
        x = torch.empty(8, CHANNELS, 5, 5, device="cuda", dtype=dtype)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        output = norm(x)
        # The autograd engine needs a device, so the backward pass is called directly, with a
        # gradient in another memory format.
        y = norm._normalize_with_cuda_kernels(x)
        grad = torch.empty_like(y, memory_format=torch.contiguous_format)
        gradients = CUDASynchronizedNorm.backward(y.grad_fn, grad)
    assert not WAITS.intersection(recorder.names)
    assert {"batch_norm_stats", "batch_norm_backward_elemt"} <= set(recorder.names)
    for values in (output, y, gradients[0]):
        assert values.dtype == dtype and values.device.type == "cuda"
        assert values.is_contiguous(memory_format=torch.channels_last)
    assert [gradient.dtype for gradient in gradients[1:3]] == [torch.float32] * 2
    gather = ("_allgather_base_", 2 * CHANNELS + 1, torch.float32)
    reduction = ("allreduce_", 2 * CHANNELS, torch.float32)
    assert recorder.sent == [gather, gather, reduction]
