"""Run the scaling kernel in Triton's interpreter and compare it with torch's operations.

Prints the largest difference per case. TRITON_INTERPRET=1 has to be set before Triton is imported,
so tests run this file in a process of its own.
"""

import torch

from ssl_pretrain.optim import scaling_triton

CHUNK = scaling_triton.CHUNK
SHAPES = {
    "sizes around a chunk": [(1,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3 * CHUNK,)],
    "an empty shard": [(5, 2), (0, 4), (300,)],
    "one tensor": [(7, 11)],
    "no element": [(0,)],
    "many small tensors": [(n % 5 + 1, 3) for n in range(100)],
    "weights of convolutions": [(8, 3, 5, 5), (40, 16, 3, 3)],
}


def random_tensors(shapes, seed, offset, device):
    """Return tensors, channels_last if they have four dimensions, and `offset` elements of gap."""
    generator, tensors = torch.Generator().manual_seed(seed), []
    for shape in shapes:
        size = torch.Size(shape).numel()
        values = torch.randn(size + offset, generator=generator).to(device)[offset:].view(shape)
        tensors.append(values.to(memory_format=torch.channels_last) if len(shape) == 4 else values)
    return tensors


class TorchOperations:
    """The functions of `scaling` on any device, without the kernel."""

    @staticmethod
    def scale(tensors, factors):
        torch._foreach_mul_(tensors, list(factors.unbind()))

    @staticmethod
    def add_and_scale(tensors, others, other_factors, factors):
        torch._foreach_add_(tensors, torch._foreach_mul(others, list(other_factors.unbind())))
        torch._foreach_mul_(tensors, list(factors.unbind()))


def measure_difference(shapes, offset, device="cpu"):
    """Return the largest difference from torch's operations, over both functions."""
    factors = torch.randn(2, len(shapes), generator=torch.Generator().manual_seed(2)).to(device)
    factors, other_factors = factors.unbind()
    others, pairs = random_tensors(shapes, 1, offset, device), []
    for kernels in (TorchOperations, scaling_triton):
        scaled, summed = (random_tensors(shapes, 0, offset, device) for _ in range(2))
        kernels.scale(scaled, factors)
        kernels.add_and_scale(summed, others, other_factors, factors)
        pairs.append([*scaled, *summed])
    return max((a - b).abs().max().item() if a.numel() else 0.0 for a, b in zip(*pairs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, shapes in SHAPES.items():
        print(f"{measure_difference(shapes, 0):.3g}  {name}")
        print(f"{measure_difference(shapes, 1):.3g}  {name}, not aligned to 16 bytes")
