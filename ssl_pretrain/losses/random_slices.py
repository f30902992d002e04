"""Draw the random unit vectors of a step on the device of the embeddings.

The vectors are a pure function of a seed and a step, so all ranks and a resumed run draw the same.
Seed and step may be tensors on the device, and the host does not wait for their values. The
uniform numbers equal those of `rng.uniform` bit for bit.
"""

import math

import torch
from torch import Tensor

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose


def random_slices(
    dim: int,
    num_slices: int,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw the directions onto which `sigreg` projects the embeddings of a step.

    Args:
        dim: Dimension of the embeddings.
        num_slices: Number of directions.
        seed: Seed of the run, in [0, 2**63).
        step: Number of optimizer steps before this one.
        device: Device of the result.
        dtype: Data type of the result. The numbers are drawn in float64 and rounded to it.

    Returns:
        Columns of unit length with independent uniform directions, shape (dim, num_slices).
    """
    with torch.no_grad():
        u = _uniform(seed, step, (dim, 2 * num_slices), Purpose.SLICES, device)
        u_radius, u_angle = u.chunk(2, dim=1)
        # The transform of Box and Muller turns pairs of uniform numbers into normal ones.
        normal = (-2 * torch.log1p(-u_radius)).sqrt() * torch.cos(2 * math.pi * u_angle)
        slices: Tensor = normal / torch.linalg.vector_norm(normal, dim=0)
        return slices.to(dtype)


def _uniform(
    seed: int | Tensor,
    epoch: int | Tensor,
    shape: tuple[int, int],
    purpose: Purpose,
    device: torch.device | str,
) -> Tensor:
    """Return `rng.uniform(seed, epoch, range(rows), 0, purpose, columns)` on a device, float64.

    `random_slices` passes the step as `epoch`.
    """
    num_rows, num_columns = shape
    state = torch.zeros((), dtype=torch.int64, device=device)
    state = _absorb(_absorb(state, seed), epoch)
    state = _absorb(state, torch.arange(num_rows, device=device))
    state = _absorb(_absorb(state, 0), int(purpose))
    bits = _absorb(state[:, None], torch.arange(num_columns, device=device))
    return _shift_right(bits, 11).double() * rng.ULP


def _absorb(state: Tensor, element: int | Tensor) -> Tensor:
    """Absorb an element into the state of `rng`'s hash. Products overflow as in uint64."""
    mixed = (state ^ element) + _GAMMA
    mixed = (mixed ^ _shift_right(mixed, 30)) * _FIRST_MULTIPLIER
    mixed = (mixed ^ _shift_right(mixed, 27)) * _SECOND_MULTIPLIER
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(x: Tensor, num_bits: int) -> Tensor:
    """Shift as uint64 does. The shift of torch's int64 copies the sign bit instead of zeros."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _to_int64(constant: int) -> int:
    """Return the int64 with the bits of a uint64, because torch cannot multiply uint64."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GAMMA = _to_int64(int(rng.GAMMA))
_FIRST_MULTIPLIER = _to_int64(int(rng.FIRST_MULTIPLIER))
_SECOND_MULTIPLIER = _to_int64(int(rng.SECOND_MULTIPLIER))
